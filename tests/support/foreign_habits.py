"""Modules with a memory, losses with habits and data sets with moods, written from the README's words alone."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.support.foreign_torch import Points

# ------------------------------------------------------------------ 11. a mean teacher: parameters moved inside the
# loss

class MeanTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        self.teacher = copy.deepcopy(self.student)
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)

    def loss(self, batch):
        self.follow()
        out = self.student(batch["x"])
        with torch.no_grad():
            wanted = self.teacher(batch["x"]).softmax(-1)
        return F.cross_entropy(out, batch["y"]) + 0.5 * ((out.softmax(-1) - wanted) ** 2).sum(-1).mean()


# ------------------------------------------------------------------ 14. VQ-VAE: a codebook in buffers, moved by
# averages of what was assigned to it

class VQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(4, 6)
        self.register_buffer("codes", torch.randn(8, 4))
        self.register_buffer("counts", torch.ones(8))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("updates", torch.tensor(0))

    def loss(self, batch):
        z = self.encoder(batch["x"])
        nearest = torch.cdist(z, self.codes).argmin(-1)
        q = self.codes[nearest]
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(nearest, 8).float()
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(hot.T @ z, alpha=0.1)
                self.codes.copy_(self.sums / (self.counts + 1e-5).unsqueeze(-1))
                self.updates += 1
        commit = F.mse_loss(z, q.detach())
        return F.mse_loss(self.decoder(z + (q - z).detach()), batch["x"]) + 0.25 * commit


# ------------------------------------------------------------------ 15. quantiles, spectral norm, float64 columns,
# lazily built

class Wide:
    """float64 features and an int8 flag, as pandas gives them."""

    def __init__(self, size=48):
        draw = np.random.default_rng(10)
        self.x, self.flag, self.y = draw.normal(size=(size,
                                                      5)), draw.integers(0, 2, size).astype(np.int8), draw.normal(size=size)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {"x": self.x[index], "flag": self.flag[index], "y": self.y[index], "name": f"row {index}"}


class Quantiles(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = parametrizations.spectral_norm(nn.Linear(6, 16))
        self.out = parametrizations.weight_norm(nn.Linear(16, 3))
        self.register_buffer("levels", torch.tensor([0.1, 0.5, 0.9]), persistent=False)

    def loss(self, batch):
        x = torch.cat([batch["x"].float(), batch["flag"].float().unsqueeze(-1)], -1)
        error = batch["y"].float().unsqueeze(-1) - self.out(self.hidden(x).tanh())
        return torch.maximum(self.levels * error, (self.levels - 1) * error).mean()


# ------------------------------------------------------------------ 16. mixture of experts under autocast, noisy gates,
# auxiliary loss, int buffer

class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.scale * gradient, None


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)) for _ in range(4)])
        self.domain = nn.Linear(3, 2)
        self.register_buffer("used", torch.zeros(4, dtype=torch.long))

    def loss(self, batch):
        x, y = batch["x"], batch["y"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = self.gate(x)
            if self.training:
                scores = scores + torch.randn_like(scores) * 0.1
            shares = scores.float().softmax(-1)
            weight, chosen = shares.max(-1)
            out = x.new_zeros(len(x), 3)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero().squeeze(-1)
                if len(rows):  # an expert without rows has no gradient at all
                    out = out.index_add(0, rows, expert(x[rows]).float() * weight[rows, None])
            adversary = self.domain(Reverse.apply(out, 0.3))
        self.used += torch.bincount(chosen, minlength=4)
        share = torch.bincount(chosen, minlength=4) / len(x)
        balance = 4 * (share * shares.mean(0)).sum()
        return F.cross_entropy(out, y) + 0.01 * balance + F.cross_entropy(adversary.float(), (x[:, 0] > 0).long())


# ------------------------------------------------------------------ 17. mixup in the loss by NumPy's beta and Python's
# shuffle

class Mixup(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))

    def loss(self, batch):
        x, y = batch["x"], batch["y"]
        share = float(np.random.beta(0.4, 0.4))
        order = list(range(len(x)))
        random.shuffle(order)
        out = self.net(share * x + (1 - share) * x[order])
        return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])


# ------------------------------------------------------------------ 18. a GAN: two optimizers, Lightning's way

class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator, self.critic = nn.Linear(4, 6), nn.Linear(6, 1)
        self.optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-3)

    def loss(self, batch):
        real = batch["x"]
        fake = self.generator(torch.randn(len(real), 4))
        critic = (F.softplus(-self.critic(real)) + F.softplus(self.critic(fake.detach()))).mean()
        self.optimizer.zero_grad()
        critic.backward()
        self.optimizer.step()
        return F.softplus(-self.critic(fake)).mean()


class Adversarial(nn.Module):
    """Rows moved against the gradient (FGSM), which is had the way that tutorials have it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def loss(self, batch):
        x = batch["x"].clone().requires_grad_()
        F.cross_entropy(self.net(x), batch["y"]).backward()
        moved = (x + 0.05 * x.grad.sign()).detach()
        self.zero_grad()
        return F.cross_entropy(self.net(moved), batch["y"])


class Tidy(Adversarial):
    """Begins as every loop does."""

    def loss(self, batch):
        self.zero_grad()
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


class Scrawl(Adversarial):
    """Writes noise into the batch that it was given."""

    def loss(self, batch):
        batch["x"] += 0.1 * torch.randn_like(batch["x"])
        batch["y"][batch["y"] == 2] = -100
        return F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="sum") / len(batch["y"])


# ------------------------------------------------------------------ 19. a stream

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        draw = np.random.default_rng(0)
        for _ in range(48):
            yield {"x": draw.normal(size=6).astype(np.float32), "y": int(draw.integers(3))}


class OwnDraws(Points):
    """Noise from a generator of its own, seeded as it should be."""

    def __init__(self):
        super().__init__()
        self.draw = np.random.default_rng(0)

    def __getitem__(self, index):
        return {"x": self.x[index] + self.draw.normal(size=6).astype(np.float32), "y": self.y[index]}


class Drifting(Points):
    """Noise written into what it keeps."""

    def __getitem__(self, index):
        x = self.x[index]
        x += np.random.normal(0, 0.1, 6)
        return {"x": x, "y": self.y[index]}


class Collater(Points):
    """fairseq's name."""

    def collater(self, items):
        return {"x": torch.stack([torch.tensor(item["x"]).flip(0) for item in items]),
                "y": torch.tensor([int(item["y"]) for item in items])}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def loss(self, batch):
        return F.cross_entropy(self.net(batch["x"]), batch["y"])


# ------------------------------------------------------------------ 20. a memory queue (MoCo), a stateful GRU

class Queue(nn.Module):
    """Negatives from a queue of earlier batches, and its place in it, in buffers as in MoCo's repository."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 16, batch_first=True)
        self.register_buffer("queue", F.normalize(torch.randn(24, 16), dim=-1))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def start(self, rows):
        return None

    def loss(self, batch):
        x = batch["x"].view(-1, 2, 3)
        out, self.last = self.gru(x, self.start(len(x)))
        one, two = F.normalize(out[:, -1], dim=-1), F.normalize(self.gru(x + 0.1)[0][:, -1], dim=-1).detach()
        logits = torch.cat([(one * two).sum(-1, keepdim=True), one @ self.queue.clone().detach().T], -1) / 0.2
        rows = (int(self.place) + torch.arange(len(two))) % 24
        self.queue[rows] = two
        self.place[0] = (int(rows[-1]) + 1) % 24
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


class Stateful(Queue):
    """Goes on from the hidden state that the last batch left in an attribute."""

    last = None

    def start(self, rows):
        return None if self.last is None else self.last.detach().mean(1, keepdim=True).expand(-1, rows, -1).contiguous()
