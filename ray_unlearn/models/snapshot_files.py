"""The files of a snapshot or an adapter that hold its weights: written with their digests, checked when read."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.files import room_for

if TYPE_CHECKING:
    from typing_extensions import Buffer

ADAPTER_FILE, ADAPTER_CONFIG, TENSORS_FILE = "adapter_model.safetensors", "adapter_config.json", "changed.safetensors"
PICKLE_FILE = "adapter_model.bin"
DIGESTS_FILE = "digests.json"
"""SHA-256 of each file of a snapshot, by name; snapshots of older runs have none."""

Files: TypeAlias = "Mapping[str, Buffer]"
"""A member's files by name: anything that has their bytes. Nothing is copied out of the buffer."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_snapshot(directory: Path, files: Mapping[str, bytes]) -> None:
    """A snapshot's directory with the digests of its files, whole or not at all."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with room_for(directory, sum(map(len, files.values()))):
            temporary.mkdir(parents=True)
            for name, data in files.items():
                (temporary / name).write_bytes(data)
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
            (temporary / DIGESTS_FILE).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_snapshot(directory: Path) -> dict[str, Buffer]:
    """The files of a snapshot or PEFT adapter directory that hold its weights, mapped into memory.

    Raises InputError for a directory that is neither, and for a file that is not what was written.
    """
    names = (ADAPTER_FILE, ADAPTER_CONFIG, TENSORS_FILE)
    files = {name: _mapped(directory / name) for name in names if (directory / name).exists()}
    _check_digests(directory, files)
    if TENSORS_FILE not in files and not {ADAPTER_FILE, ADAPTER_CONFIG} <= set(files):
        if (directory / PICKLE_FILE).exists():
            raise InputError(
                f"{directory} holds its weights in {PICKLE_FILE}, a pickle, which may run code when it is read; write "
                "it anew as safetensors: PeftModel.from_pretrained(...).save_pretrained(...)."
            )
        raise InputError(f"{directory} is no adapter or snapshot: it needs {ADAPTER_CONFIG} and {ADAPTER_FILE}.")
    return files


def _mapped(path: Path) -> Buffer:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: it was cut off. Copy or make it again.")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _check_digests(directory: Path, files: Files) -> None:
    path = directory / DIGESTS_FILE
    if not path.exists():
        return
    try:
        digests = json.loads(path.read_text(encoding="utf-8"))
        expected = {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}). {_REMEDY}") from error
    for name, digest in expected.items():
        if name not in files:
            raise InputError(f"{directory / name} is missing. {_REMEDY}")
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise InputError(f"{directory / name} is not what was written: its SHA-256 differs. {_REMEDY}")


_REMEDY = (
    "Copy the snapshot's folder back from where it is whole; else delete the records of its trial and of the merges "
    "that have it as a member, and run again: what is missing is made anew."
)


def read_tensors(data: Buffer, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file in memory, as views of it: files in Ray's store are shared by a node's actors.

    `where` is for messages. Raises InputError for what is no whole safetensors file, and for types other than floats.
    https://github.com/huggingface/safetensors#format
    """
    view = memoryview(data).cast("B")
    start = 8 + int.from_bytes(view[:8], "little")
    try:
        if start > len(view):
            raise ValueError("its header is cut off")
        header = json.loads(bytes(view[8:start]))
        header.pop("__metadata__", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes
            return {name: _tensor(view[start:], name, entry, where) for name, entry in header.items()}
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{where} is no whole safetensors file ({error}): copy or make it again.") from error


def _tensor(content: memoryview, name: str, entry: Mapping[str, Any], where: str) -> Tensor:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in DTYPES:
        raise InputError(f"{where}: {name} has the type {kind}; only floating-point weights ({', '.join(DTYPES)}).")
    dtype = DTYPES[kind]
    if not 0 <= begin <= end <= len(content) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of shape {shape} does not fill bytes {begin} to {end} of {len(content)}")
    if begin == end:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content[begin:end], dtype=dtype).view(shape)
