"""Files: written whole or not at all, claimed before work, digests, and what the package is shipped with."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from ray_unlearn.errors import DiskFullError, InputError

PACKAGE = Path(__file__).resolve().parent
"""This package's folder."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ROOM_TEXTS = (*map(os.strerror, NO_ROOM), "disk is full")
VERSIONED = ("ray-unlearn", "torch", "transformers", "peft", "deepspeed", "ray", "optuna", "mergekit")


def claim_file(path: str | Path | None) -> None:
    """Refuses, before any work, an output file that could not be written."""
    if path is None:
        return
    path = Path(path)
    if path.is_dir():
        raise InputError(f"the output {path} is a directory; give a file's name.")
    _claim_folder(path.absolute().parent)


def claim_files(outputs: Mapping[str, str | Path | None], inputs: Sequence[str | Path | None]) -> None:
    """claim_file of several outputs, by the names of their flags; none may be an input, a file of an input folder, or
    another output."""
    taken: dict[Path, str] = {}
    sources = [Path(source).expanduser().resolve() for source in inputs if source is not None]
    for flag, output in outputs.items():
        claim_file(output)
        if output is None:
            continue
        path = Path(output).expanduser().resolve()
        if path in sources or (path.exists() and any(source in path.parents for source in sources)):
            raise InputError(f"{flag} {output} is an input of this command and would be lost; give another file.")
        if path in taken:
            raise InputError(f"{flag} and {taken[path]} are both {output}; give each a file of its own.")
        taken[path] = flag


def claim_directory(path: str | Path, marker: str) -> Path:
    """An output directory, refused before any work when it could not be written, or holds what is not ours.

    What stands there is replaced, so it must be empty or bear the `marker` file of an earlier output.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise InputError(f"the output {path} is a file; give a directory's name.")
    if path.exists() and any(path.iterdir()) and not (path / marker).exists():
        raise InputError(
            f"{path} is not empty and was not written by this command; it is left alone. Give another --out."
        )
    _claim_folder(path.parent)
    return path


def _claim_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}. Give another --out.") from error


@contextmanager
def room_for(path: Path, needed: int | None = None) -> Iterator[None]:
    """Whatever writes at `path` in the block and fails for want of room raises a DiskFullError that says where, how
    much is free there and, where it is known, how many bytes were `needed`."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        place = next(folder for folder in (path, *path.parents) if folder.is_dir())
        wanted = "" if needed is None else f"{needed:,} bytes are needed, "
        raise DiskFullError(
            f"{path} could not be written, for want of room ({str(error).strip().splitlines()[-1]}): {wanted}"
            f"{shutil.disk_usage(place).free:,} are free in {place}. Make room there, or lift the quota or limit; the "
            "same command then goes on from what is finished."
        ) from error


def _is_full(error: BaseException) -> bool:
    """Whether an error, or what it comes from, is the system's: no space, quota, or file size."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # libraries in Rust or C++ raise errors of their own, with its text
        chain.append(error)
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__  # type: ignore[assignment]
    return any(
        (isinstance(link, OSError) and link.errno in NO_ROOM) or any(text in str(link) for text in NO_ROOM_TEXTS)
        for link in chain
    )


def write_text(path: Path, text: str) -> None:
    """Writes the whole file or nothing: a temporary name beside it, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, data = path.with_name(f".{path.name}.{os.getpid()}.tmp"), text.encode()
    try:
        with room_for(path, len(data)), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """write_text of readable JSON; NaN is refused, since a missing number is no number."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of the libraries that decide a result."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, or None for an installed one."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    answer = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    return answer.stdout.strip() or None


def private_folder(path: Path) -> Path:
    """The folder, made where it is not there; only this user can write or read it.

    Raises PermissionError for a link, a folder of another user, or one that others may write: what lies in a
    shared place under a known name may have been prepared by somebody else.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"{path} is a link, belongs to another user, or can be written by others: what lies there cannot be "
            "trusted. Remove it, or set TMPDIR to a folder of your own."
        )
    path.chmod(0o700)
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shipped(folder: str) -> Path:
    """The folder `jobs` or `search_spaces`: inside an installed package, or at the top of a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def read_json(path: Path, mend: str = "Restore it, or move it away.") -> dict[str, object] | None:
    """A JSON file's object, or None where there is no such file.

    Raises InputError, naming the file and how to `mend` it, for one that holds anything else; NaN is no number.
    """

    def refused(constant: str) -> object:
        raise ValueError(f"{constant} is no number")

    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=refused)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        what = str(error) if path.stat().st_size else "it is empty"
        raise InputError(f"{path} is not readable JSON: {what}. {mend}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {value!r:.60}. {mend}")
    return value


def weights_digest(path: str) -> str | None:
    """SHA-256 over the names and bytes of a model's or adapter's files; None for a hub id, which may change."""
    place = Path(path).expanduser()
    if not place.exists():
        return None
    content = hashlib.sha256()
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if file.is_file() and file.suffix != ".md":
            content.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                content.update(hashlib.file_digest(stream, "sha256").digest())
    return content.hexdigest()


def publish(temporary: Path, directory: Path) -> None:
    """Renames a finished directory to its final name; what stood there is kept until the new one is in place."""
    old = directory.with_name(f".{directory.name}.{os.getpid()}.old")
    if directory.exists():
        os.replace(directory, old)
    os.replace(temporary, directory)
    shutil.rmtree(old, ignore_errors=True)
