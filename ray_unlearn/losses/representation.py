"""Losses on hidden states. N masked tokens in row-major order, B rows of T tokens, H hidden entries."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_unlearn.losses.rows import mean, scatter_tokens
from ray_unlearn.losses.table import Method, mean_loss
from ray_unlearn.schema import Option, Range


def rmu(hidden: Tensor, control: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(hidden [N,H], control [B,H], mask [B,T]) -> []: squared distance of hidden states from their row's control.

    Mean over H, then as by `rows.mean`: Li et al. 2024 (arXiv 2403.03218), the forget loss.
    """
    wanted = control.repeat_interleave(mask.sum(1), dim=0)
    return mean(scatter_tokens((hidden - wanted).square().mean(-1), mask), mask, pool)


def hidden_mse(hidden: Tensor, ref_hidden: Tensor, mask: Tensor, pool: bool = False) -> Tensor:
    """(hidden [N,H], ref_hidden [N,H], mask [B,T]) -> []: squared distance from the untrained model's hidden states.

    Mean as in `rmu`: its retain term (arXiv 2403.03218).
    """
    return mean(scatter_tokens((hidden - ref_hidden).square().mean(-1), mask), mask, pool)


def control_vector(size: int, generator: torch.Generator) -> Tensor:
    """[size]: a unit vector with uniform entries of [0, 1) before scaling, so in the positive orthant."""
    vector = torch.rand(size, generator=generator)
    return vector / vector.norm()


def adaptive_coefficient(hidden: Tensor, scale: float) -> float:
    """(hidden [N,H]) -> scale times the mean norm: adaptive RMU (Dang et al. 2024, arXiv 2408.06223)."""
    return scale * float(hidden.float().norm(dim=-1).mean())


OPTIONS = {
    "rmu_layer": Option(
        hint=int | str,
        default=2,
        meaning="decoder layer whose output is steered: its index, or a regular expression for a module's whole name",
        search=Range(1, 3),  # a deeper model wants the range of its own layers
    ),
    "rmu_coefficient": Option(
        hint=float,
        default=2.0,
        above=0,
        meaning="length of the control vector; if adaptive, times the mean norm",
        search=Range(1.0, 50.0, log=True),
    ),
    "rmu_adaptive": Option(
        hint=bool,
        default=False,
        meaning="whether the coefficient is times the mean norm of the hidden states, taken anew in each epoch",
        search=(False, True),
    ),
}
LOSSES = {
    "rmu": mean_loss(compute=rmu, tensors=("hidden", "control", "mask")),
    "hidden_mse": mean_loss(compute=hidden_mse, tensors=("hidden", "ref_hidden", "mask")),
}
METHODS = {
    "rmu": Method(
        forget="rmu",
        retain=("hidden_mse",),
        formula="w_f |h - c u|^2_f + w_r |h - h_ref|^2_r, one random unit vector u for each task",
        source="Li et al. 2024 (arXiv 2403.03218); adaptive c: Dang et al. 2024 (arXiv 2408.06223)",
    ),
}
