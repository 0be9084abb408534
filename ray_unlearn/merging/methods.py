"""The table of merge methods: how a delta is thinned out, how the rest is joined, and what that is divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging import consensus
from ray_unlearn.merging.sparsify import breadcrumbs, drop_and_rescale, magprune, rescaled, trim
from ray_unlearn.schema import Option, Range
from ray_unlearn.tables import Table


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe's numbers for one tensor: gradients over depth are resolved. Names and meanings are mergekit's."""

    weights: Sequence[float]
    densities: Sequence[float]
    lambda_: float
    normalize: bool
    rescale: bool
    options: Mapping[str, float]
    """The method's own."""


Sparsify = Callable[[Tensor, float, Settings, torch.Generator], Tensor]
Consensus = Callable[[Tensor, Sequence[Tensor], Settings], Tensor]


@dataclass(frozen=True, kw_only=True)
class MergeMethod:
    """A merge method: sparsify each delta x consensus, with mergekit's defaults for normalize and rescale."""

    sparsify: Sparsify | None = None
    """(delta, density, settings, generator) -> delta; None keeps everything."""
    consensus: Consensus
    """(base, deltas, settings) -> delta."""
    normalize: bool = False
    rescale: bool = False
    parameters: tuple[str, ...] = ("weight", "lambda")
    """What of the numbers that methods share the method reads, by mergekit's names."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Its own numbers, by the names they have in a recipe, on the command line (`--epsilon`) and in the search. With a
    `seed` its masks are random."""
    check: Callable[[float, Mapping[str, float]], None] | None = None
    """(density, options): raises InputError where they do not go together."""
    densities: Range = Range(0.2, 1.0, step=0.05)
    """What the search draws a density from: a grid, so that a member is often wanted again at a density whose cuts are
    known."""
    weighted_mean: bool = False
    """Whether weights must be at least 0 and sum to more, normalised or not."""
    on_factors: bool = False
    """Whether LoRA's A and B are merged instead of deltas; members must then be adapters."""
    fewest: int = 1
    most: int | None = None
    formula: str
    source: str

    @property
    def random(self) -> bool:
        """Whether entries are dropped at random."""
        return "seed" in self.options

    @property
    def trims(self) -> bool:
        """Whether its sparsify is `trim`, whose cuts can be kept."""
        return self.sparsify is _by_magnitude

    @property
    def uses_density(self) -> bool:
        """Whether a density below 1 changes anything."""
        return "density" in self.parameters

    @property
    def uses_weights(self) -> bool:
        """Whether unequal weights change anything."""
        return "weight" in self.parameters

    @property
    def linear(self) -> bool:
        """Whether the merged delta is a weighted sum of the members', which LoRA can hold exactly."""
        return self.sparsify is None and self.consensus is _sum


def _by_magnitude(delta: Tensor, density: float, settings: Settings, generator: torch.Generator) -> Tensor:
    kept = trim(delta, density)
    return rescaled(kept, delta) if settings.rescale else kept


def _without_outliers(delta: Tensor, density: float, settings: Settings, generator: torch.Generator) -> Tensor:
    kept = breadcrumbs(delta, density, settings.options["gamma"])
    return rescaled(kept, delta) if settings.rescale else kept


def _at_random(delta: Tensor, density: float, settings: Settings, generator: torch.Generator) -> Tensor:
    return drop_and_rescale(delta, density, settings.rescale, generator)


def _by_rank_at_random(delta: Tensor, density: float, settings: Settings, generator: torch.Generator) -> Tensor:
    return magprune(delta, density, settings.options["epsilon"], settings.rescale, generator)


def _sum(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    return consensus.weighted_sum(deltas, settings.weights, settings.lambda_, settings.normalize)


def _election(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    return consensus.elect(deltas, settings.weights, settings.lambda_, settings.normalize)


def _arc(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    return settings.lambda_ * consensus.slerp(base, deltas, settings.weights)


def _sphere(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    return settings.lambda_ * consensus.karcher(base, deltas, settings.weights)


def _stock(base: Tensor, deltas: Sequence[Tensor], settings: Settings) -> Tensor:
    return settings.lambda_ * consensus.model_stock(deltas)


def _chances_in_bounds(density: float, options: Mapping[str, float]) -> None:
    epsilon = options["epsilon"]
    if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise InputError(
            f"della needs density - epsilon above 0 and density + epsilon below 1, got density {density} and epsilon "
            f"{epsilon}: lower epsilon."
        )


THINNED = ("weight", "density", "lambda", "normalize", "rescale")
SEED = Option(hint=int, default=0, meaning="of random masks")
_ROWS: dict[str, MergeMethod] = {
    "ties": MergeMethod(
        sparsify=_by_magnitude,
        consensus=_election,
        normalize=True,
        parameters=THINNED,
        formula="lambda * sum_agreeing(w_i top_density(d_i)) / sum_agreeing(w_i); sign elected by sum_i w_i top(d_i)",
        source="Yadav et al. 2023 (arXiv 2306.01708), weighted and per tensor as in mergekit's `ties`",
    ),
    "linear": MergeMethod(
        consensus=_sum,
        normalize=True,
        parameters=("weight", "lambda", "normalize"),
        formula="lambda * sum(w_i d_i) / sum(w_i)",
        source="weight averaging (Wortsman et al. 2022, arXiv 2203.05482) on deltas",
    ),
    "task_arithmetic": MergeMethod(
        consensus=_sum,
        parameters=("weight", "lambda", "normalize"),
        formula="lambda * sum(w_i d_i)",
        source="Ilharco et al. 2023 (arXiv 2212.04089)",
    ),
    "dare_ties": MergeMethod(
        sparsify=_at_random,
        consensus=_election,
        rescale=True,
        parameters=THINNED,
        options={"seed": SEED},
        formula="lambda * sum_agreeing(w_i m_i(d_i)); m_i keeps entries with chance density, then restores sum|d_i|",
        source="Yu et al. 2023 (arXiv 2311.03099), as in mergekit's `dare_ties`",
    ),
    "dare_linear": MergeMethod(
        sparsify=_at_random,
        consensus=_sum,
        rescale=True,
        parameters=THINNED,
        options={"seed": SEED},
        formula="lambda * sum(w_i m_i(d_i)); m_i keeps entries with chance density, then restores sum|d_i|",
        source="Yu et al. 2023 (arXiv 2311.03099), as in mergekit's `dare_linear`",
    ),
    "della": MergeMethod(
        sparsify=_by_rank_at_random,
        consensus=_election,
        normalize=True,
        rescale=True,
        parameters=THINNED,
        options={
            "epsilon": Option(
                hint=float,
                default=0.15,
                at_least=0,
                below=1,
                meaning="how far the chance to stay is from the density, at most",
            ),
            "seed": SEED,
        },
        check=_chances_in_bounds,
        densities=Range(0.2, 0.8, step=0.05),  # the chances at density -+ 0.15 stay within (0, 1)
        formula="as ties, with m_i(d_i): kept with a chance that rises with the rank in its row, density -+ epsilon",
        source="Deep et al. 2024 (arXiv 2406.11617), as in mergekit's `della`",
    ),
    "breadcrumbs": MergeMethod(
        sparsify=_without_outliers,
        consensus=_sum,
        parameters=THINNED,
        options={
            "gamma": Option(
                hint=float, default=0.01, at_least=0, below=1, meaning="share of the largest entries that is dropped"
            )
        },
        formula="lambda * sum(w_i m_i(d_i)); m_i drops the largest gamma and the smallest 1 - density - gamma",
        source="Davari and Belilovsky 2023 (arXiv 2312.06795), as in mergekit's `breadcrumbs`",
    ),
    "slerp": MergeMethod(
        consensus=_arc,
        weighted_mean=True,
        fewest=2,
        most=2,
        formula="lambda * (slerp(base + d_1, base + d_2, t) - base), t = w_2 / (w_1 + w_2)",
        source="Shoemake 1985, on whole weights as in mergekit's `slerp`",
    ),
    "karcher": MergeMethod(
        consensus=_sphere,
        weighted_mean=True,
        formula="lambda * (weighted Karcher mean of base + d_i, direction and length apart, - base)",
        source="Karcher 1977, on whole weights as in mergekit's `karcher`, with weights",
    ),
    "model_stock": MergeMethod(
        consensus=_stock,
        parameters=("lambda",),
        fewest=2,
        formula="lambda * t * mean(d_i), t = N c / (1 + (N - 1) c), c the mean cosine between the deltas",
        source="Jang et al. 2024 (arXiv 2403.19522), as in mergekit's `model_stock`",
    ),
    "ties_factors": MergeMethod(
        consensus=_election,  # not reached: the factors are merged, by factors.ties_factors
        parameters=("weight", "density", "lambda"),
        on_factors=True,
        formula="lambda * B A, with B and A each TIES of the adapters' own, sqrt|w_i s_i| each; NOT a merge of deltas",
        source="peft add_weighted_adapter(combination_type='ties'), as ZJUKLAB used it (arXiv 2503.21088)",
    ),
}
MERGES = Table("merge method", MergeMethod, _ROWS)


def merge_options() -> dict[str, Option]:
    """The own numbers of all methods, by name."""
    return {name: option for method in MERGES.values() for name, option in method.options.items()}
