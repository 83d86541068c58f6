"""Modules of `transformers`, recomputing, and their data sets, written from the README's words alone."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence


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
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=dropout,
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
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction="sum"), (labels != -100).sum()


# ------------------------------------------------------------------ 2. BERT, masked tokens drawn in __getitem__, a sum
# and a weight

class Masked:
    """Fifteen percent of the tokens hidden, anew each time an item is asked for, by torch's own generator (as everybody
    does)."""

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
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=16))
        self.net.gradient_checkpointing_enable()

    def loss(self, batch):
        labels = batch["labels"]
        logits = self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction="sum"), (labels != -100).sum()


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
            vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, use_cache=False))
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
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16, use_cache=False, tie_word_embeddings=True))
        self.net.requires_grad_(False)
        for layer in self.net.model.layers:
            layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
            layer.self_attn.v_proj = LoRA(layer.self_attn.v_proj)
        self.net.gradient_checkpointing_enable()
        self.net.enable_input_require_grads()

    def loss(self, batch):
        return self.net(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


# ------------------------------------------------------------------ 5. ViT with augmentation by NumPy's and Python's
# global generators

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
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8,
            patch_size=4, num_labels=4,
            hidden_dropout_prob=0.1))
        self.net.gradient_checkpointing_enable()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss(self, batch):
        images, labels = batch
        return self.criterion(self.net(images).logits, labels)


# ------------------------------------------------------------------ 6. Whisper, SpecAugment inside (which draws from
# NumPy), layerdrop (from torch)

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
            vocab_size=40, num_mel_bins=8, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=12, max_target_positions=12,
            encoder_layerdrop=0.3, dropout=0.1,
            apply_spec_augment=True, mask_time_prob=0.3, mask_time_length=3, mask_time_min_masks=1,
            mask_feature_prob=0.3, mask_feature_length=2,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
            suppress_tokens=None, begin_suppress_tokens=None))
        self.net.gradient_checkpointing_enable()

    def loss(self, batch):
        return self.net(**batch).loss
