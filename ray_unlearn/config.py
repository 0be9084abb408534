"""Strict configuration: frozen dataclasses that refuse unknown keys and wrong types, and the trial's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.losses import METHODS

T = TypeVar("T")


def from_dict(cls: type[T], data: object, where: str = "") -> T:
    """Builds the dataclass `cls` from plain values, checking every key and type.

    `where` is the dotted path used in messages. Raises InputError for an unknown key (naming the
    nearest known one), a wrong type, or a value that `__post_init__` refuses.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where or cls.__name__} must be a mapping of keys to values, got {data!r}.")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise unknown_name(f"key in {where or cls.__name__}", key, known)
    values = {key: _check(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:  # a required key is missing
        raise InputError(f"{where or cls.__name__}: {error}.") from error


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of from_dict: plain values, defaults filled in."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def digest(value: Any) -> str:
    """Sixteen hex characters that change when any part of a config or plain value changes."""
    plain = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _check(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type; ints pass for floats, and numbers as text (YAML's 1e-4) too."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in [option for option in options if option is not type(None)]:
            try:
                return _check(option, value, where)
            except InputError as error:
                errors.append(str(error))
        raise InputError(errors[0])
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where} must be a list, got {value!r}.")
        return origin(_check(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} must be a mapping, got {value!r}.")
        return value
    return _check_scalar(hint, value, where)


def _check_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e-4 as text
            return float(value)
        except ValueError:
            pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise InputError(f"{where} must be {hint.__name__}, got {value!r}.")


def require(condition: bool, message: str) -> None:
    """Raises InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises InputError unless `value` is one of the choices."""
    if value not in choices:
        raise unknown_name(f"value for {name}:", value, choices)


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that decides one unlearning trial, apart from model, data and machines."""

    method: str = "npo_kl_ce"
    """Row of the METHODS table: which loss the forget rows get, which the retain rows."""
    forget_weight: float = 1.0
    """Weight of the forget loss."""
    retain_weight: float = 1.0
    """Weight of the cross-entropy on retain rows, where the method has it."""
    kl_weight: float = 1.0
    """Weight of KL(reference || model) on retain rows, where the method has it."""
    forget_on: str = "answer"
    """Tokens of a forget row that the loss sees: `answer`, or the whole `document` (prompt included)."""
    retain_on: str = "answer"
    """The same for the cross-entropy on retain rows. KL always sees the whole document."""
    ascent_bound: float | None = None
    """Nats per token at which ascent on a row stops pushing; None for unbounded ascent."""
    npo_beta: float = 0.1
    """Inverse temperature of NPO."""
    npo_ratio: str = "sum"
    """NPO's log-ratio of a row: `sum` over its tokens (the paper) or `mean` (length-normalised)."""
    schedule: str = "paired"
    """`paired`, `sugd` (chunks, cyclic retain pointer), or `two_phase` (forget, then repair)."""
    epochs: int = 5
    """Passes over the forget rows; in `sugd`, over each chunk."""
    batch_size: int = 8
    """Forget rows in an optimiser step, over all workers."""
    retain_per_forget: int = 1
    """Retain rows that go with each forget row."""
    chunk_size: int = 32
    """Forget rows in a chunk of `sugd`."""
    repair_epochs: int = 2
    """Passes over the retain rows in the second phase of `two_phase`."""
    repair_scale: float = 1.0
    """Learning rate of the repair phase as a multiple of `learning_rate`."""
    micro_batches: int = 1
    """Forward passes that an optimiser step is split into on each worker (gradient accumulation)."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: str = "constant"
    """`constant`, `linear` or `cosine` decay; in `sugd` it starts anew with each chunk."""
    warmup: float = 0.0
    """Share of a phase's steps spent rising to the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    tuning: str = "lora"
    """What is trained: `lora` adapters, or `full` weights."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scaling alpha / rank; None for twice the rank."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_targets: list[str] | str = "all-linear"
    """Module names that get adapters, or `all-linear` (every linear layer but the head)."""
    forget_eos: bool = False
    """Whether forget rows end in EOS. Under ascent that would train the model not to stop."""
    max_length: int | None = None
    """Tokens kept of a training row (cut on the right); None for the model's own limit."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage, 0 to 3."""
    snapshots: int = 6
    """How many times the trial scores itself and keeps its weights, evenly over the schedule."""
    max_seconds: float | None = None
    """Wall-clock limit; the trial is recorded as stopped with the snapshots it has."""
    seed: int = 0
    """Seed of adapter initialisation, dropout and batch order."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        for name in ("forget_on", "retain_on"):
            one_of(name, getattr(self, name), ("answer", "document"))
        one_of("npo_ratio", self.npo_ratio, ("sum", "mean"))
        one_of("schedule", self.schedule, ("paired", "sugd", "two_phase"))
        one_of("lr_schedule", self.lr_schedule, ("constant", "linear", "cosine"))
        one_of("tuning", self.tuning, ("lora", "full"))
        for name in ("epochs", "batch_size", "chunk_size", "micro_batches", "lora_rank", "snapshots"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("retain_per_forget", "repair_epochs"):
            require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("learning_rate", "npo_beta", "max_grad_norm", "repair_scale"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"{name} must be a number above 0, got {value}.")
        for name in ("forget_weight", "retain_weight", "kl_weight", "weight_decay"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, f"{name} must be a number of at least 0, got {value}.")
        for name in ("ascent_bound", "max_seconds", "max_length", "lora_alpha"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"{name} must be above 0 or null, got {value}.")
        require(bool(self.lora_targets), f"lora_targets must name modules or be all-linear, got {self.lora_targets!r}.")
        require(self.seed >= 0, f"seed must be at least 0, got {self.seed}.")
        require(0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}.")
        require(0 <= self.lora_dropout < 1, f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        require(self.zero_stage in (0, 1, 2, 3), f"zero_stage must be 0, 1, 2 or 3, got {self.zero_stage}.")
