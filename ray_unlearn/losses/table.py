"""What a loss and a method are: rows of the tables LOSSES and METHODS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_unlearn.errors import unknown_name

TENSORS = tuple(
    "mask logps ref_logps logits ref_logits noise targets hidden ref_hidden control alt_mask alt_logps alt_ref_logps"
    .split()
)  # fmt: skip
"""What a loss may be called with: see Loss.tensors."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss and what it is called with."""

    compute: Callable[..., object]
    tensors: tuple[str, ...]
    """Its positional arguments, in order, by name. With B rows of T predicted tokens, N of which the mask shows,
    V entries of the vocabulary and H of a hidden state:
    mask, logps, ref_logps [B,T]; logits, ref_logits, noise [N,V]; targets [N]; hidden, ref_hidden [N,H];
    control [B,H]; alt_mask, alt_logps, alt_ref_logps [B,T] of the rows' alternative answers."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Keyword argument -> the name it has in a configuration."""
    part: str = "retain"
    """On retain rows: `retain` or `kl`, which decides the weight (`retain_weight`, `kl_weight`), the tokens
    (`retain_on`, `kl_on`) and the name in a trial's course."""
    pools: Callable[[Mapping[str, object]], bool] = lambda options: False
    """Whether, under these options, tokens are pooled over the batch: its rows must then stay together."""

    def __post_init__(self) -> None:
        for name in self.tensors:
            if name not in TENSORS:
                raise unknown_name("tensor of a loss", name, TENSORS)

    @property
    def needs_reference(self) -> bool:
        """Whether it needs a forward pass of the untrained model; its log-probabilities of the rows are cached."""
        return "ref_logits" in self.tensors or "ref_hidden" in self.tensors


def mean_loss(
    compute: Callable[..., object], tensors: tuple[str, ...], options: Mapping[str, str] | None = None, **more: Any
) -> Loss:
    """A Loss that is a mean of values of tokens, and takes `pool` as `rows.mean` does."""
    return Loss(
        compute=compute,
        tensors=tensors,
        options={**(options or {}), "pool": "pool_tokens"},
        pools=lambda chosen: bool(chosen["pool_tokens"]),
        **more,
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: the loss of the forget rows and the losses of the retain rows, by name in LOSSES."""

    forget: str
    retain: tuple[str, ...] = ()
    formula: str
    source: str
    alternative: str | None = None
    """The other answer that each forget row comes with: `refusal`, one of REFUSALS, or `given` in the data."""
    weighting: str = "fixed"
    """Row of WEIGHTINGS: how the weight of the cross-entropy on retain rows moves during a trial."""
    negates: bool = False
    """Whether a snapshot is the untrained model minus `negation` times what training added."""
