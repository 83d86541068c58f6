"""Gluon blocks such as people bring, written from the README's words alone."""

import numpy as np

if "bool" not in vars(np):
    np.bool = np.bool_
import mxnet as mx
from mxnet import autograd, gluon
from mxnet.gluon import nn, rnn


class Texts:
    def __init__(self, size=48):
        draw = np.random.default_rng(0)
        self.rows = draw.integers(1, 30, (size, 7))
        self.lengths = draw.integers(3, 8, size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"ids": self.rows[index].astype(np.int32), "length": np.float32(self.lengths[index])}


class Language(gluon.Block):
    """An LSTM language model with tied weights and dropout; the loss a sum over the tokens that are there, and how many
    they are."""

    def __init__(self, dropout=0.0):
        super().__init__()
        with self.name_scope():
            self.embedding = nn.Embedding(30, 16)
            self.drop = nn.Dropout(dropout)
            self.lstm = rnn.LSTM(16, input_size=16)
            self.out = nn.Dense(30, flatten=False, in_units=16, params=self.embedding.params)
        self.initialize(mx.init.Xavier())

    def loss(self, batch):
        ids = batch["ids"]
        h = self.drop(self.lstm(self.embedding(ids[:, :-1].T)))
        losses = -mx.nd.pick(mx.nd.log_softmax(self.out(h), axis=-1), ids[:, 1:].T, axis=-1)
        kept = mx.nd.SequenceMask(losses, batch["length"] - 1, use_sequence_length=True)
        return kept.sum(), (batch["length"] - 1).sum()


class Pictures:
    """Flipped by NumPy's global generator, in a tuple."""

    def __init__(self, size=48, flip=True):
        draw = np.random.default_rng(1)
        self.x, self.y, self.flip = draw.random((size, 2, 6, 6)).astype(np.float32), draw.integers(0, 3, size), flip

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        image = self.x[index]
        if self.flip and np.random.rand() < 0.5:
            image = image[:, :, ::-1].copy()
        return image, self.y[index]


class Straight(autograd.Function):
    """Rounds on the way forward, passes straight through on the way back."""

    def forward(self, x):
        return mx.nd.round(x * 4) / 4

    def backward(self, dy):
        return dy


class Deferred(gluon.Block):
    """Deferred shapes, batch and group norm, a frozen trunk, a learning rate of its own, noise, a custom function, an
    auxiliary loss."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.trunk = nn.Conv2D(4, 3, padding=1)
            self.norm, self.group = nn.BatchNorm(), nn.GroupNorm(2)
            self.head, self.aux = nn.Dense(3), nn.Dense(1)
        self.initialize()
        self.trunk.collect_params().setattr("grad_req", "null")
        self.head.weight.lr_mult = 0.1

    def loss(self, batch):
        x, y = batch
        h = self.norm(self.trunk(x))
        if autograd.is_training():
            h = h + 0.1 * mx.nd.random.normal(shape=h.shape)
        h = mx.nd.relu(self.group(h))
        h = Straight()(h)
        each = gluon.loss.SoftmaxCrossEntropyLoss()(self.head(h), y)
        return each + 0.1 * gluon.loss.HuberLoss()(self.aux(h), (y > 0).astype("float32"))


class Net(Deferred):
    """Called once on an example, as the sentence says."""

    def __init__(self):
        super().__init__()
        self.loss((mx.nd.zeros((2, 2, 6, 6)), mx.nd.zeros(2)))


class Triplets:
    def __init__(self, size=48):
        self.x = np.random.default_rng(2).normal(size=(size, 3, 5)).astype(np.float32)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return (self.x[index],)


class Bare(Triplets):
    """An array by itself, as ArrayDataset gives it of one array."""

    def __getitem__(self, index):
        return self.x[index]


class Siamese(nn.HybridBlock):
    """A triplet loss, a centre kept as a parameter without gradient and moved in the loss, and a GRU cell unrolled."""

    def __init__(self):
        super().__init__()
        with self.name_scope():
            self.dense = nn.Dense(8, in_units=5, activation="tanh")
            self.cell = rnn.GRUCell(8, input_size=8)
            self.centre = self.params.get("centre", shape=(8,), init="zeros", grad_req="null")
        self.initialize()

    def embed(self, x):
        h = self.dense(x).expand_dims(1)
        return self.cell.unroll(2, mx.nd.concat(h, h * 0.5, dim=1), merge_outputs=True)[0][:, -1]

    def loss(self, batch):
        rows, = batch
        one, two, other = (self.embed(rows[:, i]) for i in range(3))
        centre = self.centre.data()
        if autograd.is_training():
            with autograd.pause():
                self.centre.set_data(0.9 * centre + 0.1 * one.mean(axis=0))
        return gluon.loss.TripletLoss(margin=1)(one - centre, two - centre, other - centre)
