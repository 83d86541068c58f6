"""Modules and data sets such as people bring, written from the README's words alone by someone who had not read a line of the platform."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint


def _quiet():
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers


# ------------------------------------------------------------------ 1. GPT-2, padded, tied, dropout, checkpointed

class Sentences:
    """Ragged token lists, padded to the longest of the batch by `collate_fn`, labels -100 where there is nothing."""

    def __init__(self, size=48, vocab=40, longest=9, seed=0):
        draw = np.random.default_rng(seed)
        self.rows = [draw.integers(1, vocab, draw.integers(3, longest + 1)) for _ in range(size)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": torch.as_tensor(self.rows[index])}

    def collate_fn(self, items):
        ids = pad_sequence([item["input_ids"] for item in items], batch_first=True)
        mask = (ids > 0).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class GPT2(nn.Module):
    """The loss is transformers' own: a mean over the tokens that are there."""

    def __init__(self, dropout=0.1):
        super().__init__()
        t = _quiet()
        self.net = t.GPT2LMHeadModel(t.GPT2Config(
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            use_cache=False, bos_token_id=0, eos_token_id=0))
        self.net.gradient_checkpointing_enable()

    def loss(self, batch):
        return self.net(**batch).loss


class GPT2Sum(GPT2):
    """The same as a sum over the tokens that are there, and how many they are."""

    def __init__(self):
        super().__init__(dropout=0.0)

    def loss(self, batch):
        logits = self.net(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


# ------------------------------------------------------------------ 2. BERT, masked tokens drawn in __getitem__, a sum and a weight

class Masked:
    """Fifteen percent of the tokens hidden, anew each time an item is asked for, by torch's own generator (as everybody does)."""

    def __init__(self, size=48, vocab=40, length=8):
        draw = np.random.default_rng(1)
        self.rows = torch.as_tensor(draw.integers(3, vocab, (size, length)))
        self.lengths = draw.integers(4, length + 1, size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids, there = self.rows[index].clone(), torch.arange(8) < int(self.lengths[index])
        hidden = (torch.rand(8) < 0.3) & there
        hidden[0] = True
        labels = torch.where(hidden, ids, torch.tensor(-100))
        ids[hidden] = 2
        ids[~there] = 0
        return {"input_ids": ids, "attention_mask": there.long(), "labels": labels}


class BERT(nn.Module):
    def __init__(self):
        super().__init__()
        t = _quiet()
        self.net = t.BertForMaskedLM(t.BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=16))
        self.net.gradient_checkpointing_enable()

    def loss(self, batch):
        labels = batch["labels"]
        logits = self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), (labels != -100).sum()


# ------------------------------------------------------------------ 3. T5

class Pairs:
    def __init__(self, size=48):
        draw = np.random.default_rng(2)
        self.source = draw.integers(2, 40, (size, 7))
        self.target = draw.integers(2, 40, (size, 5))

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {"input_ids": self.source[index], "labels": self.target[index]}


class T5(nn.Module):
    """Every target is as long as every other, so this is a plain mean over the samples."""

    def __init__(self):
        super().__init__()
        t = _quiet()
        self.net = t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0, use_cache=False))
        self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    def loss(self, batch):
        return self.net(**batch).loss


# ------------------------------------------------------------------ 4. LLaMA with LoRA, frozen backbone

class Rows(Pairs):
    """As `datasets` gives them: lists of numbers."""

    def __getitem__(self, index):
        return {"input_ids": torch.tensor(self.source[index])}


class LoRA(nn.Module):
    def __init__(self, base, rank=4, dropout=0.1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.02)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + 2.0 * self.up(self.down(self.drop(x)))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        t = _quiet()
        self.net = t.LlamaForCausalLM(t.LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=16, use_cache=False, tie_word_embeddings=True))
        self.net.requires_grad_(False)
        for layer in self.net.model.layers:
            layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
            layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
        self.net.gradient_checkpointing_enable()
        self.net.enable_input_require_grads()

    def loss(self, batch):
        return self.net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


# ------------------------------------------------------------------ 5. ViT with augmentation by NumPy's and Python's global generators

class Pictures:
    def __init__(self, size=48):
        draw = np.random.default_rng(3)
        self.images = draw.random((size, 3, 8, 8)).astype(np.float32)
        self.labels = draw.integers(0, 4, size)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if random.random() < 0.5:
            image = image[:, :, ::-1]
        shift = np.random.randint(-1, 2)
        return np.roll(image, shift, 1) + np.random.normal(0, 0.05, image.shape).astype(np.float32), self.labels[index]


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        t = _quiet()
        self.net = t.ViTForImageClassification(t.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4, num_labels=4,
            hidden_dropout_prob=0.1))
        self.net.gradient_checkpointing_enable()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss(self, batch):
        images, labels = batch
        return self.criterion(self.net(images).logits, labels)


# ------------------------------------------------------------------ 6. Whisper, SpecAugment inside (which draws from NumPy), layerdrop (from torch)

class Speech:
    def __init__(self, size=48):
        draw = np.random.default_rng(4)
        self.features = draw.normal(size=(size, 8, 24)).astype(np.float32)
        self.text = draw.integers(3, 40, (size, 5))

    def __len__(self):
        return len(self.text)

    def __getitem__(self, index):
        return {"input_features": self.features[index], "labels": self.text[index]}


class Whisper(nn.Module):
    def __init__(self):
        super().__init__()
        t = _quiet()
        self.net = t.WhisperForConditionalGeneration(t.WhisperConfig(
            vocab_size=40, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=12, max_target_positions=12, encoder_layerdrop=0.3, dropout=0.1,
            apply_spec_augment=True, mask_time_prob=0.3, mask_time_length=3, mask_time_min_masks=1, mask_feature_prob=0.3, mask_feature_length=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
            suppress_tokens=None, begin_suppress_tokens=None))
        self.net.gradient_checkpointing_enable()

    def loss(self, batch):
        return self.net(**batch).loss


# ------------------------------------------------------------------ 7. SimCLR: contrast within the batch, temperature learned and clamped

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
        return {"tokens": torch.cat([torch.as_tensor(row) for row, _ in items]), "offsets": torch.cumsum(lengths, 0) - lengths,
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
        return F.ctc_loss(self.out(hidden).log_softmax(-1).transpose(0, 1), text, lengths, text_lengths, zero_infinity=True)


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


# ------------------------------------------------------------------ 11. a mean teacher: parameters moved inside the loss

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


# ------------------------------------------------------------------ 12. a graph network

class Graphs:
    def __init__(self, size=48):
        draw = np.random.default_rng(8)
        self.graphs = []
        for _ in range(size):
            nodes = int(draw.integers(2, 6))
            self.graphs.append({"x": torch.tensor(draw.normal(size=(nodes, 4)), dtype=torch.float32),
                                "edges": torch.tensor(draw.integers(0, nodes, (2, nodes * 2))), "y": float(draw.normal())})

    def __len__(self):
        return len(self.graphs)

    def __getitem__(self, index):
        return self.graphs[index]

    def collate_fn(self, graphs):
        starts = np.cumsum([0] + [len(g["x"]) for g in graphs])
        return {"x": torch.cat([g["x"] for g in graphs]),
                "edges": torch.cat([g["edges"] + int(start) for g, start in zip(graphs, starts[:-1], strict=True)], 1),
                "graph": torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor([len(g["x"]) for g in graphs])),
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


# ------------------------------------------------------------------ 13. detection: a varying number of boxes, lists of dicts

class Boxes:
    def __init__(self, size=48):
        draw = np.random.default_rng(9)
        self.images = torch.tensor(draw.random((size, 1, 8, 8)), dtype=torch.float32)
        self.targets = [{"boxes": torch.tensor(draw.random((n, 4)), dtype=torch.float32), "labels": torch.tensor(draw.integers(0, 3, n))}
                        for n in draw.integers(0, 4, size)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.targets[index]

    def collate_fn(self, items):
        return tuple(zip(*items, strict=True))  # torchvision's


class Detector(nn.Module):
    """Focal-like classification of three slots, L1 over the boxes there are, divided by the number of boxes in the batch, as DETR does."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
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
            total = total + F.cross_entropy(logits[row], wanted, reduction="sum") + 5 * (boxes[row, :n] - target["boxes"]).abs().sum()
        return total / count


class DetectorSum(Detector):
    """Group norm: nothing else depends on who is in a batch together."""

    def __init__(self):
        super().__init__()
        self.trunk[1] = nn.GroupNorm(2, 8)

    def loss(self, batch):
        count = sum(len(t["labels"]) for t in batch[1])
        return super().loss(batch) * max(1, count), count


# ------------------------------------------------------------------ 14. VQ-VAE: a codebook in buffers, moved by averages of what was assigned to it

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


# ------------------------------------------------------------------ 15. quantiles, spectral norm, float64 columns, lazily built

class Wide:
    """float64 features and an int8 flag, as pandas gives them."""

    def __init__(self, size=48):
        draw = np.random.default_rng(10)
        self.x, self.flag, self.y = draw.normal(size=(size, 5)), draw.integers(0, 2, size).astype(np.int8), draw.normal(size=size)

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


# ------------------------------------------------------------------ 16. mixture of experts under autocast, noisy gates, auxiliary loss, int buffer

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


# ------------------------------------------------------------------ 17. mixup in the loss by NumPy's beta and Python's shuffle

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
        return {"x": torch.stack([torch.tensor(item["x"]).flip(0) for item in items]), "y": torch.tensor([int(item["y"]) for item in items])}


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
