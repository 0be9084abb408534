"""The configuration of one trial: its fields with their rules, and what of it must go together."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ray_unlearn.errors import InputError, unknown_name
from ray_unlearn.losses import METHODS, OPTIONS, options_of, parameters_of
from ray_unlearn.schema import Range, check_fields, checked, option, require

TOKENS = ("answer", "prompt", "document", "all")


@dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """Everything that decides one unlearning trial, apart from model, data and machines."""

    method: str = option("npo_kl_ce", choices=METHODS)
    """Row of the METHODS table: which loss the forget rows get, which the retain rows."""
    options: dict[str, Any] = field(default_factory=dict)
    """The method's own parameters (see `ray-unlearn methods`); in files they may stand beside the other keys."""
    forget_weight: float = option(1.0, at_least=0, search=Range(0.05, 2.0, log=True))
    """Weight of the forget loss."""
    retain_weight: float = option(1.0, at_least=0, search=Range(0.2, 4.0, log=True))
    """Weight of the cross-entropy (in `rmu`, the distance) on retain rows, where the method has it."""
    kl_weight: float = option(1.0, at_least=0, search=Range(0.3, 10.0, log=True))
    """Weight of the divergence from the reference on retain rows, where the method has it."""
    forget_on: str = option("answer", choices=TOKENS, search=("document", "answer"))
    """Tokens of a forget row that the loss sees: `answer`, `prompt`, the whole `document`, or `all`, with the padding
    to max_length or, without one, to the step's longest row."""
    retain_on: str = option("answer", choices=TOKENS)
    """The same for the cross-entropy on retain rows."""
    kl_on: str = option("document", choices=TOKENS)
    """The same for the divergence on retain rows."""
    negation: float = option(1.0, above=0, search=Range(0.1, 4.0, log=True))
    """In `task_vector`: how many times what training added is subtracted."""
    schedule: str = option(
        "paired",
        choices=("paired", "fixed_pairs", "mixed", "sugd", "agad", "two_phase"),
        search=("paired", "two_phase", "sugd"),
    )
    """`paired`, `fixed_pairs`, `mixed`, `sugd` (chunks, cyclic retain pointer), `agad` (chunks, then annealing), or
    `two_phase`."""
    epochs: int = option(5, at_least=1, search=Range(2, 10))
    """Passes over the forget rows; in `sugd` and `agad`, over each chunk."""
    batch_size: int = option(8, at_least=1)
    """Forget rows in an optimiser step, over all workers; in `mixed`, rows of either kind."""
    retain_per_forget: int = option(1, at_least=0)
    """Retain rows that go with each forget row."""
    chunk_size: int = option(32, at_least=1, search=(32, 64), searched_if=("schedule", "sugd"))
    """Forget rows in a chunk of `sugd` and `agad`."""
    anneal_every: int = option(1, at_least=1)
    """Whole chunks of `agad` after which it anneals."""
    anneal_fraction: float = option(0.25, above=0, at_most=1)
    """Share of the retain rows, drawn anew, that an annealing of `agad` descends on."""
    anneal_finally: bool = True
    """Whether `agad` ends with an annealing on all retain rows."""
    repair_epochs: int = option(2, at_least=0, search=Range(1, 3), searched_if=("schedule", "two_phase"))
    """Passes over the retain rows in the second phase of `two_phase` and in the annealings of `agad`."""
    repair_scale: float = option(1.0, above=0, search=Range(0.1, 1.0, log=True), searched_if=("schedule", "two_phase"))
    """Learning rate of the repair phase as a multiple of `learning_rate`."""
    micro_batches: int = option(1, at_least=1)
    """Forward passes that an optimiser step is split into on each worker (gradient accumulation)."""
    learning_rate: float = option(1e-4, above=0, search=Range(1e-6, 1e-2, log=True))
    """Peak learning rate of AdamW."""
    lr_schedule: str = option("constant", choices=("constant", "linear", "cosine"))
    """`constant`, `linear` or `cosine` decay; it starts anew with each chunk and phase."""
    warmup: float = option(0.0, at_least=0, below=1)
    """Share of a phase's steps spent rising to the peak: the first of w takes 1/w of it, where transformers takes 0
    and is a step behind throughout."""
    weight_decay: float = option(0.0, at_least=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = option(1.0, above=0)
    """Gradient norm above which gradients are scaled down; null for never."""
    tuning: str = option("lora", choices=("lora", "full"), search=("full", "lora"))
    """What is trained: `lora` adapters, or `full` weights of the modules that train_modules and the layers name."""
    train_modules: str | None = None
    """In `full`: regular expression found in the names of the modules that are trained; null for all."""
    train_layers: list[int] | None = option(None, if_empty="nothing would be trained; null is for all layers")
    """Decoder layers, from 0, whose modules are trained, or get adapters; null for all (and what is in no layer)."""
    last_layers: int | None = option(None, at_least=1)
    """Train the last so many decoder layers only; another way of saying train_layers."""
    gradient_mask: str = option("none", choices=("none", "sure", "memflex"))
    """`none`; `sure`, only the rows most salient for forgetting; `memflex`, only tensors where forgetting and
    retaining disagree. Each step; zero_stage 0 to 2."""
    mask_percentile: float = option(99.0, at_least=0, below=100)
    """`sure`: percentile of the rows' gradient norms at which a row is salient. `memflex`: of the tensors' mean
    gradient magnitudes, above which a tensor may be in the region."""
    mask_cosine: float = option(0.92, at_least=-1, at_most=1)
    """`memflex`: cosine of forget and retain gradient below which a tensor may be in the region."""
    lora_rank: int = option(16, at_least=1, search=(8, 16, 32), searched_if=("tuning", "lora"))
    """Rank of the adapters."""
    lora_alpha: float | None = option(None, above=0)
    """Numerator of the adapters' scaling; None for twice the rank."""
    lora_rslora: bool = False
    """Whether the scaling is alpha / sqrt(rank) (rsLoRA), not alpha / rank."""
    lora_init: str = option("kaiming", choices=("kaiming", "gaussian", "xavier"))
    """How A starts: `kaiming` uniform, `gaussian`, or `xavier` normal. B starts at zero."""
    lora_dropout: float = option(0.0, at_least=0, below=1)
    """Dropout before the adapters."""
    lora_targets: list[str] | str = option("all-linear", if_empty="name modules, or all-linear")
    """Module names that get adapters, or `all-linear` (every linear layer but the head)."""
    forget_eos: bool = False
    """Whether forget rows end in EOS. Under ascent that would train the model not to stop."""
    retain_eos: bool = True
    """Whether retain rows end in EOS, which teaches the model to stop after an answer."""
    max_length: int | None = option(None, at_least=1)
    """Tokens kept of a training row (cut on the right); None for the model's own limit."""
    zero_stage: int = option(0, at_least=0, at_most=3)
    """DeepSpeed ZeRO stage, 0 to 3."""
    snapshots: int = option(6, at_least=1)
    """How many times the trial scores itself and keeps its weights, evenly over the schedule."""
    max_seconds: float | None = option(None, above=0)
    """Wall-clock limit; the trial is recorded as stopped with the snapshots it has."""
    seed: int = option(0, at_least=0)
    """Seed of adapter initialisation, dropout and batch order."""

    @staticmethod
    def gathered(data: dict[str, object]) -> dict[str, object]:
        """A mapping in which method parameters may stand beside the fields, with them under `options`."""
        stated = data.get("options") or {}
        if not isinstance(stated, dict):
            return data
        beside = {key: data[key] for key in data if key in OPTIONS}
        return {key: value for key, value in data.items() if key not in OPTIONS} | {"options": stated | beside}

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "options", _checked_options(self.method, self.options))
        _check_together(self)


def _checked_options(method: str, options: dict[str, object]) -> dict[str, object]:
    """The method's own parameters, checked, in a fixed order, defaults filled in."""
    names = options_of(method)
    for key in options:
        if key not in names:
            raise unknown_name(f"parameter of the method {method}", key, names)
    return {name: checked(OPTIONS[name], options.get(name, OPTIONS[name].default), name) for name in names}


def _check_together(config: TrialConfig) -> None:
    """Raises InputError for fields that do not go together."""
    weights = [name for name in parameters_of(config.method) if name.endswith("_weight")]
    some = any(getattr(config, name) > 0 for name in weights)
    require(some, f"{', '.join(weights)} are all 0: nothing would be trained.")
    one_way = config.train_layers is None or config.last_layers is None
    require(one_way, "give train_layers or last_layers, not both: they say the same thing.")
    named = config.train_modules is None or config.tuning == "full"
    require(named, "train_modules goes with tuning: full; adapters are placed by lora_targets.")
    masked = config.gradient_mask != "none" and config.zero_stage == 3
    require(not masked, "gradient_mask needs whole parameters: zero_stage 0, 1 or 2, got 3.")
    try:
        re.compile(config.train_modules or "")
    except re.error as error:
        raise InputError(f"train_modules {config.train_modules!r} is no regular expression: {error}.") from error
