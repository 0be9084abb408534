"""A base, its members and the recipes that the merging tests share."""

from __future__ import annotations

import copy

import pytest
import torch

from ray_unlearn.config.trial import TrialConfig


@pytest.fixture(scope="module")
def bench(tiny):
    from ray_unlearn.evaluation.spec import EvalSettings
    from ray_unlearn.training.worker import WorkerState

    model = copy.deepcopy(tiny.model).requires_grad_(False)
    return WorkerState(
        model=model, tokenizer=tiny.tokenizer, forget=[], retain=[], eval_set=None, eval_settings=EvalSettings()
    )


@pytest.fixture(scope="module")
def members(bench):
    """Snapshot files by name: two adapters of unlike rank and targets, and one of full weights."""
    from ray_unlearn.training.parameters import TrainableModel

    made = {}
    for seed, (name, options) in enumerate(
        {
            "lora-a": {"lora_rank": 4},
            "lora-b": {"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": ["q_proj", "down_proj"]},
            "full": {"tuning": "full"},
            "lora-c": {"lora_rank": 4},
            "lora-d": {"lora_rank": 4, "seed": 5},
        }.items()
    ):
        tuned = TrainableModel(bench.model, TrialConfig(**options))
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for key, parameter in tuned.model.named_parameters():
            if key in tuned.names and not (name == "full" and "layers.1.mlp" in key):
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            if key in tuned.names:
                weights[key] = parameter.detach().float().clone()
        made[name] = tuned.files(weights)
        tuned.release()
    return made


@pytest.fixture(scope="module")
def base_path(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    bench.model.save_pretrained(path)
    bench.tokenizer.save_pretrained(path)
    return str(path)
