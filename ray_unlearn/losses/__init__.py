"""Unlearning losses: pure functions of tensors to a scalar, and the table of methods made of them.

A family of losses is a file; its rows of the tables stand at its end.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray_unlearn.losses import ascent, distillation, preference, representation, weighting
from ray_unlearn.losses.table import Loss, Method
from ray_unlearn.losses.weighting import WEIGHTINGS, Weighting
from ray_unlearn.schema import Option
from ray_unlearn.tables import Table


def _check_loss(loss: Loss) -> None:
    for option in loss.options.values():
        OPTIONS.find(option)


def _check_method(method: Method) -> None:
    for loss in (method.forget, *method.retain):
        LOSSES.find(loss)


_FAMILIES = (ascent, preference, distillation, representation)
OPTIONS = Table(
    "option", Option, {name: option for family in (*_FAMILIES, weighting) for name, option in family.OPTIONS.items()}
)
"""Every method parameter that a configuration may set, beyond the fields that all methods share."""
LOSSES = Table(
    "loss", Loss, {name: loss for family in _FAMILIES for name, loss in family.LOSSES.items()}, check=_check_loss
)
METHODS = Table(
    "method",
    Method,
    {name: method for family in _FAMILIES for name, method in family.METHODS.items()},
    check=_check_method,
)


def losses_of(method: str) -> list[Loss]:
    """The losses of a method: the forget rows', then the retain rows'."""
    row = METHODS[method]
    return [LOSSES[name] for name in (row.forget, *row.retain)]


def options_of(method: str) -> list[str]:
    """Names in OPTIONS that a method reads."""
    names = [name for loss in losses_of(method) for name in loss.options.values()]
    names += WEIGHTINGS[METHODS[method].weighting][1]
    if any("hidden" in loss.tensors for loss in losses_of(method)):
        names += representation.OPTIONS
    return list(dict.fromkeys(names))


def parameters_of(method: str) -> list[str]:
    """Fields of TrialConfig and names in OPTIONS that a method reads, beyond those that every method reads."""
    parts = [LOSSES[name].part for name in METHODS[method].retain]
    shared = ["forget_weight", "forget_on", *(f"{part}_{field}" for part in parts for field in ("weight", "on"))]
    negated = ["negation"] if METHODS[method].negates else []
    return list(dict.fromkeys([*shared, *negated, *options_of(method)]))


def pools(method: str, options: Mapping[str, object]) -> bool:
    """Whether the method, under these options, pools tokens over a batch, whose rows must then stay together."""
    return any(loss.pools(options) for loss in losses_of(method))


def make_weighting(method: str, weight: float, options: Mapping[str, object]) -> Weighting:
    """The state that says the retain term's weight, step by step."""
    made: Weighting = WEIGHTINGS[METHODS[method].weighting][0](weight, options)
    return made


__all__ = [
    "LOSSES",
    "METHODS",
    "OPTIONS",
    "Loss",
    "Method",
    "Option",
    "Weighting",
    "losses_of",
    "make_weighting",
    "options_of",
    "parameters_of",
    "pools",
]
