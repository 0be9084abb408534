"""What is trained: adapters or full weights; the reference beside it; a snapshot's files."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save
from torch import Tensor

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.losses import METHODS
from ray_unlearn.models.loading import check_layers, find_layer, layer_prefix
from ray_unlearn.models.snapshot_files import ADAPTER_CONFIG, ADAPTER_FILE, TENSORS_FILE
from ray_unlearn.protocols import CausalLM

if TYPE_CHECKING:
    from peft import PeftModel


class TrainableModel:
    """A model prepared for a trial: its trainable parameters, and its untrained self as the reference.

    With adapters the reference is the same model with them switched off. With full weights it is
    the resident base, kept once for all trials; the trial trains copies of what it changes, and
    shares the rest with the base.
    """

    def __init__(self, base: CausalLM, config: TrialConfig) -> None:
        self.config = config
        self.base = base
        # Stage 3 takes a model's weights apart for good, so the resident base must not be what it gets.
        alone = config.zero_stage == 3
        self._borrowed = config.tuning == "lora" and not alone
        if config.tuning == "lora":
            self.model = _add_adapters(copy.deepcopy(base) if alone else base, config)
        else:
            names = trained_names(base, config)
            kept = [p for name, p in base.named_parameters() if name not in names]
            self.model = copy.deepcopy(base, {} if alone else {id(parameter): parameter for parameter in kept})
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in names)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]

    @contextmanager
    def reference(self, model: CausalLM) -> Iterator[CausalLM]:
        """The untrained model, for forward passes without gradients. `model` is what the engine holds."""
        training = model.training
        with torch.no_grad():
            try:
                if self.config.tuning == "lora":
                    model.eval()  # no adapter dropout, and no other, in the reference
                    with cast("PeftModel", model).disable_adapter():
                        yield model
                else:
                    yield self.base
            finally:
                model.train(training)

    @contextmanager
    def delivered(self, model: CausalLM) -> Iterator[None]:
        """The model as a snapshot delivers it: as trained or, under task-vector negation, its mirror image."""
        if not METHODS[self.config.method].negates:
            yield
            return
        scale, before = self.config.negation, dict(self.base.named_parameters())
        changed = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "lora_A" not in n]
        trained = {name: parameter.detach().clone() for name, parameter in changed}
        with torch.no_grad():
            try:
                for name, parameter in changed:
                    start = 0.0 if self.config.tuning == "lora" else before[name]
                    parameter.copy_(start - scale * (parameter - start))
                yield
            finally:
                for name, parameter in changed:
                    parameter.copy_(trained[name])

    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """A snapshot's files by name: a PEFT adapter directory, or the tensors that changed."""
        if self.config.tuning == "full":
            before = dict(self.base.named_parameters())
            changed = {n: w.contiguous() for n, w in weights.items() if not torch.equal(w, before[n].float().cpu())}
            return {TENSORS_FILE: save(changed, metadata={"format": "pt"})}
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, state_dict=weights)
        config = cast("PeftModel", self.model).peft_config["default"].to_dict()
        config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()} | {"inference_mode": True}
        return {
            ADAPTER_FILE: save(
                {name: tensor.contiguous() for name, tensor in state.items()}, metadata={"format": "pt"}
            ),
            ADAPTER_CONFIG: json.dumps(config, indent=1, sort_keys=True, default=str).encode(),
        }

    def release(self) -> None:
        """Gives the resident base back as it was."""
        if self._borrowed:
            cast("PeftModel", self.model).unload()
        self.base.requires_grad_(False).eval()


def trained_layers(model: CausalLM, config: TrialConfig) -> list[int] | None:
    """The decoder layers that a trial changes; None for no restriction."""
    count = model.config.num_hidden_layers
    if config.last_layers is not None:
        if config.last_layers > count:
            raise InputError(f"last_layers is {config.last_layers}, and the model has {count} layers.")
        return list(range(count - config.last_layers, count))
    if config.train_layers is not None:
        check_layers(model, config.train_layers, "train_layers")
    return config.train_layers


def _layer_starts(model: CausalLM, config: TrialConfig) -> tuple[str, ...]:
    """What the names of all that a trial may change begin with."""
    layers = trained_layers(model, config)
    return ("",) if layers is None else tuple(f"{layer_prefix(model)}.{layer}." for layer in layers)


def trained_names(model: CausalLM, config: TrialConfig) -> set[str]:
    """The parameters that full-weight tuning changes; raises InputError when there are none."""
    starts = _layer_starts(model, config)
    names = [name for name, _ in model.named_parameters() if name.startswith(starts)]
    found = {name for name in names if re.search(config.train_modules or "", name)}
    if not found:
        raise InputError(
            f"train_modules {config.train_modules!r} is found in no parameter's name; some are: {names[:9]}."
        )
    return found


def _add_adapters(model: CausalLM, config: TrialConfig) -> CausalLM:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)  # the adapters' initialisation
    alpha = config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]  # PEFT takes both
        lora_dropout=config.lora_dropout,
        use_rslora=config.lora_rslora,
        init_lora_weights="gaussian" if config.lora_init == "gaussian" else True,
        target_modules=config.lora_targets,
        layers_to_transform=trained_layers(model, config),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = cast(CausalLM, get_peft_model(cast(torch.nn.Module, model), settings))
    except ValueError as error:
        raise InputError(
            f"lora_targets {config.lora_targets!r} match nothing; the model's linear layers: {_linear_names(model)}."
        ) from error
    if config.lora_init == "xavier":  # as in Atyaephyra's own adapters; PEFT has no name for it
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                torch.nn.init.xavier_normal_(parameter)
    return adapted


def _linear_names(model: CausalLM) -> list[str]:
    return sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})


def _adapted(model: CausalLM, config: TrialConfig) -> list[torch.nn.Linear]:
    """The linear layers that get adapters; raises InputError when there are none."""
    targets, starts = config.lora_targets, _layer_starts(model, config)
    head = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        named = targets == "all-linear" or name.split(".")[-1] in targets
        if isinstance(module, torch.nn.Linear) and module is not head and named and name.startswith(starts):
            found.append(module)
    if not found:
        raise InputError(f"lora_targets {targets!r} match nothing; the model's linear layers: {_linear_names(model)}.")
    return found


def check_trainable(model: CausalLM, config: TrialConfig) -> None:
    """Refuses a configuration that names modules or layers which the model does not have; an empty model will do."""
    if config.tuning == "full":
        trained_names(model, config)
    else:
        _adapted(model, config)
    if "rmu_layer" in config.options:
        find_layer(model, config.options["rmu_layer"])


def snapshot_bytes(model: CausalLM, config: TrialConfig) -> int:
    """Size of one snapshot's tensors in bytes, from shapes alone (float32)."""
    if config.tuning == "full":
        names = trained_names(model, config)
        return 4 * sum(parameter.numel() for name, parameter in model.named_parameters() if name in names)
    return sum(4 * config.lora_rank * (m.in_features + m.out_features) for m in _adapted(model, config))
