"""Strict configuration: frozen dataclasses that refuse unknown keys and wrong types, and the trial's own."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.losses import METHODS, OPTIONS, options_of, parameters_of
from ray_unlearn.schema import checked_value, one_of, require


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that decides one unlearning trial, apart from model, data and machines."""

    method: str = "npo_kl_ce"
    """Row of the METHODS table: which loss the forget rows get, which the retain rows."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own parameters (see `ray-unlearn methods`); in files they may stand beside the other keys."""
    forget_weight: float = 1.0
    """Weight of the forget loss."""
    retain_weight: float = 1.0
    """Weight of the cross-entropy (in `rmu`, the distance) on retain rows, where the method has it."""
    kl_weight: float = 1.0
    """Weight of the divergence from the reference on retain rows, where the method has it."""
    forget_on: str = "answer"
    """Tokens of a forget row that the loss sees: `answer`, `prompt`, the whole `document`, or `all`, with the padding
    to max_length or, without one, to the step's longest row."""
    retain_on: str = "answer"
    """The same for the cross-entropy on retain rows."""
    kl_on: str = "document"
    """The same for the divergence on retain rows."""
    negation: float = 1.0
    """In `task_vector`: how many times what training added is subtracted."""
    schedule: str = "paired"
    """`paired`, `mixed`, `sugd` (chunks, cyclic retain pointer), `agad` (chunks, then annealing), or `two_phase`."""
    epochs: int = 5
    """Passes over the forget rows; in `sugd` and `agad`, over each chunk."""
    batch_size: int = 8
    """Forget rows in an optimiser step, over all workers; in `mixed`, rows of either kind."""
    retain_per_forget: int = 1
    """Retain rows that go with each forget row."""
    chunk_size: int = 32
    """Forget rows in a chunk of `sugd` and `agad`."""
    anneal_every: int = 1
    """Chunks of `agad` after which it anneals."""
    anneal_fraction: float = 0.25
    """Share of the retain rows, drawn anew, that an annealing of `agad` descends on."""
    anneal_finally: bool = True
    """Whether `agad` ends with an annealing on all retain rows."""
    repair_epochs: int = 2
    """Passes over the retain rows in the second phase of `two_phase` and in the annealings of `agad`."""
    repair_scale: float = 1.0
    """Learning rate of the repair phase as a multiple of `learning_rate`."""
    micro_batches: int = 1
    """Forward passes that an optimiser step is split into on each worker (gradient accumulation)."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_schedule: str = "constant"
    """`constant`, `linear` or `cosine` decay; it starts anew with each chunk and phase."""
    warmup: float = 0.0
    """Share of a phase's steps spent rising to the peak."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = 1.0
    """Gradient norm above which gradients are scaled down; null for never."""
    tuning: str = "lora"
    """What is trained: `lora` adapters, or `full` weights of the modules that train_modules and the layers name."""
    train_modules: str | None = None
    """In `full`: regular expression found in the names of the modules that are trained; null for all."""
    train_layers: list[int] | None = None
    """Decoder layers, from 0, whose modules are trained, or get adapters; null for all (and what is in no layer)."""
    last_layers: int | None = None
    """Train the last so many decoder layers only; another way of saying train_layers."""
    gradient_mask: str = "none"
    """`none`; `sure`, only the rows most salient for forgetting; `memflex`, only tensors where forgetting and
    retaining disagree. Each step; zero_stage 0 to 2."""
    mask_percentile: float = 99.0
    """`sure`: percentile of the rows' gradient norms at which a row is salient. `memflex`: of the tensors' mean
    gradient magnitudes, above which a tensor may be in the region."""
    mask_cosine: float = 0.92
    """`memflex`: cosine of forget and retain gradient below which a tensor may be in the region."""
    lora_rank: int = 16
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scaling; None for twice the rank."""
    lora_rslora: bool = False
    """Whether the scaling is alpha / sqrt(rank) (rsLoRA), not alpha / rank."""
    lora_init: str = "kaiming"
    """How A starts: `kaiming` uniform, `gaussian`, or `xavier` normal. B starts at zero."""
    lora_dropout: float = 0.0
    """Dropout before the adapters."""
    lora_targets: list[str] | str = "all-linear"
    """Module names that get adapters, or `all-linear` (every linear layer but the head)."""
    forget_eos: bool = False
    """Whether forget rows end in EOS. Under ascent that would train the model not to stop."""
    retain_eos: bool = True
    """Whether retain rows end in EOS, which teaches the model to stop after an answer."""
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

    @staticmethod
    def gathered(data: dict[str, Any]) -> dict[str, Any]:
        """A mapping in which method parameters may stand beside the fields, with them under `options`."""
        stated = data.get("options") or {}
        if not isinstance(stated, dict):
            return data
        beside = {key: data[key] for key in data if key in OPTIONS}
        return {key: value for key, value in data.items() if key not in OPTIONS} | {"options": stated | beside}

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        object.__setattr__(self, "options", _check_options(self.method, self.options))
        _check_trial(self)


TOKENS = ("answer", "prompt", "document", "all")
CHOICES = {
    "forget_on": TOKENS,
    "retain_on": TOKENS,
    "kl_on": TOKENS,
    "schedule": ("paired", "mixed", "sugd", "agad", "two_phase"),
    "lr_schedule": ("constant", "linear", "cosine"),
    "tuning": ("lora", "full"),
    "gradient_mask": ("none", "sure", "memflex"),
    "lora_init": ("kaiming", "gaussian", "xavier"),
}


def _check_options(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """The method's own parameters, checked, in a fixed order, defaults filled in."""
    names = options_of(method)
    for key in options:
        if key not in names:
            raise unknown_name(f"parameter of the method {method}", key, names)
    checked = {}
    for name in names:
        option = OPTIONS[name]
        value = checked_value(option.hint, options.get(name, option.default), name)
        if option.choices:
            one_of(name, value, option.choices)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            above, least = option.above, option.at_least
            require(math.isfinite(value), f"{name} must be a finite number, got {value}.")
            require(above is None or value > above, f"{name} must be above {above}, got {value}.")
            require(least is None or value >= least, f"{name} must be at least {least}, got {value}.")
        checked[name] = value
    require(checked.get("renyi_alpha") != 1, "renyi_alpha must not be 1, where the divergence is KL: use npo_kl_ce.")
    return checked


def _check_trial(config: TrialConfig) -> None:
    """Raises InputError for the first field of a trial that breaks its rule."""

    def value(name: str) -> Any:
        return getattr(config, name)

    for name, choices in CHOICES.items():
        one_of(name, value(name), choices)
    for name in ("epochs", "batch_size", "chunk_size", "anneal_every", "micro_batches", "lora_rank", "snapshots"):
        require(value(name) >= 1, f"{name} must be at least 1, got {value(name)}.")
    for name in ("retain_per_forget", "repair_epochs", "seed"):
        require(value(name) >= 0, f"{name} must be at least 0, got {value(name)}.")
    for name in ("learning_rate", "repair_scale", "negation"):
        require(math.isfinite(value(name)) and value(name) > 0, f"{name} must be a number above 0, got {value(name)}.")
    for name in ("forget_weight", "retain_weight", "kl_weight", "weight_decay"):
        good = math.isfinite(value(name)) and value(name) >= 0
        require(good, f"{name} must be a number of at least 0, got {value(name)}.")
    for name in ("max_seconds", "max_length", "lora_alpha", "max_grad_norm", "last_layers"):
        good = value(name) is None or 0 < value(name) < math.inf
        require(good, f"{name} must be above 0 or null, got {value(name)}.")
    weights = [name for name in parameters_of(config.method) if name.endswith("_weight")]
    require(any(value(name) > 0 for name in weights), f"{', '.join(weights)} are all 0: nothing would be trained.")
    targets = config.lora_targets
    require(bool(targets), f"lora_targets must name modules or be all-linear, got {targets!r}.")
    require(0 <= config.warmup < 1, f"warmup must be in [0, 1), got {config.warmup}.")
    require(0 < config.anneal_fraction <= 1, f"anneal_fraction must be in (0, 1], got {config.anneal_fraction}.")
    require(0 <= config.lora_dropout < 1, f"lora_dropout must be in [0, 1), got {config.lora_dropout}.")
    require(0 <= config.mask_percentile < 100, f"mask_percentile must be in [0, 100), got {config.mask_percentile}.")
    require(config.zero_stage in (0, 1, 2, 3), f"zero_stage must be 0, 1, 2 or 3, got {config.zero_stage}.")
    _check_combinations(config)


def _check_combinations(config: TrialConfig) -> None:
    """Raises InputError for fields that do not go together."""
    one_way = config.train_layers is None or config.last_layers is None
    require(one_way, "give train_layers or last_layers, not both: they say the same thing.")
    require(config.train_layers != [], "train_layers is empty: nothing would be trained; null is for all layers.")
    named = config.train_modules is None or config.tuning == "full"
    require(named, "train_modules goes with tuning: full; adapters are placed by lora_targets.")
    masked = config.gradient_mask != "none" and config.zero_stage == 3
    require(not masked, "gradient_mask needs whole parameters: zero_stage 0, 1 or 2, got 3.")
    try:
        re.compile(config.train_modules or "")
    except re.error as error:
        raise InputError(f"train_modules {config.train_modules!r} is no regular expression: {error}.") from error
