"""Token statistics of one row, one token at a time."""

from __future__ import annotations

import math

import torch


def slow_signals(model, row):
    """By sums over the vocabulary in plain floats."""
    logits = model(input_ids=torch.tensor([row.ids])).logits[0].double()
    own, matches, means, deviations = [], [], [], []
    for at in range(row.prompt, len(row.ids)):
        weights = [math.exp(x) for x in logits[at - 1].tolist()]
        probs = [weight / sum(weights) for weight in weights]
        mean = sum(p * math.log(p) for p in probs)
        own.append(math.log(probs[row.ids[at]]))
        matches.append(max(range(len(probs)), key=probs.__getitem__) == row.ids[at])
        means.append(mean)
        deviations.append(math.sqrt(sum(p * (math.log(p) - mean) ** 2 for p in probs)))
    return own, matches, means, deviations
