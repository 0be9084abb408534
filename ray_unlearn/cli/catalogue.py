"""`ray-unlearn methods`, `recipes`, `metrics`, `merge-methods`: what there is."""

from __future__ import annotations

import argparse
from typing import Any

from ray_unlearn.cli.arguments import Body, Commands, command, json_flag, plugin_flag, print_json


def _methods(a: argparse.Namespace) -> int:
    from ray_unlearn.config.trial import TrialConfig
    from ray_unlearn.losses import METHODS, OPTIONS, parameters_of
    from ray_unlearn.schema import to_dict

    defaults = to_dict(TrialConfig())
    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {
                key: OPTIONS[key].default if key in OPTIONS else defaults[key] for key in parameters_of(name)
            },
            "meanings": {key: OPTIONS[key].meaning for key in parameters_of(name) if key in OPTIONS},
            "source": method.source,
        }
        for name, method in METHODS.items()
    ]
    return _table(rows, a.json)


def _recipes(a: argparse.Namespace) -> int:
    from ray_unlearn.config.recipes import recipes
    from ray_unlearn.losses import METHODS

    rows = [
        {
            "name": name,
            "formula": METHODS[recipe.config["method"]].formula if recipe.config else "a merge of recipes' models",
            "parameters": recipe.config or recipe.merge,
            "system": recipe.system,
            "source": recipe.source,
            "origin": recipe.origin,
            "notes": recipe.notes,
            "unverified": recipe.unverified,
        }
        for name, recipe in recipes().items()
    ]
    return _table(rows, a.json)


def _metrics(a: argparse.Namespace) -> int:
    from ray_unlearn.metrics import METRICS

    rows = [
        {
            "name": name,
            "formula": metric.formula,
            "best": {part: str(value) for part, value in metric.best.items()},
            "range": " to ".join(f"{end:g}" for end in metric.range),
            "collapsed": metric.collapsed,
            "source": metric.source,
        }
        for name, metric in METRICS.items()
    ]
    return _table(rows, a.json)


def _merge_methods(a: argparse.Namespace) -> int:
    from ray_unlearn.merging import MERGES

    rows = [
        {
            "name": name,
            "formula": method.formula,
            "parameters": {
                **{name: 1.0 for name in ("weight", "density", "lambda") if name in method.parameters},
                **{name: option.default for name, option in method.options.items()},
                **{name: getattr(method, name) for name in ("normalize", "rescale") if name in method.parameters},
            },
            "source": method.source,
        }
        for name, method in MERGES.items()
    ]
    return _table(rows, a.json)


def _table(rows: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print_json(rows)
        return 0
    for row in rows:
        print(row["name"])
        for key in ("system", "formula", "parameters", "best", "range", "collapsed", "source", "notes", "unverified"):
            value = row.get(key)
            if value:
                text = ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
                print(f"  {key:11}{'; '.join(text) if isinstance(text, list) else text}")
    return 0


LISTS: tuple[tuple[str, str, Body], ...] = (
    ("methods", "unlearning methods", _methods),
    ("recipes", "published configurations", _recipes),
    ("metrics", "what a model can be scored by", _metrics),
    ("merge-methods", "merge methods", _merge_methods),
)


def add(commands: Commands) -> None:
    """The four commands' arguments."""
    for name, what, body in LISTS:
        p = command(commands, body, name, f"list {what} with formula, parameters, source", f"{name} --json")
        plugin_flag(p)
        json_flag(p)
