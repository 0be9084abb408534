"""Writing a merge as a PEFT adapter: exact where LoRA can hold it, else truncated, with the error."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging.combine import Combiner, finite
from ray_unlearn.merging.factors import Factors, concatenated, truncated
from ray_unlearn.merging.members import Source
from ray_unlearn.merging.methods import MERGES
from ray_unlearn.merging.recipe import MergeRecipe, depth_of
from ray_unlearn.models.snapshot_files import ADAPTER_CONFIG, ADAPTER_FILE
from ray_unlearn.protocols import CausalLM


@dataclass(frozen=True, kw_only=True)
class AdapterReport:
    """What a merge lost by becoming an adapter."""

    rank: int
    exact: bool
    """Whether the method is linear in the deltas, so that nothing was cut off (rounding aside)."""
    error: float
    """Frobenius norm of what was cut off, over that of the merged delta, all tensors together."""
    worst: tuple[str, float]
    """The tensor with the largest such share."""


def write_adapter(
    recipe: MergeRecipe, base: CausalLM, base_name: str, members: Mapping[str, Source], out: Path,
    rank: int | None = None,
) -> AdapterReport:  # fmt: skip
    """Writes the merge over a loaded base as a PEFT adapter of one rank at `out`, scaling 1.

    Linear methods over adapters are held exactly, by rank concatenation (unless `rank` asks for
    less), as is `ties_factors`; anything else is cut to `rank` (default: the sum of the members' own)
    by singular values. Raises InputError where the merge changes anything but matrices.
    """
    combiner = Combiner(base)
    for name in recipe.leaves():
        combiner.add(name, members[name])
    parameters = dict(base.named_parameters())
    linear = {f"{name}.weight" for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    touched = [name for name in combiner.touched(recipe) if name in linear]
    other = [name for name in combiner.touched(recipe) if name not in linear]
    other = [name for name in other if combiner.merged(recipe, name, parameters[name].detach().float()).any()]
    if other:
        raise InputError(
            f"an adapter holds linear layers only; the merge changes {other[:8]}: write the model instead."
        )
    found: dict[str, Factors] = {}
    lost: dict[str, tuple[float, float]] = {}
    exact = _exact(recipe, combiner) and rank is None
    for name in touched:
        if exact:
            found[name] = _whole(recipe, combiner, name)
            continue
        weights = parameters[name].detach().float()
        delta = combiner.merged(recipe, name, weights)
        found[name], cut = truncated(delta, rank or _default_rank(recipe, combiner, delta))
        lost[name] = (cut, float(delta.double().square().sum()))
    _save(found, base_name, out)
    shares = {name: math.sqrt(cut / whole) for name, (cut, whole) in lost.items() if whole > 0}
    worst = max(shares.items(), key=lambda item: item[1], default=("", 0.0))
    total = sum(whole for _, whole in lost.values())
    return AdapterReport(
        rank=max(len(factors.a) for factors in found.values()),
        exact=exact,
        error=math.sqrt(sum(cut for cut, _ in lost.values()) / total) if total else 0.0,
        worst=worst,
    )


def _exact(recipe: MergeRecipe, combiner: Combiner) -> bool:
    method = MERGES[recipe.method]
    entries = [e for name in recipe.leaves() for e in combiner.members[name].tensors.values()]
    adapters = all(isinstance(entry, Factors) for entry in entries)
    return adapters and not recipe.merges and (method.linear or method.on_factors)


def _whole(recipe: MergeRecipe, combiner: Combiner, name: str) -> Factors:
    if MERGES[recipe.method].on_factors:
        return combiner.merged_factors(recipe, name)
    settings = recipe.at(depth_of(name, combiner.layers))
    parts, weights = [], []
    for member, weight in zip(recipe.members, settings.weights, strict=True):
        entry = combiner.members[member].tensors.get(name)
        if isinstance(entry, Factors):
            parts.append(entry)
            weights.append(weight)
    # Members that do not touch the tensor count in the divisor: their delta is zero.
    scale = settings.lambda_ / (sum(settings.weights) if settings.normalize else 1.0)
    return concatenated(parts, weights, scale, normalize=False)


def _default_rank(recipe: MergeRecipe, combiner: Combiner, delta: Tensor) -> int:
    ranks = []
    for name in recipe.leaves():
        entries = [e for e in combiner.members[name].tensors.values() if isinstance(e, Factors)]
        ranks.append(max((len(entry.a) for entry in entries), default=0))
    if not all(ranks):
        raise InputError("a member is no adapter, so the merge has no rank of its own: give --rank.")
    return min(sum(ranks), *delta.shape)


def _save(found: Mapping[str, Factors], base_name: str, out: Path) -> None:
    """An adapter directory, whole or not at all; tensors of lesser rank are padded with zeros."""
    from peft import LoraConfig

    from ray_unlearn.files import publish

    rank = max(len(factors.a) for factors in found.values())
    state = {}
    for name, factors in found.items():
        missing = rank - len(factors.a)
        key = f"base_model.model.{name.removesuffix('.weight')}"
        state[f"{key}.lora_A.weight"] = torch.nn.functional.pad(factors.a, (0, 0, 0, missing)).contiguous()
        b = factors.b * factors.scaling
        if not (finite(factors.a) and finite(b)):
            raise InputError(f"the adapter's {name} would hold NaN or infinity: the recipe's numbers are too large.")
        state[f"{key}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing)).contiguous()
    targets = sorted(name.removesuffix(".weight") for name in found)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=base_name,
        inference_mode=True,
    ).to_dict()  # fmt: skip
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(state, temporary / ADAPTER_FILE, metadata={"format": "pt"})
    (temporary / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=1, sort_keys=True, default=str) + "\n")
    publish(temporary, out)
