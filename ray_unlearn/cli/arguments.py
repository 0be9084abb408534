"""What commands share: groups of arguments, and how scores and tables are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"
"""What commands are added to; argparse has no public name for it."""
Body = Callable[[argparse.Namespace], int]
"""What a command does with its arguments; returns the exit code."""


class Parser(argparse.ArgumentParser):
    """A parser that gets the flags of a table when its command is chosen: no other command then loads the table."""

    later: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's own, with the flags added first."""
        if self.later is not None:
            later, self.later = self.later, None
            later(self)
        return super().parse_known_args(args, namespace)


def command(commands: Commands, body: Body, name: str, what: str, example: str) -> Parser:
    """A command with its body, and an example in its help."""
    p: Parser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=f"example:\n  ray-unlearn {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.set_defaults(body=body)
    p.add_argument("--debug", action="store_true", help="show a traceback on errors")
    return p


def json_flag(p: argparse.ArgumentParser) -> None:
    """--json."""
    p.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")


def set_flag(p: argparse.ArgumentParser) -> None:
    """--set KEY=VALUE."""
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key (dotted); repeatable"
    )


def plugin_flag(p: argparse.ArgumentParser) -> None:
    """--plugin MODULE."""
    p.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="module, or path of a .py file, that adds rows to the tables (installed ones are found); repeatable",
    )


def skip_flag(p: argparse.ArgumentParser) -> None:
    """--skip-bad-rows."""
    p.add_argument("--skip-bad-rows", action="store_true", help="drop and count bad rows instead of refusing the file")


def model_and_data(p: argparse.ArgumentParser) -> None:
    """A model, its forget and retain set, and the precision."""
    p.add_argument("--model", required=True, metavar="M", help="model directory, .gguf file or hub id")
    p.add_argument("--forget", required=True, metavar="F", help=".jsonl or .parquet, or a directory with forget.*")
    p.add_argument("--retain", required=True, metavar="R", help=".jsonl or .parquet, or a directory with retain.*")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    skip_flag(p)


def evaluation_flags(p: argparse.ArgumentParser) -> None:
    """How a model is scored."""
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--mmlu-mode", default="letters", choices=["letters", "cloze"])
    p.add_argument("--mmlu-shots", type=int, default=5)


def print_json(value: object) -> None:
    """JSON on stdout."""
    print(json.dumps(value, indent=1, ensure_ascii=False))


def evaluation_settings(a: argparse.Namespace) -> dict[str, Any]:
    """What evaluation_flags were given, by the names of EvalSettings."""
    return {
        "max_new_tokens": a.max_new_tokens,
        "batch_size": a.batch_size,
        "mmlu_mode": a.mmlu_mode,
        "mmlu_shots": a.mmlu_shots,
    }
