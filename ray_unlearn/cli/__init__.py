"""The command line: a file for each command, with its arguments and its body."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from ray_unlearn.cli import catalogue, evaluate, merge, report, run, score, submit, target, train
from ray_unlearn.cli.arguments import Parser
from ray_unlearn.cluster.session import prepare_environment
from ray_unlearn.errors import InputError
from ray_unlearn.plugins import load_plugins

COMMANDS = (run, target, train, evaluate, score, merge, report, catalogue, submit)
"""In the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on a run-time failure, 2 on bad arguments or input."""
    arguments = build_parser().parse_args(argv)
    prepare_environment()
    try:
        if "plugin" in arguments:  # `run` and `submit` load those of their job
            load_plugins(arguments.plugin)
        return int(arguments.body(arguments))
    except InputError as error:
        return _fail(arguments, error, 2)
    except KeyboardInterrupt:
        if argv is not None:  # else it was said at once, by entry's handler
            _say_how_to_go_on(argv)
        return 1
    except Exception as error:
        return _fail(arguments, error, 1)


def build_parser() -> argparse.ArgumentParser:
    """All commands, each with an example in its help."""
    parser = Parser(prog="ray-unlearn", description="Distributed search and merging for LLM unlearning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    return parser


def _fail(arguments: argparse.Namespace, error: Exception, code: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    else:
        name = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        print(f"ray-unlearn: {name}{error}", file=sys.stderr)
    return code


def _say_how_to_go_on(argv: Sequence[str]) -> None:
    command = shlex.join(["ray-unlearn", *argv])
    print(f"ray-unlearn: interrupted; what was finished is kept. To go on:\n  {command}", file=sys.stderr, flush=True)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """Says how to go on before anything is taken down: Ray may end the process while it is."""
    for again in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(again) is _interrupted:
            signal.signal(again, signal.default_int_handler)  # said once
    _say_how_to_go_on(sys.argv[1:])
    raise KeyboardInterrupt


def entry() -> None:
    """The console script. SIGTERM and a closed terminal end it as Ctrl-C does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # not ignored, as by nohup
            signal.signal(number, _interrupted)
    sys.exit(main())
