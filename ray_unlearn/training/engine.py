"""The only owner of deepspeed: a model and a config to an engine; steps; weights out of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.protocols import CausalLM


def deepspeed_config(config: TrialConfig, dtype: str) -> dict[str, object]:
    """The DeepSpeed dictionary of a trial; a pure function, so that a test can see what a search changes."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # rows are dealt by the schedule; DeepSpeed only needs a number
        # Masked gradients are summed over the micro-batches before the engine sees them.
        "gradient_accumulation_steps": config.micro_batches if config.gradient_mask == "none" else 1,
        "gradient_clipping": config.max_grad_norm or 0.0,  # 0 is DeepSpeed's never
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


class Engine:
    """A DeepSpeed engine over the trainable parameters of a model, driven one optimiser step at a time."""

    def __init__(self, model: CausalLM, config: TrialConfig, dtype: str) -> None:
        import deepspeed
        import deepspeed.ops

        if next(model.parameters()).device.type == "cpu":
            # Without this the first engine compiles a shared-memory op for 40 to 60 s, and needs g++ and ninja.
            deepspeed.ops.__compatible_ops__ = {}
        self._deepspeed = deepspeed
        self.stage = config.zero_stage
        self.micro_batches = config.micro_batches
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # A torch optimiser: naming one in the config would compile DeepSpeed's own for another minute.
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            config=deepspeed_config(config, dtype),
            dist_init_required=False,
        )
        self.module: Any = self.engine.module
        # DeepSpeed's hooks on what its own forward pass returns refuse torch.autograd.grad, which masks need.
        self._forward = self.engine if config.gradient_mask == "none" else self.module
        self.parameters = parameters

    @property
    def device(self) -> torch.device:
        """Where the model's inputs must be."""
        return torch.device(self.engine.device)

    def __call__(self, **inputs: object) -> Any:
        """A training forward pass."""
        return self._forward(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of one micro-batch."""
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float | None:
        """Ends a micro-batch; after the last one updates the weights and returns the gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self.engine.is_gradient_accumulation_boundary()
        norm = self._stage_0_norm() if last and self.stage == 0 else None
        self.engine.step()
        if last and norm is None:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        return norm

    def _stage_0_norm(self) -> float:
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's mean over ranks."""
        world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if world > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)
                tensor /= world
        return list(tensors)

    def reset_optimizer(self) -> None:
        """Forgets the optimiser's moments, as a new optimiser on the same weights would."""
        optimizer = self.engine.optimizer
        getattr(optimizer, "optimizer", optimizer).state.clear()

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Full values of the named parameters, float32 on the CPU. Collective; in stage 3 only rank 0 gets any."""
        wanted = list(names)
        parameters = dict(self.module.named_parameters())
        found: dict[str, Tensor] = {}
        for name in wanted:
            with self._gathered(parameters[name]):
                if self.stage < 3 or torch.distributed.get_rank() == 0:
                    found[name] = parameters[name].detach().float().cpu().clone()
        return found

    @contextmanager
    def _gathered(self, parameter: Tensor) -> Iterator[None]:
        if self.stage < 3:
            yield
        else:
            with self._deepspeed.zero.GatheredParameters([parameter]):
                yield

    def close(self) -> None:
        """Frees what the engine holds; the module stays usable in stages 0 to 2."""
        self.engine.destroy()
