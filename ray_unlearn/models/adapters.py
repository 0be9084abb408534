"""Adapters: what a PEFT directory must hold before it is loaded onto a base or merged into it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.models.snapshot_files import ADAPTER_CONFIG, ADAPTER_FILE, Files, read_snapshot, read_tensors
from ray_unlearn.protocols import CausalLM

STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` under which the base stays as it was, so that the delta is the adapter's alone. PiSSA, OLoRA,
CorDA, LoftQ and LoRA-GA alter the base when the adapter is made: their files are relative to another model."""
PAIR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A checked LoRA adapter."""

    config: Mapping[str, object]
    """adapter_config.json."""
    scaling: float
    """Of B A: alpha / r, or alpha / sqrt(r) under rsLoRA."""
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """Parameter name in the base -> (B [out, r], A [r, in])."""
    others: Mapping[str, Tensor]
    """What else the file holds, by its own names: magnitudes, biases, embeddings, whole modules."""
    names: frozenset[str]
    """All that the file holds, by its own names."""


def shapes_of(base: CausalLM) -> dict[str, Size]:
    """A base's parameters, tied ones under their first name."""
    return {name: parameter.shape for name, parameter in base.named_parameters()}


def read_adapter_directory(adapter: str, base: str, shapes: Mapping[str, Size]) -> Adapter:
    """The adapter in a directory, checked against the base at a path; raises InputError as read_adapter does."""
    place = Path(adapter)
    if not (place / ADAPTER_CONFIG).exists():
        raise InputError(f"{adapter} is no adapter directory: it has no {ADAPTER_CONFIG}.")
    files = read_snapshot(place)
    _check_stated_base(adapter, _config(files, adapter), base)
    return read_adapter(files, shapes, adapter)


def read_adapter(files: Files, shapes: Mapping[str, Size], name: str) -> Adapter:
    """A LoRA adapter for a base of those shapes, its weights as views of `files`; `name` is for messages.

    Raises InputError for an odd config or file, half pairs, and layers, ranks or shapes that do not fit.
    """
    config = _config(files, name)
    rank, alpha, rslora = config["r"], config["lora_alpha"], config.get("use_rslora")
    weights = read_tensors(files[ADAPTER_FILE], f"{name}/{ADAPTER_FILE}")
    for key, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}: {key} holds NaN or infinity. Its training diverged; use an earlier checkpoint.")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        if found := PAIR.fullmatch(key):
            sides.setdefault(found["module"], {})[found["side"]] = tensor
    pairs = {}
    for module in sorted(sides):
        missing = [side for side in "AB" if side not in sides[module]]
        if missing:
            raise InputError(f"{name}: {module} lacks lora_{missing[0]}; its other half is there. Save it again.")
        pairs[f"{module}.weight"] = (sides[module]["B"], sides[module]["A"])
        _check_pair(name, config, module, *pairs[f"{module}.weight"], shapes)
    if not pairs:
        raise InputError(f"{name} holds no LoRA matrices; its keys: {sorted(weights)[:4]}.")
    return Adapter(
        config=config,
        scaling=alpha / (rank**0.5 if rslora else rank),
        pairs=pairs,
        others={key: tensor for key, tensor in weights.items() if not PAIR.fullmatch(key)},
        names=frozenset(weights),
    )


def _config(files: Files, name: str) -> dict[str, Any]:
    where = f"{name}/{ADAPTER_CONFIG}"
    try:
        config = json.loads(bytes(files[ADAPTER_CONFIG]))
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a mapping, got {config!r:.60}.")
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{where}: peft_type is {config.get('peft_type')!r}, and only LORA is read here. Of another kind, give the "
            "model that PEFT's merge_and_unload() makes."
        )
    rank, alpha, start = config.get("r"), config.get("lora_alpha"), config.get("init_lora_weights", True)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"{where}: r must be a whole number of at least 1, got {rank!r}.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{where}: lora_alpha must be a finite number, got {alpha!r}.")
    if start not in STARTS:
        raise InputError(
            f"{where}: init_lora_weights={start!r} altered the base when the adapter was made, so it belongs to "
            "another model than its base's files. Convert it with PEFT: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...) writes a plain LoRA adapter."
        )
    targets = config.get("target_modules")
    if not (targets is None or isinstance(targets, str) or _texts(targets)):
        raise InputError(f"{where}: target_modules must be a list of names or a pattern, got {targets!r:.60}.")
    return config


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_pair(
    name: str, config: Mapping[str, object], module: str, b: Tensor, a: Tensor, shapes: Mapping[str, Size]
) -> None:
    key, targets = f"{module}.weight", config.get("target_modules")
    if key not in shapes:
        raise InputError(
            f"{name} changes {key}, which the base does not have: it was made for another base, or for one whose "
            "embeddings are not tied."
        )
    if b.dim() != 2 or a.dim() != 2 or b.shape[1] != len(a):
        raise InputError(f"{name}: {module} has B of shape {list(b.shape)} and A of {list(a.shape)}: no product.")
    if len(a) != config["r"] and not config.get("rank_pattern"):
        raise InputError(f"{name}: {module} has rank {len(a)}, and {ADAPTER_CONFIG} says r={config['r']}.")
    shape = [len(b), a.shape[1]]
    if shape != list(shapes[key]) and not (config.get("fan_in_fan_out") and shape[::-1] == list(shapes[key])):
        raise InputError(f"{name} changes {key} of shape {shape}; the base's is {list(shapes[key])}: another base.")
    if not _targeted(module, targets):
        raise InputError(
            f"{name} holds weights for {module}, which is none of its config's target_modules ({targets!r})."
        )


def _targeted(module: str, targets: object) -> bool:
    """As PEFT matches modules: a list by the ends of names, a text as a regular expression."""
    if isinstance(targets, list):
        return any(module == target or module.endswith(f".{target}") for target in targets)
    if isinstance(targets, str) and targets != "all-linear":
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return False
    return True


def _check_stated_base(adapter: str, config: Mapping[str, object], base: str) -> None:
    """Bases are compared by the settings that decide the shapes of their weights, when both are local."""
    stated = str(config.get("base_model_name_or_path") or "")
    ours, theirs = Path(base) / "config.json", Path(stated) / "config.json"
    if not stated or not ours.exists() or not theirs.exists() or Path(stated).resolve() == Path(base).resolve():
        return
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    mine, other = json.loads(ours.read_text()), json.loads(theirs.read_text())
    differ = [
        f"{key} {other.get(key)!r} there, {mine.get(key)!r} here" for key in keys if mine.get(key) != other.get(key)
    ]
    if differ:
        raise InputError(f"the adapter {adapter} was made for another base, {stated}: {'; '.join(differ)}.")
