"""Gradient masks: which trained tensors, or rows of them, an optimiser step may move."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.training.engine import Engine


def sure_mask(forget: Sequence[Tensor], percentile: float) -> list[Tensor]:
    """Gradients of the forget loss -> 0/1 masks that broadcast over them: rows (dim 0) whose norm is salient.

    A row is salient when its L2 norm is at or above the percentile over the rows of all tensors; a
    row without any gradient never is. SURE at neuron level, as in zjunlp/unlearn; its code takes
    the saliency of a fresh gradient, never of an accumulated one.
    """
    norms = [gradient.float().reshape(gradient.shape[0], -1).norm(dim=1) for gradient in forget]
    threshold = torch.quantile(torch.cat(norms), percentile / 100)
    kept = [(norm >= threshold) & (norm > 0) for norm in norms]
    return [
        mask.reshape(-1, *[1] * (gradient.dim() - 1)).to(gradient.dtype)
        for mask, gradient in zip(kept, forget, strict=True)
    ]


def memflex_mask(forget: Sequence[Tensor], retain: Sequence[Tensor], cosine: float, percentile: float) -> list[Tensor]:
    """Gradients of the forget and retain losses -> a 0/1 scalar for each tensor: the region that may move.

    A tensor is in it when the cosine of its two gradients is below `cosine` and its mean absolute
    forget gradient at or above the percentile over tensors (MemFlex, Tian et al. 2024, arXiv
    2407.01920, has a fixed magnitude, 6e-4, which a percentile replaces since it depends on the model's size).
    """
    magnitudes = torch.stack([gradient.float().abs().mean() for gradient in forget])
    cosines = torch.stack(
        [
            torch.nn.functional.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0)
            for a, b in zip(forget, retain, strict=True)
        ]
    )
    region = (cosines < cosine) & (magnitudes >= torch.quantile(magnitudes, percentile / 100)) & (magnitudes > 0)
    return [inside.to(gradient.dtype) for inside, gradient in zip(region, forget, strict=True)]


class Saliency:
    """Gradients of the forget and the retain loss apart, over a step's micro-batches, and the mask they make.

    They are taken beside `.grad`, never in it: an accumulated gradient would hold both.
    """

    def __init__(self, engine: Engine, config: TrialConfig) -> None:
        self.engine, self.config = engine, config
        self.splits = {"none": (), "sure": ("forget",), "memflex": ("forget", "retain")}[config.gradient_mask]
        self.gradients: dict[str, list[Tensor]] = {}

    def add(self, by_split: dict[str, Tensor]) -> None:
        """Adds one micro-batch's gradients; the graph stays for the backward pass."""
        for split in self.splits:
            new = torch.autograd.grad(
                by_split[split], self.engine.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            known = self.gradients.get(split)
            self.gradients[split] = list(new) if known is None else [a + b for a, b in zip(known, new, strict=True)]

    def apply(self) -> None:
        """Keeps of the step's gradients what the mask lets through; a repair step is not masked."""
        if not self.splits:
            return
        averaged = {split: self.engine.average(gradients) for split, gradients in self.gradients.items()}
        if not any(bool(gradient.any()) for gradient in averaged["forget"]):  # of all ranks: all of them return here
            return
        if self.config.gradient_mask == "sure":
            masks = sure_mask(averaged["forget"], self.config.mask_percentile)
        else:
            masks = memflex_mask(
                averaged["forget"], averaged["retain"], self.config.mask_cosine, self.config.mask_percentile
            )
        self.engine.mask(masks)
