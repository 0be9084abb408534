"""Gradient masks: which trained tensors, or rows of them, an optimiser step may move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class MaskedGradient:
    """The gradients of a step's forget and retain terms, taken apart over its micro-batches, and their masked sum.

    The engine steps on a linear function of the parameters that has the masked sum for its gradient, so that
    DeepSpeed reduces, clips and steps as ever, in whatever form it keeps gradients. Gradients are taken outside of
    it, since an accumulated `.grad` would hold both splits, and since DeepSpeed lets nothing but its own `backward`
    through what its forward pass returns (engine.py `_backward_prologue`, 0.19): see `Engine.__call__`.
    """

    def __init__(self, engine: Engine, config: TrialConfig) -> None:
        self.engine, self.config = engine, config
        self.gradients: dict[str, list[Tensor]] = {}

    def add(self, by_split: Mapping[str, Tensor]) -> None:
        """Adds one micro-batch's gradients; `by_split` has the loss of each split that the step has terms of."""
        last = list(by_split)[-1:]
        for split, loss in by_split.items():
            found = torch.autograd.grad(
                loss, self.engine.parameters, retain_graph=[split] != last, allow_unused=True, materialize_grads=True
            )
            parts = [gradient / self.config.micro_batches for gradient in found]
            known = self.gradients.get(split)
            self.gradients[split] = parts if known is None else [a + b for a, b in zip(known, parts, strict=True)]

    def loss(self) -> Tensor:
        """[]: the function to step on. Collective: every rank adds the same splits, whatever rows it has."""
        averaged = {split: self.engine.average(gradients) for split, gradients in self.gradients.items()}
        masks = self._masks(averaged)
        total = torch.zeros((), device=self.engine.device)
        for index, parameter in enumerate(self.engine.parameters):
            gradient = torch.zeros_like(parameter)
            for gradients in averaged.values():
                gradient += gradients[index]
            total = total + (parameter * gradient if masks is None else parameter * (gradient * masks[index])).sum()
        return total

    def _masks(self, averaged: Mapping[str, Sequence[Tensor]]) -> list[Tensor] | None:
        """None where nothing is forgotten, as in a repair step: then all may move."""
        forget = averaged.get("forget")
        if forget is None or not any(bool(gradient.any()) for gradient in forget):
            return None
        if self.config.gradient_mask == "sure":
            return sure_mask(forget, self.config.mask_percentile)
        retain = averaged.get("retain") or [torch.zeros_like(gradient) for gradient in forget]
        return memflex_mask(forget, retain, self.config.mask_cosine, self.config.mask_percentile)
