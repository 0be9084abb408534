"""What is merged: adapters, snapshots and full checkpoints of one base, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.merging.factors import Factors
from ray_unlearn.models.adapters import read_adapter, shapes_of
from ray_unlearn.models.snapshot_files import ADAPTER_CONFIG, TENSORS_FILE, Files, read_snapshot, read_tensors
from ray_unlearn.models.stored_tensors import StoredTensors
from ray_unlearn.protocols import CausalLM

if TYPE_CHECKING:
    from typing_extensions import Buffer

NOT_MERGED = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "target_parameters",
    "alora_invocation_tokens",
)  # fmt: skip
"""Settings of an adapter under which its delta is not scaling * B A of linear layers."""

Source: TypeAlias = "Files | Path"
"""A member's files, or the directory of an adapter, a snapshot or a full checkpoint."""


@dataclass(frozen=True)
class Member:
    """A member's tensors by parameter name: LoRA's factors, or the whole tuned tensor."""

    name: str
    tensors: Mapping[str, Factors | Tensor]
    content: Callable[[], Iterable[Buffer]]
    """The member's bytes, in a fixed order."""

    @classmethod
    def of(cls, source: Source, base: CausalLM, name: str) -> Member:
        """Reads a member; `name` is for messages. Raises InputError for one of another base.

        Of a full checkpoint the parameters are merged; buffers, integer ones among them, stay the base's.
        """
        shapes = shapes_of(base)
        if isinstance(source, Path):
            if not ((source / ADAPTER_CONFIG).exists() or (source / TENSORS_FILE).exists()):
                return cls._checkpoint(source, shapes, set(base.state_dict()), name)
            source = read_snapshot(source)
        files = source
        tensors: Mapping[str, Factors | Tensor]
        if TENSORS_FILE in files:
            whole = read_tensors(files[TENSORS_FILE], f"{name}/{TENSORS_FILE}")
            for key, tensor in whole.items():
                _check_shape(name, key, tensor.shape, shapes)
            tensors = whole
        else:
            tensors = _factors(files, shapes, name)
        return cls(name, tensors, lambda: [part for file in sorted(files) for part in (file.encode(), files[file])])

    @classmethod
    def _checkpoint(cls, directory: Path, shapes: dict[str, torch.Size], known: set[str], name: str) -> Member:
        """A model directory, read tensor by tensor where its files name tensors as the base does."""
        from ray_unlearn.models.loading import load_model

        if not (directory / "config.json").exists():
            raise InputError(f"{directory} is no model directory, adapter or snapshot: it has no config.json.")
        stored: Mapping[str, Tensor] = StoredTensors(directory)
        if not any(key in stored for key in shapes):
            stored = {key: value.detach() for key, value in load_model(str(directory)).named_parameters()}
        missing = [key for key in shapes if key not in stored]
        if missing:
            raise InputError(
                f"{name} lacks {len(missing)} tensors of the base: {missing[:8]}. Merge whole checkpoints."
            )
        for key in stored:
            if key not in shapes and key in known:
                continue  # a buffer, or a tied tensor under its second name
            _check_shape(name, key, stored[key].shape, shapes)
            if not stored[key].is_floating_point():
                raise InputError(f"{name}: {key} has the type {stored[key].dtype}; only floating point can be merged.")
        kept = StoredTensors(directory, shapes) if isinstance(stored, StoredTensors) else stored
        paths = sorted(directory.glob("*.safetensors"))
        return cls(name, kept, lambda: [path.read_bytes() for path in paths])

    @cached_property
    def digest(self) -> str:
        """Of the content: what random masks are drawn from, so that a member's folder may have any name."""
        found = hashlib.sha256()
        for part in self.content():
            found.update(part)
        return found.hexdigest()[:16]

    def weights(self, key: str, base: Tensor) -> Tensor:
        """The member's own weights for one tensor, in the type of the base's."""
        entry = self.tensors[key]
        if isinstance(entry, Factors):
            exact = base.float()
            return exact.add(Factors(entry.b.to(base.device), entry.a.to(base.device), entry.scaling).dense()).to(base)
        return entry.to(base)

    def delta(self, key: str, base: Tensor) -> Tensor:
        """The delta of one tensor that a merge of full checkpoints would see: (base + delta) - base, rounded as such.

        `base` is float32; a tensor that the member does not touch has a delta of zeros.
        """
        entry = self.tensors.get(key)
        if entry is None:
            return torch.zeros_like(base)
        if isinstance(entry, Factors):
            change = Factors(entry.b.to(base.device), entry.a.to(base.device), entry.scaling).dense()
        else:
            change = entry.to(base.device).float() - base
        return change.add_(base).sub_(base)


def _factors(files: Files, shapes: Mapping[str, torch.Size], name: str) -> dict[str, Factors]:
    adapter = read_adapter(files, shapes, name)
    for key in NOT_MERGED:
        if adapter.config.get(key):
            raise InputError(f"{name}: adapters with {key}={adapter.config[key]!r} cannot be merged here.")
    if adapter.others:
        raise InputError(
            f"{name} changes more than linear layers through LoRA: {sorted(adapter.others)[:4]}. It cannot be merged "
            "here."
        )
    return {key: Factors(b.float(), a.float(), adapter.scaling) for key, (b, a) in adapter.pairs.items()}


def _check_shape(member: str, name: str, shape: torch.Size, shapes: dict[str, torch.Size]) -> None:
    if name not in shapes:
        raise InputError(
            f"{member} changes {name}, which the base does not have: it was made for another base, or for one "
            "whose embeddings are not tied."
        )
    if shapes[name] != shape:
        raise InputError(
            f"{member} changes {name} of shape {list(shape)}; the base's is {list(shapes[name])}: another base."
        )
