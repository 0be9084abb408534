"""Merges made by hand, or again from their recipes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.files import claim_directory, write_json, write_text
from ray_unlearn.merging import MERGES, MergeRecipe, merge_options
from ray_unlearn.merging.recipe import Graded
from ray_unlearn.models.loading import DTYPES, check_model, load_model
from ray_unlearn.schema import one_of


def merge(
    base: str,
    members: Sequence[str],
    out: str | Path,
    *,
    method: str = "ties",
    densities: Sequence[Graded] = (1.0,),
    weights: Sequence[Graded] | None = None,
    lambda_: Graded = 1.0,
    normalize: bool | None = None,
    rescale: bool | None = None,
    dtype: str | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    log: Callable[[str], None] = lambda line: None,
    **options: float,
) -> Path:
    """Merges adapters, snapshots or full checkpoints of one base into a model directory, or an adapter, at `out`.

    A density or weight for each member, or one for all; a list in place of a number is a gradient
    over depth. `normalize` and `rescale` are the method's own where None. `dtype`: what the base is taken and the model
    written in (default float32). `options` are the method's own numbers (`ray-unlearn merge-methods`); one that only
    other methods read is left out, with a line to `log`.
    """
    names = [str(member) for member in members]
    if len(set(names)) != len(names):
        raise InputError(f"a member is named twice: {names}. Give it once, with the sum of its weights.")
    recipe = MergeRecipe(
        method=method,
        members=names,
        weights=list(weights) if weights else [1.0] * len(names),
        densities=list(densities) * (len(names) if len(densities) == 1 else 1),
        lambda_=lambda_,
        normalize=normalize,
        rescale=rescale,
        options=_own(method, options, log),
    )
    if not MERGES[method].uses_density and any(density != 1.0 for density in recipe.densities):
        raise InputError(f"{method} thins nothing out: a density of {list(densities)} would change nothing; leave it.")
    return merge_by_recipe(recipe, base, out, dtype=dtype, as_adapter=as_adapter, rank=rank, log=log)


def _own(method: str, options: dict[str, float], log: Callable[[str], None]) -> dict[str, float]:
    """What the method reads of the options."""
    known, own = merge_options(), MERGES.find(method).options
    for name in options:
        if name not in known:
            raise unknown_name("parameter of a merge", name, known)
        if name not in own:
            log(f"{method} reads no {name}: it is left out")
    return {name: value for name, value in options.items() if name in own}


def merge_by_recipe(
    recipe: MergeRecipe | str | Path,
    base: str | None,
    out: str | Path,
    *,
    folder: str | Path | None = None,
    dtype: str | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """The merge that a recipe names, or the file or model card it stands in; the same bytes each time on one machine.

    `base`, `folder` (what members' names are relative to) and `dtype` (in which the base is taken and the model
    written) are the file's own where None.
    """
    from ray_unlearn.merging.recipe_file import MERGE_FILE, MergeFile, merge_file, read_merge_file
    from ray_unlearn.models.loading import check_adapter

    given = (
        MergeFile(recipe=recipe, base=None, folder=None)
        if isinstance(recipe, MergeRecipe)
        else read_merge_file(Path(recipe))
    )
    base = base or given.base
    if base is None:
        raise InputError("the recipe names no base model; give --base.")
    if rank is not None and not (as_adapter and rank >= 1):
        raise InputError(f"--rank belongs to --as-adapter and must be at least 1, got {rank}.")
    dtype = dtype or given.dtype
    one_of("dtype", dtype, DTYPES)
    place = claim_directory(out, MERGE_FILE)
    check_model(base)
    sources = given.sources(Path(folder) if folder else None)
    for source in sources.values():
        if not source.is_dir():
            raise InputError(f"no such member: {source}. Names in a recipe are relative to its folder; give --folder.")
        if (source / "adapter_config.json").exists():
            check_adapter(str(source), base)
    if as_adapter:
        _merge_into_adapter(given.recipe, base, dtype, sources, place, rank, log)
    else:
        from ray_unlearn.merging.writer import write_merge

        write_merge(given.recipe, base, sources, place, dtype)
    from ray_unlearn.report.card import merge_card

    content = merge_file(given.recipe, base, Path(folder) if folder else given.folder, dtype)
    write_text(place / "README.md", merge_card(content))
    write_json(place / MERGE_FILE, content)
    return place


def _merge_into_adapter(
    recipe: MergeRecipe,
    base: str,
    dtype: str,
    sources: dict[str, Path],
    place: Path,
    rank: int | None,
    log: Callable[[str], None],
) -> None:
    from ray_unlearn.merging.adapter import write_adapter

    report = write_adapter(recipe, load_model(base, dtype), base, sources, place, rank)
    if report.exact:
        log(f"an adapter of rank {report.rank}, exact")
    else:
        name, share = report.worst
        log(
            f"an adapter of rank {report.rank}: {report.error:.4f} of the merged delta's Frobenius norm is cut off, "
            f"at most {share:.4f} of one tensor's ({name})"
        )
