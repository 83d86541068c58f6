"""Keras models such as people bring, written from the README's words alone."""

import keras
import numpy as np
from keras import layers, ops


class Reviews:
    """(ids, label, sample weight): texts padded with zeros, which the embedding masks."""

    def __init__(self, size=48):
        draw = np.random.default_rng(0)
        self.x = draw.integers(1, 30, (size, 4))
        for row, length in zip(self.x, draw.integers(1, 5, size), strict=True):
            row[length:] = 0
        self.y, self.weight = draw.integers(0, 2, size), draw.random(size).astype(np.float32) + 0.5

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], self.y[index], self.weight[index]


def reviews():
    """Masking, a bidirectional network, AUC and accuracy, sample weights."""
    model = keras.Sequential([
        keras.Input((4,), dtype="int32"), layers.Embedding(30, 16, mask_zero=True),
        layers.Bidirectional(layers.SimpleRNN(4)),
        layers.Dense(8, activation="relu", kernel_regularizer="l2"), layers.Dense(1, activation="sigmoid")])
    model.compile(loss=keras.losses.BinaryCrossentropy(label_smoothing=0.1), metrics=["accuracy", keras.metrics.AUC()])
    return model


class Offers:
    def __init__(self, size=48):
        draw = np.random.default_rng(1)
        self.words, self.price = draw.integers(0, 20, (size, 4)), draw.normal(size=(size, 3)).astype(np.float32)
        self.sold, self.days = draw.integers(0, 3, size), draw.normal(size=(size, 1)).astype(np.float32)

    def __len__(self):
        return len(self.sold)

    def __getitem__(self, index):
        return {"words": self.words[index], "price": self.price[index]}, {"sold": self.sold[index], "days": self.days[index]}


def pinball(true, guess):
    error = true - guess
    return ops.mean(ops.maximum(0.9 * error, -0.1 * error), axis=-1)


def offers():
    """Two inputs and two outputs by name, loss weights, a frozen layer, batch norm, a constraint, a quantile loss, an
    activity regulariser."""
    words, price = keras.Input((4,), name="words", dtype="int32"), keras.Input((3,), name="price")
    embedded = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8, embeddings_constraint="unit_norm")(words))
    frozen = layers.Dense(8, activation="tanh", name="frozen")
    frozen.trainable = False
    joint = layers.Concatenate()([embedded, frozen(price)])
    joint = layers.BatchNormalization()(layers.Dense(16, activation="relu",
                                                     activity_regularizer=keras.regularizers.L2(1e-2))(joint))
    model = keras.Model({"words": words, "price": price}, {
        "sold": layers.Dense(3, name="sold")(joint), "days": layers.Dense(1, name="days")(joint)})
    model.compile(loss={"sold": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "days": pinball},
                  loss_weights={"sold": 1.0, "days": 0.3}, metrics={"days": ["mae"]})
    return model


class Vectors:
    def __init__(self, size=48):
        self.x = np.random.default_rng(2).normal(size=(size, 6)).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.x[index]


@keras.saving.register_keras_serializable("foreign")
class Sampling(layers.Layer):
    def __init__(self, noise, **options):
        super().__init__(**options)
        self.seeds, self.noise = keras.random.SeedGenerator(7), noise

    def call(self, inputs):
        mean, log_variance = inputs
        self.add_loss(-0.5 * ops.mean(ops.sum(1 + log_variance - mean ** 2 - ops.exp(log_variance), -1)))
        return mean + self.noise * ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.seeds)


class VAE(keras.Model):
    """Subclassed, with add_loss and a seed generator of its own."""

    def __init__(self, noise):
        super().__init__()
        self.inside, self.mean, self.log_variance = layers.Dense(16,
                                                                 activation="gelu"), layers.Dense(4), layers.Dense(4)
        self.sample, self.outside = Sampling(noise), layers.Dense(6)

    def call(self, x, training=None):
        h = self.inside(x)
        return self.outside(self.sample([self.mean(h), self.log_variance(h)]))


def vae(noise=0.0):
    model = VAE(noise)
    model(np.zeros((2, 6), np.float32))
    model.compile(loss="mse")
    return model


def unmade():
    model = VAE(0.0)
    model.built = True
    model.compile(loss="mse")
    return model


class Pictures:
    def __init__(self, size=48):
        draw = np.random.default_rng(3)
        self.x, self.y = draw.random((size, 8, 8,
                                      3)).astype(np.float32), np.eye(4, dtype=np.float32)[draw.integers(0, 4, size)]

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def pictures(noise=False, spectral=False):
    """Augmentation layers, spectral and group norm, attention, noise, focal loss."""
    h = inside = keras.Input((8, 8, 3))
    if noise:
        h = layers.RandomFlip("horizontal")(h)
        h = layers.GaussianNoise(0.05)(layers.RandomTranslation(0.1, 0.1)(h))
    conv = layers.Conv2D(8, 3, strides=2, padding="same")
    h = layers.GroupNormalization(4)(layers.SpectralNormalization(conv)(h) if spectral else conv(h))
    if noise:
        h = layers.SpatialDropout2D(0.2)(h)
    h = layers.Reshape((16, 8))(h)
    h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 4, dropout=0.1 * noise)(h, h))
    model = keras.Model(inside, layers.Dense(4, activation="softmax")(layers.GlobalMaxPooling1D()(h)))
    model.compile(loss=keras.losses.CategoricalFocalCrossentropy(), metrics=[keras.metrics.F1Score()])
    return model


def tagged():
    """One label a word, words that are masked: Keras divides by how many there are."""
    model = keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(30, 16, mask_zero=True),
                              layers.GRU(4, return_sequences=True),
                              layers.Dense(2, activation="softmax")])
    model.compile(loss="sparse_categorical_crossentropy")
    return model


class Tags(Reviews):
    def __getitem__(self, index):
        return self.x[index], self.x[index] % 2


class Batches(keras.utils.PyDataset):
    """Whole batches, as keras.io has it."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        draw = np.random.default_rng(index)
        return draw.normal(size=(4, 6)).astype(np.float32), draw.normal(size=(4, 6)).astype(np.float32)


class Ragged(Vectors):
    def collate_fn(self, items):
        return np.stack([x for x, _ in items]), np.stack([y for _, y in items])


class Distilled(keras.Model):
    """A train_step of one's own, as keras.io's guide writes it."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = layers.Dense(6), layers.Dense(6)
        self.teacher.trainable = False

    def call(self, x):
        self.teacher(x)
        return self.student(x)

    def train_step(self, data):
        import tensorflow as tf
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean((self.student(x) - self.teacher(x)) ** 2)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def distilled():
    model = Distilled()
    model(np.zeros((2, 6), np.float32))
    model.compile(loss="mse")
    return model
