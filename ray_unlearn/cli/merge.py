"""`ray-unlearn merge`: merges made by hand."""

from __future__ import annotations

import argparse
from typing import Any, cast

from ray_unlearn.cli.arguments import Commands, command, plugin_flag
from ray_unlearn.errors import InputError
from ray_unlearn.models.loading import DTYPES


def add(commands: Commands) -> None:
    """The command's arguments."""
    p = command(
        commands,
        _merge,
        "merge",
        "merge adapters or full checkpoints into a model directory",
        "merge --base M --adapters A B --method ties --density 0.8 --weights 1 1 --out merged",
    )
    p.add_argument("--base", metavar="M", help="(default: the recipe's)")
    p.add_argument("--adapters", nargs="+", metavar="A", help="adapter, snapshot or full model directories")
    p.add_argument("--recipe", metavar="FILE", help="merge.json, YAML, model card or merged model to make again")
    p.add_argument("--folder", metavar="DIR", help="what the recipe's members are relative to (default: the recipe's)")
    p.add_argument("--method", default="ties", help="(see: ray-unlearn merge-methods)")
    p.add_argument(
        "--density", type=_number_or_gradient, nargs="+", default=[1.0], metavar="D", help="one for all, or for each"
    )
    p.add_argument("--weights", type=_number_or_gradient, nargs="+", metavar="W", help="one for each (default: 1)")
    p.add_argument("--lambda", dest="lambda_", type=_number_or_gradient, default=1.0, metavar="L")
    p.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="divide by the weights (see methods)")
    p.add_argument("--rescale", action=argparse.BooleanOptionalAction, help="restore each delta's sum of magnitudes")
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="a number of a plugin's method; repeatable"
    )
    plugin_flag(p)
    p.add_argument("--dtype", choices=DTYPES, help="of the base and the model written (default: the recipe's, float32)")
    p.add_argument("--as-adapter", action="store_true", help="write a PEFT adapter; exact where the method is linear")
    p.add_argument("--rank", type=int, metavar="R", help="of the adapter (default: the members' sum)")
    p.add_argument("--out", required=True, metavar="DIR")
    p.epilog = f"{p.epilog}\n\nA number may be a gradient over depth: 1,0.5 falls from the first layer to the last."
    p.later = _own_flags


def _own_flags(p: argparse.ArgumentParser) -> None:
    """A flag for each number of a method's own."""
    from ray_unlearn.merging import MERGES, merge_options

    group = p.add_argument_group("a method's own numbers")
    for name, option in merge_options().items():
        readers = ", ".join(method for method, row in MERGES.items() if name in row.options)
        about = f"{option.meaning} (default {option.default}; {readers})"
        flag, place = f"--{name.replace('_', '-')}", f"option_{name}"
        group.add_argument(flag, type=cast("type[float]", option.hint), dest=place, metavar="X", help=about)


def _own_numbers(a: argparse.Namespace) -> dict[str, Any]:
    """What was given of a method's own numbers, by a flag of its name or by --option."""
    given = {name.removeprefix("option_"): value for name, value in vars(a).items() if name.startswith("option_")}
    numbers = {name: value for name, value in given.items() if value is not None}
    for text in a.option:
        name, sign, value = text.partition("=")
        if not sign:
            raise InputError(f"--option takes NAME=VALUE, got {text!r}.")
        numbers[name] = int(value) if value.isdecimal() else value
    return numbers


def _number_or_gradient(text: str) -> float | list[float]:
    """A number, or several with commas between: anchors over the layers."""
    values = [float(part) for part in text.split(",")]
    return values if len(values) > 1 else values[0]


def _merge(a: argparse.Namespace) -> int:
    from ray_unlearn.api.merging import merge, merge_by_recipe
    from ray_unlearn.progress import Progress

    if (a.recipe is None) == (a.adapters is None):
        raise InputError("give either --adapters A B ... or --recipe FILE.")
    common = {"dtype": a.dtype, "as_adapter": a.as_adapter, "rank": a.rank, "log": Progress().line}
    if a.recipe is not None:
        out = merge_by_recipe(a.recipe, a.base, a.out, folder=a.folder, **common)
    else:
        if a.base is None:
            raise InputError("--adapters needs --base, the model they change.")
        numbers = {"densities": a.density, "weights": a.weights, "lambda_": a.lambda_}
        numbers |= {"normalize": a.normalize, "rescale": a.rescale}
        out = merge(a.base, a.adapters, a.out, method=a.method, **numbers, **_own_numbers(a), **common)
    print(out)
    return 0
