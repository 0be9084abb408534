"""An engine without DeepSpeed, and rows, for tests of the loss alone."""

from __future__ import annotations

import pytest
import torch
from made_rows import FakeEngine

from ray_unlearn.training.parameters import TrainableModel


@pytest.fixture
def prepare(tiny):
    """config -> (engine, tuned) on the tiny model, moved away from its reference; the base is given back."""
    made = []

    def start(config):
        tuned = TrainableModel(tiny.model, config)
        made.append(tuned)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in tuned.model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return FakeEngine(tuned.model), tuned

    yield start
    for tuned in made:
        tuned.release()


@pytest.fixture(scope="session")
def one_rank():
    """A process group of this process alone, which a DeepSpeed engine needs."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        yield
    torch.distributed.destroy_process_group()
