"""merge.json: a recipe with where its base and members lie, so that the merge can be made again."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.merging.recipe import MergeRecipe
from ray_unlearn.models.loading import DTYPES
from ray_unlearn.schema import checked_value, one_of

MERGE_FILE = "merge.json"
CARD_BLOCK = re.compile(r"^## Merge recipe$.*?^(`{3,})yaml\n(?P<recipe>.*?)^\1$", re.MULTILINE | re.DOTALL)

ABOUT = {"base": str | None, "folder": str | None, "dtype": str | None, "member_trials": dict | None}
"""What stands in a file beside the recipe, with its types."""


@dataclass(frozen=True, kw_only=True)
class MergeFile:
    """A recipe as a file states it."""

    recipe: MergeRecipe
    base: str | None
    folder: Path | None
    """What members' names are relative to."""
    dtype: str = "float32"
    """Of the base as it is merged, and of the result."""

    def sources(self, folder: Path | None = None) -> dict[str, Path]:
        """Members' directories by name, looked for in `folder`, else in the plan's own."""
        place = folder or self.folder or Path()
        return {name: place / name for name in self.recipe.leaves()}


def merge_file(recipe: MergeRecipe, base: str, folder: Path | None = None, dtype: str = "float32") -> dict[str, object]:
    """The content of merge.json."""
    return {"base": base, **({"folder": str(folder)} if folder else {}), "dtype": dtype, **recipe.to_json()}


def read_merge_file(given: Path) -> MergeFile:
    """The recipe in a merge.json or YAML file, in a model card, or in a merged model's directory.

    Raises InputError where there is none.
    """
    path = given / MERGE_FILE if given.is_dir() else given
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".md":
            found = CARD_BLOCK.search(text)
            text = found["recipe"] if found else ""
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(f"no such recipe: {path}.") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} is neither JSON nor YAML: {error}.") from error
    if not isinstance(data, dict) or "members" not in data:
        raise InputError(f"{path} holds no merge recipe: a mapping with method, members, weights and densities.")
    about = {key: checked_value(hint, data.get(key), f"{path}: {key}") for key, hint in ABOUT.items()}
    dtype = about["dtype"] or "float32"
    one_of(f"dtype in {path}", dtype, DTYPES)
    recipe = MergeRecipe.from_json({key: value for key, value in data.items() if key not in ABOUT}, str(path))
    folder = Path(about["folder"]) if about["folder"] else None
    return MergeFile(recipe=recipe, base=about["base"], folder=folder, dtype=dtype)
