"""What a schedule feeds when: visits, order, learning rates, fresh optimisers, and where a trial scores itself."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import pairwise

import pytest

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.training.schedule import SCHEDULES, Step, snapshot_steps, training_steps


def random_case(seed, **fixed):
    """A random small configuration with its numbers of rows."""
    rng = random.Random(seed)
    options = {
        "epochs": rng.randint(1, 4),
        "batch_size": rng.randint(1, 5),
        "retain_per_forget": rng.randint(0, 3),
        "chunk_size": rng.randint(1, 6),
        "repair_epochs": rng.randint(1, 3),
        "repair_scale": rng.choice([0.1, 0.5, 2.0]),
        "lr_schedule": rng.choice(["constant", "linear", "cosine"]),
        "warmup": rng.choice([0.0, 0.2, 0.5]),
        "learning_rate": 1e-3,
        "seed": rng.randint(0, 9),
    }
    return TrialConfig(**{**options, **fixed}), rng.randint(1, 13), rng.randint(1, 9)


def visits(steps, side):
    return [row for step in steps for row in getattr(step, side)]


SEEDS = range(40)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_config_gives_the_same_plan_within_bounds(schedule, seed):
    config, forget, retain = random_case(seed, schedule=schedule)
    steps = training_steps(config, forget, retain)
    assert steps == training_steps(config, forget, retain)
    assert set(visits(steps, "forget")) == set(range(forget))
    assert set(visits(steps, "retain")) <= set(range(retain))
    low = 0 if schedule == "mixed" else 1  # a mixed batch may hold rows of one kind alone
    assert all(low <= len(step.forget) <= config.batch_size for step in steps if step.phase == "forget")
    assert all(step.forget or step.retain for step in steps)
    assert [step.epoch for step in steps] == sorted(step.epoch for step in steps)
    assert all(0 < step.learning_rate <= config.learning_rate * max(1, config.repair_scale) for step in steps)
    assert steps[0].fresh_optimizer


@pytest.mark.parametrize("seed", SEEDS)
def test_paired_visits_every_forget_row_once_per_epoch_and_retain_rows_evenly(seed):
    config, forget, retain = random_case(seed, schedule="paired")
    steps = training_steps(config, forget, retain)
    order = visits(steps, "forget")
    assert len(order) == forget * config.epochs
    for epoch in range(config.epochs):
        assert sorted(order[epoch * forget : (epoch + 1) * forget]) == list(range(forget))
    assert len(steps) == config.epochs * math.ceil(forget / config.batch_size)
    assert all(len(step.retain) == len(step.forget) * config.retain_per_forget for step in steps)
    beside = visits(steps, "retain")
    for stop in range(len(beside) + 1):  # after any number of rows no retain row is ahead by more than one
        counts = Counter(beside[:stop])
        assert max(counts.values(), default=0) - min(counts[row] for row in range(retain)) <= 1
    assert [step.fresh_optimizer for step in steps] == [True] + [False] * (len(steps) - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_pairs_are_the_same_in_every_epoch_and_visit_forget_rows_as_paired_does(seed):
    config, forget, retain = random_case(seed, schedule="fixed_pairs")
    steps, n = training_steps(config, forget, retain), config.retain_per_forget
    for step in steps:
        assert list(step.retain) == [(row * n + k) % retain for row in step.forget for k in range(n)]
    order = visits(steps, "forget")
    for epoch in range(config.epochs):
        assert sorted(order[epoch * forget : (epoch + 1) * forget]) == list(range(forget))


def test_fixed_pairs_with_one_retain_row_each_are_the_published_pairs():
    steps = training_steps(TrialConfig(schedule="fixed_pairs", batch_size=1, epochs=2), 5, 3)
    assert {(step.forget, step.retain) for step in steps} == {((i,), (i % 3,)) for i in range(5)}


def test_agad_is_the_published_loop_with_a_rest():
    """7 rows in chunks of 3: forget, anneal, forget, anneal, forget the rest, anneal finally; int() of 0.25 * 14."""
    config = TrialConfig(
        method="grad_ascent", schedule="agad", chunk_size=3, epochs=1, repair_epochs=1, anneal_fraction=0.25
    )
    phases = []
    for step in training_steps(config, 7, 14):
        if step.fresh_optimizer:
            phases.append([step.phase, 0])
        phases[-1][1] += len(step.forget) + len(step.retain)
    assert phases == [["forget", 3], ["repair", 3], ["forget", 3], ["repair", 3], ["forget", 1], ["repair", 14]]


def test_another_seed_gives_another_order_and_epochs_differ():
    made = [training_steps(TrialConfig(seed=seed, epochs=2), 40, 40) for seed in (0, 1)]
    assert visits(made[0], "forget") != visits(made[1], "forget")
    assert visits(made[0], "retain") != visits(made[1], "retain")
    order = visits(made[0], "forget")
    assert order[:40] != order[40:] and order[:40] != list(range(40))


@pytest.mark.parametrize("seed", SEEDS)
def test_sugd_walks_chunks_in_file_order_with_a_cyclic_retain_pointer(seed):
    config, forget, retain = random_case(seed, schedule="sugd")
    steps, n, size = training_steps(config, forget, retain), config.retain_per_forget, config.batch_size
    expected, pointer = [], 0
    for start in range(0, forget, config.chunk_size):
        chunk = list(range(start, min(start + config.chunk_size, forget)))  # the last one may be short
        after = {}
        for row in chunk:
            after[row] = [(pointer + k) % retain for k in range(n)]
            pointer = (pointer + n) % retain
        for epoch in range(config.epochs):
            for at in range(0, len(chunk), size):
                group = chunk[at : at + size]
                beside = [r for row in group for r in after[row]]
                expected.append((tuple(group), tuple(beside), epoch == 0 and at == 0))
    assert [(step.forget, step.retain, step.fresh_optimizer) for step in steps] == expected


def test_sugd_is_the_published_example():
    config = TrialConfig(schedule="sugd", chunk_size=2, retain_per_forget=2, batch_size=1, epochs=2)
    steps = training_steps(config, 3, 5)
    pairs = [(step.forget, step.retain) for step in steps]
    first = [((0,), (0, 1)), ((1,), (2, 3))]
    assert pairs == first + first + [((2,), (4, 0))] * 2
    assert [step.fresh_optimizer for step in steps] == [True, False, False, False, True, False]


def test_sugd_restarts_the_linear_decay_in_every_chunk():
    config = TrialConfig(schedule="sugd", chunk_size=2, batch_size=1, epochs=2, lr_schedule="linear", learning_rate=1.0)
    rates = [step.learning_rate for step in training_steps(config, 5, 3)]
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25, 1, 0.75, 0.5, 0.25, 1, 0.5])


@pytest.mark.parametrize("seed", SEEDS)
def test_two_phase_forgets_as_paired_does_and_then_repairs_on_retain_rows_only(seed):
    config, forget, retain = random_case(seed, schedule="two_phase")
    steps = training_steps(config, forget, retain)
    first = [step for step in steps if step.phase == "forget"]
    second = steps[len(first) :]
    paired = training_steps(TrialConfig(**{**config.__dict__, "schedule": "paired"}), forget, retain)
    assert first == paired
    assert all(step.phase == "repair" and not step.forget and step.retain for step in second)
    order = visits(second, "retain")
    for epoch in range(config.repair_epochs):
        assert sorted(order[epoch * retain : (epoch + 1) * retain]) == list(range(retain))
    assert len(order) == retain * config.repair_epochs
    assert [step.fresh_optimizer for step in second] == [True] + [False] * (len(second) - 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_mixed_visits_every_row_of_both_kinds_once_per_epoch(seed):
    config, forget, retain = random_case(seed, schedule="mixed")
    steps = training_steps(config, forget, retain)
    for epoch in range(config.epochs):
        mine = [step for step in steps if step.epoch == epoch]
        assert sorted(visits(mine, "forget")) == list(range(forget))
        assert sorted(visits(mine, "retain")) == list(range(retain))
        sizes = [len(step.forget) + len(step.retain) for step in mine]
        assert all(size == config.batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= config.batch_size


@pytest.mark.parametrize("finally_", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_agad_anneals_after_every_few_chunks_and_at_the_end_on_all(seed, finally_):
    every = 1 + seed % 3
    options = {"schedule": "agad", "anneal_every": every, "anneal_fraction": 0.5, "anneal_finally": finally_}
    config, forget, retain = random_case(seed, **options)
    phases = []
    for step in training_steps(config, forget, retain):
        if step.fresh_optimizer:
            phases.append((step.phase, []))
        phases[-1][1].append(step)
    chunks = [list(range(forget))[i : i + config.chunk_size] for i in range(0, forget, config.chunk_size)]
    expected = []
    for number, chunk in enumerate(chunks, start=1):
        expected.append(("forget", len(chunk) * config.epochs))
        if number % every == 0 and len(chunk) == config.chunk_size:
            expected.append(("repair", max(1, int(0.5 * retain)) * config.repair_epochs))
    expected += [("repair", retain * config.repair_epochs)] * finally_
    found = [(phase, sum(len(step.forget) + len(step.retain) for step in steps)) for phase, steps in phases]
    assert found == expected
    forgetting = [steps for phase, steps in phases if phase == "forget"]
    for chunk, steps in zip(chunks, forgetting, strict=True):
        assert sorted(visits(steps, "forget")) == sorted(chunk * config.epochs) and not visits(steps, "retain")
    annealed = [visits(steps, "retain") for phase, steps in phases if phase == "repair"]
    assert all(set(Counter(rows).values()) == {config.repair_epochs} for rows in annealed)


def test_repair_scale_multiplies_the_repair_rate_only():
    config = TrialConfig(schedule="two_phase", learning_rate=0.01, repair_scale=0.1, repair_epochs=1)
    rates = {step.phase: step.learning_rate for step in training_steps(config, 9, 9)}
    assert rates == {"forget": pytest.approx(0.01), "repair": pytest.approx(0.001)}


def test_two_phase_without_repair_epochs_is_the_paired_plan():
    config = TrialConfig(schedule="two_phase", repair_epochs=0)
    assert training_steps(config, 5, 4) == training_steps(TrialConfig(schedule="paired"), 5, 4)


@pytest.mark.parametrize(
    ("lr_schedule", "after"),
    [
        ("constant", [1] * 6),
        ("linear", [1 - k / 6 for k in range(6)]),
        ("cosine", [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]),
    ],
)
def test_warm_up_rises_to_the_peak_and_the_decay_follows(lr_schedule, after):
    config = TrialConfig(epochs=8, batch_size=8, learning_rate=1.0, warmup=0.25, lr_schedule=lr_schedule)
    rates = [step.learning_rate for step in training_steps(config, 8, 8)]
    assert rates == pytest.approx([0.5, 1.0, *after])


def test_without_warm_up_linear_decay_is_that_of_a_trainer():
    config = TrialConfig(epochs=4, batch_size=8, learning_rate=1.0, lr_schedule="linear")
    assert [step.learning_rate for step in training_steps(config, 8, 8)] == pytest.approx([1, 0.75, 0.5, 0.25])


# -- where a trial scores itself -------------------------------------------------------------------


def course(forget, repair=0):
    return [Step("forget", 0, (0,), (), 1.0, i == 0) for i in range(forget)] + [
        Step("repair", 1, (), (0,), 1.0, i == 0) for i in range(repair)
    ]


@pytest.mark.parametrize("repair", [0, 1, 5, 30])
@pytest.mark.parametrize("forget", [1, 2, 7, 24])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 100])
def test_snapshots_have_their_count_rise_and_include_the_ends_of_both_phases(forget, repair, count):
    steps = course(forget, repair)
    marks = snapshot_steps(steps, count)
    assert len(marks) == min(count, len(steps))
    assert all(a < b for a, b in pairwise(marks)) and marks[0] >= 0
    assert marks[-1] == len(steps) - 1
    if repair and count > 1:
        assert forget - 1 in marks


def test_snapshots_are_spread_evenly():
    assert snapshot_steps(course(12), 4) == [2, 5, 8, 11]
    assert snapshot_steps(course(10), 3) == [3, 6, 9]
    gaps = [b - a for a, b in pairwise([-1, *snapshot_steps(course(101), 7)])]
    assert max(gaps) - min(gaps) <= 1


def test_the_end_of_forgetting_takes_the_place_of_the_nearest_snapshot():
    assert snapshot_steps(course(9, 11), 4) == [4, 8, 14, 19]
