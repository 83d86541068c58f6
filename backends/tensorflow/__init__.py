"""The TensorFlow backend: traced functions, cut where workers meet; Keras models as `fit` trains them.

backend, ops, optimizer, arrays, collectives, stages, tracing and adapter as in every backend; compiled: what a Keras
model's compile() was told.
"""

import os

# TensorFlow and Keras read these when they load.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else it speaks of its kernels in every process
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
