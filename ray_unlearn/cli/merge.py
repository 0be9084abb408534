"""`ray-unlearn merge`: merges made by hand."""

from __future__ import annotations

import argparse

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
    p.add_argument("--epsilon", type=float, default=0.15, help="della: spread of the chance to stay")
    p.add_argument("--gamma", type=float, default=0.01, help="breadcrumbs: share of largest entries that go")
    p.add_argument("--seed", type=int, default=0, help="of random masks")
    plugin_flag(p)
    p.add_argument("--dtype", choices=DTYPES, help="of the base and the model written (default: the recipe's, float32)")
    p.add_argument("--as-adapter", action="store_true", help="write a PEFT adapter; exact where the method is linear")
    p.add_argument("--rank", type=int, metavar="R", help="of the adapter (default: the members' sum)")
    p.add_argument("--out", required=True, metavar="DIR")
    p.epilog = f"{p.epilog}\n\nA number may be a gradient over depth: 1,0.5 falls from the first layer to the last."


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
        options = {name: getattr(a, name) for name in ("normalize", "rescale", "epsilon", "gamma", "seed")}
        numbers = {"densities": a.density, "weights": a.weights, "lambda_": a.lambda_}
        out = merge(a.base, a.adapters, a.out, method=a.method, **numbers, **options, **common)
    print(out)
    return 0
