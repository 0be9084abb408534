"""A run's directory has one owner at a time: a file that names it, touched while it lives."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_unlearn.errors import InputError

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 300.0
"""An owner on another host that has not touched its file for so long is taken for dead."""


@contextmanager
def owned(directory: Path, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Owns a directory, which exists, for the block: lock.json in it names host and process.

    Raises InputError where a live process owns it. An owner whose process is gone, or that runs on another host and
    has given no sign for five minutes, is followed, and `log` says so. A process that was taken for dead, as one that
    was suspended, is interrupted as by Ctrl-C when it wakes and finds a follower.
    """
    path, me = directory / "lock.json", _me()
    _take(path, me, log)
    lost, ended = threading.Event(), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                if _owner(path) != me:
                    lost.set()
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                os.utime(path)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise RuntimeError(f"{directory} was taken over by {_named(_owner(path))}; this process leaves it.") from None
    finally:
        ended.set()
        thread.join()
        with _exclusive(path) as file:
            if _read(file.read()) == me:
                file.truncate(0)


def _me() -> dict[str, object]:
    """This process, and this ownership of it: two in one process are two."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "since": time.time()}


def _started(pid: int) -> str | None:
    """When a process of this host began, in the kernel's ticks; None where there is none of that number.

    A number is used again, in a restarted container at once: a later process is not the owner.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    try:  # a system without /proc says no more than whether there is one
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _take(path: Path, me: dict[str, object], log: Callable[[str], None]) -> None:
    with _exclusive(path) as file:
        owner = _read(file.read())
        if owner is not None:
            silent = _now_at(path.parent) - path.stat().st_mtime
            if owner["host"] == me["host"]:
                alive = _started(owner["pid"]) == owner["started"]
            else:
                alive = silent < STALE_SECONDS
            if alive:
                raise InputError(
                    f"{path.parent} is in use by {_named(owner)}, which gave its last sign {max(silent, 0):.0f} s ago. "
                    f"Wait until it has ended, end it, or give another --out. If it is dead, remove {path}."
                )
            log(f"{path.parent}: {_named(owner)} ended without leaving it; going on from where it was")
        file.seek(0)
        file.truncate(0)
        file.write(json.dumps(me) + "\n")


def _now_at(directory: Path) -> float:
    """The time by the clock that the directory's files get theirs from, which may be another machine's."""
    with tempfile.TemporaryFile(dir=directory) as file:
        return os.fstat(file.fileno()).st_mtime


@contextmanager
def _exclusive(path: Path) -> Iterator[Any]:
    """The file, opened to read and write, while no other process reads or writes it so.

    It is never removed: a process that waits for it would then own a file that nobody else sees.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        with contextlib.suppress(OSError):  # a network file system without locks: the file's content must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
        file.flush()


def _owner(path: Path) -> dict[str, object] | None:
    with _exclusive(path) as file:
        return _read(file.read())


def _read(text: str) -> dict[str, Any] | None:
    """The owner that a file names; None for one that is empty, as after an owner that left, or torn."""
    try:
        owner = json.loads(text)
        return {"host": str(owner["host"]), "pid": int(owner["pid"]), **owner}
    except (ValueError, KeyError, TypeError):
        return None


def _named(owner: dict[str, object] | None) -> str:
    return "another process" if owner is None else f"process {owner['pid']} on {owner['host']}"
