"""From the driver's files to what a worker keeps in memory, on any node: models travel by path or by bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.files import private_folder
from ray_unlearn.plugins import load_in_worker
from ray_unlearn.records import Example


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a worker finds the base model: a path or hub id it can read itself, or the files' bytes."""

    path: str
    files: dict[str, bytes] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def of(cls, path: str, shared: bool) -> ModelSource:
        """The source of a model; its files are read here unless the workers can read `path` (shared, or a hub id)."""
        place = Path(path)
        if shared or not place.exists():
            return cls(path=str(place.resolve()) if place.exists() else path)
        names = sorted(place.iterdir()) if place.is_dir() else [place]
        files = {name.name: name.read_bytes() for name in names if name.is_file()}
        content = hashlib.sha256()
        for name in sorted(files):
            content.update(name.encode() + b"\0" + files[name])
        suffix = "" if place.is_dir() else place.suffix
        return cls(path=f"model{suffix}", files=files, digest=content.hexdigest()[:16])

    def local(self) -> str:
        """A path on this node; bytes are unpacked once per node, whole or not at all."""
        if not self.files:
            return self.path
        root = private_folder(Path(tempfile.gettempdir()) / f"ray_unlearn-{os.getuid()}-models")
        place = root / self.digest
        if place.exists() and not self._is_whole(place):
            shutil.rmtree(place)
        if not place.exists():
            temporary = Path(tempfile.mkdtemp(dir=root))
            for name, data in self.files.items():
                (temporary / name).write_bytes(data)
            try:
                os.replace(temporary, place)
            except OSError:  # another worker of this node was faster
                shutil.rmtree(temporary, ignore_errors=True)
        single = next(iter(self.files)) if len(self.files) == 1 and self.path.endswith(".gguf") else None
        return str(place / single) if single else str(place)

    def _is_whole(self, place: Path) -> bool:
        """Whether the folder holds these files and their bytes, and no links."""
        files = {path.name: path for path in place.iterdir()}
        return files.keys() == self.files.keys() and all(
            not path.is_symlink() and path.is_file() and path.read_bytes() == self.files[name]
            for name, path in files.items()
        )


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a worker needs to build its WorkerState, as one object that travels through Ray's object store."""

    model: ModelSource
    forget: Sequence[Example]
    retain: Sequence[Example]
    eval_set: EvalSet
    eval_settings: EvalSettings
    dtype: str
    utility_floor: float


def open_worker_state(spec: WorkerSpec | Any, device: str = "cpu") -> Any:
    """Loads what the spec names; a WorkerState in this process."""
    import ray

    from ray_unlearn.models.loading import load_model, load_tokenizer
    from ray_unlearn.training.worker import WorkerState

    load_in_worker()
    if isinstance(spec, ray.ObjectRef):
        spec = ray.get(spec)
    path = spec.model.local()
    model = load_model(path, spec.dtype).to(device).requires_grad_(False)
    return WorkerState(
        model=model,
        tokenizer=load_tokenizer(path),
        forget=spec.forget,
        retain=spec.retain,
        eval_set=spec.eval_set,
        eval_settings=spec.eval_settings,
        dtype=spec.dtype,
        utility_floor=spec.utility_floor,
    )
