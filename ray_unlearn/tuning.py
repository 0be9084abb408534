"""What is trained: adapters or full weights; the reference beside it; a snapshot's files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ray_unlearn.config import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.merging.members import ADAPTER_CONFIG, ADAPTER_FILE, TENSORS_FILE


class Tuned:
    """A model prepared for a trial: its trainable parameters, and its untrained self as the reference.

    With adapters the reference is the same model with them switched off. With full weights it is
    the resident base, and the trial trains a copy: one reference, kept once, for all trials.
    """

    def __init__(self, base: Any, config: TrialConfig) -> None:
        self.config = config
        self.base = base
        # Stage 3 takes a model's weights apart for good, so the resident base must not be what it gets.
        self._borrowed = config.tuning == "lora" and config.zero_stage < 3
        model = base if self._borrowed else copy.deepcopy(base)
        if config.tuning == "lora":
            self.model = _add_adapters(model, config)
        else:
            self.model = model.requires_grad_(True)
        self.trainable = [name for name, p in self.model.named_parameters() if p.requires_grad]

    @contextmanager
    def reference(self, model: Any) -> Iterator[Any]:
        """The untrained model, for forward passes without gradients. `model` is what the engine holds."""
        training = model.training
        with torch.no_grad():
            try:
                if self.config.tuning == "lora":
                    model.eval()  # no adapter dropout, and no other, in the reference
                    with model.disable_adapter():
                        yield model
                else:
                    yield self.base
            finally:
                model.train(training)

    def files(self, weights: dict[str, Tensor]) -> dict[str, bytes]:
        """A snapshot's files by name: a PEFT adapter directory, or the tensors that changed."""
        if self.config.tuning == "full":
            before = dict(self.base.named_parameters())
            changed = {n: w.contiguous() for n, w in weights.items() if not torch.equal(w, before[n].float().cpu())}
            return {TENSORS_FILE: save(changed, metadata={"format": "pt"})}
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, state_dict=weights)
        config = self.model.peft_config["default"].to_dict()
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
            self.model.unload()
        self.base.requires_grad_(False).eval()


def _add_adapters(model: Any, config: TrialConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)  # the adapters' initialisation
    alpha = config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_rank
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise InputError(
            f"lora_targets {config.lora_targets!r} match nothing; the model's linear layers: {linear}."
        ) from error


def snapshot_bytes(model: Any, config: TrialConfig) -> int:
    """Size of one snapshot's tensors in bytes, from shapes alone (float32)."""
    if config.tuning == "full":
        return 4 * sum(parameter.numel() for parameter in model.parameters())
    targets = config.lora_targets
    head = model.get_output_embeddings()
    size = 0
    for name, module in model.named_modules():
        adapted = targets == "all-linear" or name.split(".")[-1] in targets
        if isinstance(module, torch.nn.Linear) and module is not head and adapted:
            size += 4 * config.lora_rank * (module.in_features + module.out_features)
    return size
