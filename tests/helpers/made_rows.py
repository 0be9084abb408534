"""Rows and an engine without DeepSpeed, for tests of the loss alone."""

from __future__ import annotations

import random

import torch

from ray_unlearn.data.tokens import Encoded
from ray_unlearn.losses import METHODS
from ray_unlearn.training.dataloader import TrainingRow, token_logps

WEIGHTS = {"forget_weight": 0.7, "retain_weight": 1.3, "kl_weight": 2.1, "forget_on": "document"}


PAD = 1


class FakeEngine:
    """What an objective needs of an engine: the module, its device, a forward pass; it counts the passes' rows."""

    stage = 0

    def __init__(self, module):
        self.module, self.device, self.rows = module, torch.device("cpu"), 0

    def __call__(self, **inputs):
        self.rows += len(inputs["input_ids"])
        return self.module(**inputs)


class OneWorker:
    """The only rank."""

    rank, world = 0, 1

    def gather(self, items):
        return items

    def agree(self, value):
        return value


def some_rows(tiny, split, count, seed, references=True):
    """Random rows of differing lengths; the reference's log-probabilities come with them."""
    rng = random.Random(seed)
    size = len(tiny.tokenizer)
    rows = []
    for number in range(count):
        length = rng.randint(4, 9)
        tokens = Encoded(tuple(rng.randrange(size) for _ in range(length)), rng.randint(1, length - 2))
        reference = token_logps(tiny.model, [tokens], PAD)[0] if references else None
        rows.append(TrainingRow(split, tokens, f"Task{number % 2 + 1}", reference))
    return rows


def batch_for(tiny, method, forget=3, retain=4):
    rows = some_rows(tiny, "forget", forget, 1)
    if METHODS[method].alternative:
        rows += some_rows(tiny, "alternative", forget, 2)
    return rows + some_rows(tiny, "retain", retain, 3)


def terms_of(objective, rows, repair=False):
    splits = {row.split for row in rows}
    return objective.terms("forget" in splits, "retain" in splits, repair)


WHOLE = {"forget": 1.0, "retain": 1.0}


class _AdapterOff:
    def __init__(self, tuned):
        self.tuned = tuned

    def __call__(self, **inputs):
        with torch.no_grad(), self.tuned.model.disable_adapter():
            return self.tuned.model(**inputs)
