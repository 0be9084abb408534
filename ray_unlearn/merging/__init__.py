"""Merging: pure functions of weight deltas, one table of methods, and the recipe that names a merge."""

from __future__ import annotations

from ray_unlearn.merging.methods import MERGES, MergeMethod, merge_options
from ray_unlearn.merging.recipe import MergeRecipe

__all__ = ["MERGES", "MergeMethod", "MergeRecipe", "merge_options"]
