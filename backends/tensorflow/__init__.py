"""The TensorFlow backend: `backends.tensorflow.backend.create(model_or_keras_model, settings)`."""

import os

# TensorFlow and Keras read these when they load.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it speaks of its kernels in every process
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
