"""Modules and data sets such as people bring, written from the README's words alone by someone who had not read a line of the platform."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------ 7. SimCLR: contrast within the batch, temperature
# learned and clamped

class Points:
    def __init__(self, size=48, features=6, classes=3, seed=5):
        draw = np.random.default_rng(seed)
        self.x = draw.normal(size=(size, features)).astype(np.float32)
        self.y = draw.integers(0, classes, size)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


class SimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.GroupNorm(4, 32), nn.GELU(), nn.Linear(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(4.5))

    def loss(self, batch):
        x = batch["x"]
        one = F.normalize(self.encoder(x + 0.1 * torch.randn_like(x)), dim=-1)
        two = F.normalize(self.encoder(x + 0.1 * torch.randn_like(x)), dim=-1)
        logits = self.logit_scale.clamp(0, 4.6052).exp() * one @ two.T
        labels = torch.arange(len(x))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class CLIP(SimCLR):
    def loss(self, batch):
        with torch.no_grad():
            self.logit_scale.clamp_(0, 4.6052)  # as CLIP's repository does
        return super().loss(batch)


# ------------------------------------------------------------------ 8. embedding bag with offsets, class weights

class Bags:
    """Collated flat: all tokens one after another, and where each row begins."""

    def __init__(self, size=48):
        draw = np.random.default_rng(6)
        self.rows = [draw.integers(0, 50, draw.integers(1, 7)) for _ in range(size)]
        self.labels = draw.integers(0, 3, size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index], self.labels[index]

    @staticmethod
    def collate_fn(items):
        lengths = torch.tensor([len(row) for row, _ in items])
        return {"tokens": torch.cat([torch.as_tensor(row) for row, _ in items]),
                "offsets": torch.cumsum(lengths, 0) - lengths,
                "label": torch.tensor([int(label) for _, label in items])}


class Bag(nn.Module):
    """`reduction="mean"` with class weights divides by the sum of the weights of this batch's labels."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="mean")
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2]))

    def loss(self, batch):
        return self.criterion(self.head(self.bag(batch["tokens"], batch["offsets"])), batch["label"])


class BagSum(Bag):
    def loss(self, batch):
        weight = self.criterion.weight
        out = self.head(self.bag(batch["tokens"], batch["offsets"]))
        return F.cross_entropy(out, batch["label"], weight=weight, reduction="sum"), weight[batch["label"]].sum()


# ------------------------------------------------------------------ 9. CTC over a packed bidirectional LSTM

class Utterances:
    def __init__(self, size=48):
        draw = np.random.default_rng(7)
        self.sound = [draw.normal(size=(draw.integers(10, 15), 5)).astype(np.float32) for _ in range(size)]
        self.text = [draw.integers(1, 8, draw.integers(2, 5)) for _ in range(size)]

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        return torch.from_numpy(self.sound[index]), torch.from_numpy(self.text[index])

    def collate_fn(self, items):
        sounds, texts = zip(*items, strict=True)
        return (pad_sequence(sounds, batch_first=True), torch.tensor([len(s) for s in sounds]),
                torch.cat(texts), torch.tensor([len(t) for t in texts]))


class CTC(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 16, num_layers=2, dropout=0.2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(32, 8)

    def loss(self, batch):
        sound, sound_lengths, text, text_lengths = batch
        packed = pack_padded_sequence(sound, sound_lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, lengths = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return F.ctc_loss(self.out(hidden).log_softmax(-1).transpose(0, 1), text, lengths, text_lengths,
                          zero_infinity=True)


# ------------------------------------------------------------------ 10. VAE, figures logged beside the loss

class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))

    def both(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        rebuilt = F.mse_loss(self.decoder(z), x, reduction="none").sum(-1).mean()
        return rebuilt, -0.5 * (1 + log_variance - mean ** 2 - log_variance.exp()).sum(-1).mean()

    def loss(self, batch):
        return sum(self.both(batch["x"]))


class LazyVAE(VAE):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(8))


class WarmVAE(VAE):
    """The KL term is warmed up by a plain Python counter."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def loss(self, batch):
        rebuilt, kl = self.both(batch["x"])
        self.seen += len(batch["x"])
        return rebuilt + min(1.0, self.seen / 60) * kl


class ToldVAE(VAE):
    """Figures to log, as Lightning takes them."""

    def loss(self, batch):
        rebuilt, kl = self.both(batch["x"])
        return {"loss": rebuilt + kl, "kl": kl.detach(), "rebuilt": rebuilt.item()}


class TwoVAE(VAE):
    """The loss, and a figure beside it."""

    def loss(self, batch):
        rebuilt, kl = self.both(batch["x"])
        return rebuilt + kl, kl


# ------------------------------------------------------------------ 12. a graph network

class Graphs:
    def __init__(self, size=48):
        draw = np.random.default_rng(8)
        self.graphs = []
        for _ in range(size):
            nodes = int(draw.integers(2, 6))
            self.graphs.append({"x": torch.tensor(draw.normal(size=(nodes, 4)), dtype=torch.float32),
                                "edges": torch.tensor(draw.integers(0, nodes, (2, nodes * 2))),
                                "y": float(draw.normal())})

    def __len__(self):
        return len(self.graphs)

    def __getitem__(self, index):
        return self.graphs[index]

    def collate_fn(self, graphs):
        starts = np.cumsum([0] + [len(g["x"]) for g in graphs])
        return {"x": torch.cat([g["x"] for g in graphs]),
                "edges": torch.cat([g["edges"] + int(start) for g, start in zip(graphs, starts[:-1], strict=True)], 1),
                "graph": torch.repeat_interleave(torch.arange(len(graphs)),
                                                 torch.tensor([len(g["x"]) for g in graphs])),
                "y": torch.tensor([g["y"] for g in graphs])}


class GraphNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(4, 16)
        self.layers = nn.ModuleList([nn.Linear(32, 16) for _ in range(2)])
        self.out = nn.Linear(16, 1)

    def loss(self, batch):
        h, (source, target) = self.inside(batch["x"]), batch["edges"]
        for layer in self.layers:
            def message(h, layer=layer):
                gathered = torch.zeros_like(h).index_add(0, target, h[source])
                return h + layer(torch.cat([h, gathered], -1)).relu()
            h = checkpoint(message, h, use_reentrant=False)
        pooled = torch.zeros(len(batch["y"]), 16).index_add_(0, batch["graph"], h)
        return F.huber_loss(self.out(pooled).squeeze(-1), batch["y"])


# ------------------------------------------------------------------ 13. detection: a varying number of boxes, lists of
# dicts

class Boxes:
    def __init__(self, size=48):
        draw = np.random.default_rng(9)
        self.images = torch.tensor(draw.random((size, 1, 8, 8)), dtype=torch.float32)
        self.targets = [{"boxes": torch.tensor(draw.random((n, 4)), dtype=torch.float32),
                         "labels": torch.tensor(draw.integers(0, 3, n))}
                        for n in draw.integers(0, 4, size)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]

    def collate_fn(self, items):
        return tuple(zip(*items, strict=True))  # torchvision's


class Detector(nn.Module):
    """Focal-like classification of three slots, L1 over the boxes there are, divided by the number of boxes in the
    batch, as DETR does."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(2),
                                   nn.Flatten())
        self.classes, self.boxes = nn.Linear(32, 12), nn.Linear(32, 12)

    def loss(self, batch):
        images, targets = batch
        features = self.trunk(torch.stack(list(images)))
        logits, boxes = self.classes(features).view(-1, 3, 4), self.boxes(features).view(-1, 3, 4).sigmoid()
        count = max(1, sum(len(t["labels"]) for t in targets))
        total = 0.0
        for row, target in enumerate(targets):
            n = len(target["labels"])
            wanted = torch.full((3,), 3)
            wanted[:n] = target["labels"]
            total = total + F.cross_entropy(logits[row], wanted,
                                            reduction="sum") + 5 * (boxes[row, :n] - target["boxes"]).abs().sum()
        return total / count


class DetectorSum(Detector):
    """Group norm: nothing else depends on who is in a batch together."""

    def __init__(self):
        super().__init__()
        self.trunk[1] = nn.GroupNorm(2, 8)

    def loss(self, batch):
        count = sum(len(t["labels"]) for t in batch[1])
        return super().loss(batch) * max(1, count), count
