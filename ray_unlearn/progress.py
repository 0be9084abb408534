"""Telling a person how far things are: a bar on a terminal, plain lines when output is piped."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Lines with the elapsed time; on a terminal also a bar over the steps announced by `total`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.began = time.monotonic()
        self.bar: Any = None

    def start(self, name: str, total: int, done: int = 0) -> None:
        """Begins a stage of `total` steps."""
        self.finish()
        if sys.stderr.isatty() and not self.quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, desc=name, file=sys.stderr, leave=False)

    def advance(self) -> None:
        """One step of the stage is done."""
        if self.bar is not None:
            self.bar.update()

    def finish(self) -> None:
        """Ends the stage's bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def line(self, text: str) -> None:
        """A line on stderr, above the bar where there is one."""
        if self.quiet:
            return
        stamped = f"[{time.monotonic() - self.began:6.0f} s] {text}"
        if self.bar is not None:
            self.bar.write(stamped, file=sys.stderr)
        else:
            print(stamped, file=sys.stderr, flush=True)
