"""Recipes over the members of conftest.py, and what they come to in the plainest way."""

from __future__ import annotations

import torch

from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.merging.members import Member


def written_by(method):
    if MERGES[method].on_factors:
        return MergeRecipe(method=method, members=["lora-a", "lora-c"], weights=[0.4, 1.0], densities=[0.5, 0.8])
    names = ["lora-a", "full", "lora-b"][: MERGES[method].most]
    equal = not MERGES[method].uses_weights
    return MergeRecipe(
        method=method,
        members=names,
        weights=[1.0] * len(names) if equal else [0.4, [1.0, 0.5], 0.7][: len(names)],
        densities=[0.5, 0.5, 0.8][: len(names)],
        lambda_=0.9,
    )


RECIPES = [written_by(method) for method in MERGES]


NESTED = MergeRecipe(
    method="dare_ties",
    members=["merge-0000", "lora-b"],
    weights=[1.0, 1.0],
    densities=[0.5, 0.9],
    merges={"merge-0000": MergeRecipe(members=["full", "lora-a"], weights=[1.0, 1.0], densities=[0.8, 0.8])},
)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def deltas_of(recipe, bench, members, name):
    """What each member adds to one tensor, in the plainest way."""
    base = bench.model.get_parameter(name)
    found = []
    for member in recipe.members:
        entry = Member.of(members[member], bench.model, member).tensors.get(name)
        if entry is None:
            found.append(torch.zeros_like(base))
        else:
            found.append(entry - base if isinstance(entry, torch.Tensor) else entry.scaling * (entry.b @ entry.a))
    return found
