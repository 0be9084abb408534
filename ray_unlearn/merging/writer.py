"""Writing a merge as a full model directory through mergekit. The only owner of mergekit."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ray_unlearn.errors import InputError
from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.models import publish
from ray_unlearn.tuning import deltas, dense


def mergekit_config(recipe: MergeRecipe, base: str, members: Mapping[str, str]) -> dict[str, Any]:
    """The mergekit configuration of a recipe; `members` maps their names to full model directories.

    A linear merge of deltas is task arithmetic with mergekit's normalisation: the base counts
    nothing in it, and lambda scales the delta.
    """
    names = {"ties": ("ties", True), "linear": ("task_arithmetic", True), "task_arithmetic": ("task_arithmetic", False)}
    method, normalize = names[recipe.method]
    models = []
    for name, weight, density in zip(recipe.members, recipe.weights, recipe.densities, strict=True):
        parameters = {"weight": weight}
        if MERGES[recipe.method].uses_density:
            parameters["density"] = density
        models.append({"model": members[name], "parameters": parameters})
    return {
        "merge_method": method,
        "base_model": base,
        "dtype": "float32",
        "models": models,
        "parameters": {"normalize": normalize, "lambda": recipe.lambda_},
    }


def write_merge(
    recipe: MergeRecipe, base: Any, tokenizer: Any, members: Mapping[str, dict[str, bytes]], out: Path
) -> None:
    """Writes the merge of members (snapshot files by name) of a loaded base as a Hugging Face directory at `out`.

    Members become full checkpoints in a fresh temporary folder, since mergekit's own adapter cache
    is keyed by path and would return another run's tensors. The output is renamed into place.
    """
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as scratch:
        root = Path(scratch)
        if "+" in scratch or "@" in scratch:
            raise InputError(f"mergekit reads + and @ in a path as adapter and revision; write elsewhere than {out}.")
        base.save_pretrained(root / "base")
        paths = {}
        for index, name in enumerate(dict.fromkeys(recipe.members)):
            paths[name] = str(root / f"member-{index}")
            _write_member(base, members[name], name, Path(paths[name]))
        config = MergeConfiguration.model_validate(mergekit_config(recipe, str(root / "base"), paths))
        options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, lazy_unpickle=True)
        mergekit.merge.run_merge(config, str(root / "out"), options)
        LoaderCache().flush_all()
        LoaderCache.loaders.clear()  # a class-level dict: it would keep these files open, and answer for their paths
        gc.collect()
        tokenizer.save_pretrained(root / "out")
        base.generation_config.save_pretrained(root / "out")
        publish(root / "out", out)


def _write_member(base: Any, files: dict[str, bytes], name: str, directory: Path) -> None:
    """base + delta as a checkpoint; the loaded base is changed in place for the time of writing, and restored."""
    parameters = dict(base.named_parameters())
    kept = {}
    try:
        with torch.no_grad():
            for key, delta in deltas(files, base, name).items():
                kept[key] = parameters[key].detach().clone()
                parameters[key].add_(dense(delta).to(parameters[key]))
        base.save_pretrained(directory)
    finally:
        with torch.no_grad():
            for key, tensor in kept.items():
                parameters[key].copy_(tensor)
