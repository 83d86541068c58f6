"""Optimizers' numbers: a block, one rule of each kind, a recipe's [optimizer]."""

from __future__ import annotations

from elastic.model.backend import UpdateRule

BLOCK = 1024
RULES = {
    "adamw": UpdateRule("adamw", 1e-2, 0.1, 1 / 7, 1, 0.9, 0.99, 1e-8, 0.9),
    "adam": UpdateRule("adam", 1e-2, 0.1, 1 / 7, 1, 0.9, 0.99, 1e-8, 0.9),
    "sgd": UpdateRule("sgd", 1e-1, 0.1, 1 / 7, 1, 0.9, 0.99, 1e-8, 0.9),
    "sgd without momentum": UpdateRule("sgd", 1e-1, 0.1, 1.0, 1, 0.9, 0.99, 1e-8, 0.0),
    "adagrad": UpdateRule("adagrad", 1e-2, 0.1, 1 / 7, 1, 0.9, 0.99, 1e-10, 0.9),
}
OPTIMIZER = {"name": "sgd", "lr": 1.0, "min_lr": 0.0, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0,
             "beta1": 0.9, "beta2": 0.9,
             "eps": 1e-8, "momentum": 0.0, "clip_norm": 0.0, "ema": 0.0}
