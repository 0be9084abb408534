"""Shared by the tests: one thread, no network, and the tiny embedded benchmark with an untrained model."""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from ray_unlearn.data.benchmarks import embedded as benchmark

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take a minute each")


def pytest_collection_modifyitems(config, items):
    """Tests that start Ray run one after another in one process; slow ones are skipped unless asked for."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes a minute; give --slow"))


@pytest.fixture(scope="session")
def tiny():
    """data, tokenizer and a random two-layer OLMo 2; tests that change the model must copy or restore it."""
    sizes = {"stories": 2, "biographies": 1, "entries": 3, "nonmembers": 6, "facts": 6, "vocabulary": 320}
    settings = benchmark.EmbeddedSettings(hidden=32, layers=2, **sizes)
    data = benchmark.make(settings)
    tokenizer = benchmark.make_tokenizer(data, settings.vocabulary)
    model = benchmark.make_model(settings, len(tokenizer)).requires_grad_(False).eval()
    with torch.no_grad():  # norms start at exactly 1 and logits near uniform; make both distinct
        generator = torch.Generator().manual_seed(7)
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return SimpleNamespace(data=data, tokenizer=tokenizer, model=model, settings=settings)
