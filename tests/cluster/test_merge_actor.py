"""Merge actors on a real Ray cluster: what they score is what is written, members come one by one, a hung actor is
replaced."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import save

from ray_unlearn.config.job import ResourcesPart
from ray_unlearn.data.benchmarks import embedded as benchmark
from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.data.rows import load_documents, load_pair
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.scoring import score_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.writer import write_merge
from ray_unlearn.models.loading import load_model, load_tokenizer, save_model
from ray_unlearn.models.snapshot_files import write_snapshot

pytestmark = pytest.mark.ray

PATIENT = 300.0


@pytest.fixture(scope="module")
def spec(tiny, tmp_path_factory):
    from ray_unlearn.cluster.model_transfer import ModelSource, WorkerSpec

    place = tmp_path_factory.mktemp("merges")
    benchmark.write(tiny.data, place)
    save_model(tiny.model, tiny.tokenizer, place / "model")
    dev, questions = load_mmlu(place / "mmlu")
    forget, retain = (loaded.examples for loaded in load_pair(place, place))
    members, nonmembers = (load_documents(place / f"mia_{name}.jsonl") for name in ("member", "nonmember"))
    return WorkerSpec(
        model=ModelSource.of(str(place / "model"), shared=True),
        forget=forget,
        retain=retain,
        eval_set=EvalSet(
            forget=forget, retain=retain, members=members, nonmembers=nonmembers, dev=dev, questions=questions
        ),
        eval_settings=EvalSettings(max_new_tokens=4, batch_size=64, mmlu_mode="cloze"),
        dtype="bfloat16",
        utility_floor=0.0,
    )


@pytest.fixture(scope="module")
def snapshots(tiny, tmp_path_factory):
    """Three full-weight snapshots, the last of them not as it was written."""
    place = tmp_path_factory.mktemp("snapshots")
    for seed, name in enumerate(("a", "b", "damaged")):
        generator = torch.Generator().manual_seed(seed)
        changed = {n: p + 0.05 * torch.randn(p.shape, generator=generator) for n, p in tiny.model.named_parameters()}
        write_snapshot(place / name, {"changed.safetensors": save(changed)})
    with (place / "damaged" / "changed.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    return {name: place / name for name in ("a", "b", "damaged")}


@pytest.fixture
def pool(spec, snapshots):
    from ray_unlearn.cluster.merge_actor import MergePool
    from ray_unlearn.cluster.session import cluster

    resources = ResourcesPart(dashboard=False)
    with cluster("local", resources), MergePool(spec, snapshots, resources, 1, PATIENT) as pool:
        yield pool


def recipe_of(*names):
    return MergeRecipe(members=list(names), weights=[1.0] * len(names), densities=[0.8] * len(names))


def actor_process():
    """The one process of this test's cluster that runs a merge actor."""
    (found,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.is_running() and process.name().startswith("ray::MergeActor")
    ]
    return found


@pytest.fixture
def scores_of_written(spec, snapshots, tmp_path):
    """Scores of a recipe's merge after it was written and loaded as a user loads it."""

    def score(recipe):
        write_merge(recipe, spec.model.path, snapshots, tmp_path / "written", spec.dtype)
        model = load_model(str(tmp_path / "written"), spec.dtype)
        return score_model(model, load_tokenizer(spec.model.path), spec.eval_set, spec.eval_settings)

    return score


def test_members_come_when_a_recipe_has_them_a_hung_actor_is_replaced_and_a_flipped_bit_reaches_none(
    pool, scores_of_written
):
    pool.start("merge-0000", recipe_of("a"))
    assert not pool.free and set(pool._members) == {"a"}
    name, alone, reason = pool.wait()
    assert (name, reason) == ("merge-0000", "")

    assert scores_of_written(recipe_of("a")) == alone

    hung = actor_process()
    hung.send_signal(signal.SIGSTOP)
    pool.timeout = 2.0
    began = time.monotonic()
    pool.start("merge-0001", recipe_of("a", "b"))
    assert pool.wait() == ("merge-0001", None, "no result after 2 s (merge.timeout); its actor was replaced")
    assert 2 <= time.monotonic() - began < 10 and pool.free
    pool.timeout = PATIENT
    pool.start("merge-0002", recipe_of("a", "b"))
    name, both, reason = pool.wait()
    assert (name, reason) == ("merge-0002", "") and set(pool._members) == {"a", "b"}
    assert scores_of_written(recipe_of("a", "b")) == both != alone
    assert actor_process().pid != hung.pid
    assert not hung.is_running()

    with pytest.raises(InputError, match=r"damaged/changed.safetensors is not what was written"):
        pool.start("merge-0003", recipe_of("a", "damaged"))
    assert pool.free
