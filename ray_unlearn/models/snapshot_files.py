"""The files of a snapshot or an adapter that hold its weights."""

from __future__ import annotations

from pathlib import Path

from ray_unlearn.errors import InputError

ADAPTER_FILE, ADAPTER_CONFIG, TENSORS_FILE = "adapter_model.safetensors", "adapter_config.json", "changed.safetensors"


def read_snapshot(directory: Path) -> dict[str, bytes]:
    """The files of a snapshot or PEFT adapter directory that hold its weights."""
    names = (ADAPTER_FILE, ADAPTER_CONFIG, TENSORS_FILE)
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).exists()}
    if TENSORS_FILE not in files and not {ADAPTER_FILE, ADAPTER_CONFIG} <= set(files):
        raise InputError(f"{directory} is no adapter or snapshot: it needs {ADAPTER_CONFIG} and {ADAPTER_FILE}.")
    return files
