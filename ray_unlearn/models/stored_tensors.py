"""A model directory's tensors, read one at a time from its safetensors files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name over all shards of a directory; empty where there is no directory or no safetensors in it.

    The files are mapped into memory and stay open, so that one that is replaced does not change under
    a reader, and a tensor costs no memory of this process before it is copied. `names` restricts them.
    """

    def __init__(self, directory: Path, names: Iterable[str] | None = None) -> None:
        self._files: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
            file = self._stack.enter_context(safe_open(path, "pt"))
            self._files |= dict.fromkeys(file.keys(), file)
        if names is not None:
            self._files = {name: self._files[name] for name in names if name in self._files}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)
