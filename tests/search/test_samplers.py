"""Every sampler proposes trials of three objectives and a constraint: the same for a seed, others when resumed."""

from __future__ import annotations

import sys
import warnings

import optuna
import pytest

from ray_unlearn.errors import InputError
from ray_unlearn.records import Scores
from ray_unlearn.search.samplers import SAMPLERS, Sampler, find_sampler
from ray_unlearn.search.study import enqueue, open_study, tell

STARTUP = 4


def space(trial):
    """Parameters of each kind, one of them conditional."""
    x, n = trial.suggest_float("x", 1e-3, 1.0, log=True), trial.suggest_int("n", 1, 9)
    y = trial.suggest_float("y", 0.0, 1.0) if trial.suggest_categorical("kind", ["a", "b"]) == "a" else 0.5
    return x, n, y


MEMORY = ":memory:"


def searched(name, trials, path=MEMORY, startup=STARTUP, seed=0):
    """Parameters of all trials of a study after `trials` more, each told; the fourth of five fails."""
    study = open_study(f"sqlite:///{path}", "trials", seed, startup, SAMPLERS[name])
    enqueue(study, [{"x": 0.5, "n": 3, "kind": "b"}])
    for _ in range(trials):
        trial = study.ask()
        x, n, y = space(trial)
        utility = 1.0 - abs(x - 0.2)
        scores = Scores(terms={}, raw={}, counts={}, task_aggregate=x * y, mia_score=n / 9, utility=utility)
        tell(study, trial, None if trial.number % 5 == 3 else scores, 0.6, {})
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_gives_its_trials_and_a_resumed_study_goes_on_with_new_ones(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", optuna.exceptions.ExperimentalWarning)
        first = searched(name, 6, tmp_path / "a.db")
        assert searched(name, 6) == first
        assert first[0] == {"x": 0.5, "n": 3, "kind": "b"}
        assert searched(name, 3, seed=1)[1:] != first[1:3]
        resumed = searched(name, 1, tmp_path / "a.db")
    assert resumed[:6] == first
    assert not [parameters for parameters in resumed[6:] if parameters in first]


@pytest.mark.parametrize("name", ["tpe", "nsga2", "gp"])
def test_what_learns_departs_from_its_random_beginning_once_the_startup_is_over(name):
    """A study that learns from its fifth trial on is that of one that never learns up to there, and no further."""
    short, long = (searched(name, 7, startup=startup) for startup in (STARTUP, 99))
    assert short[: STARTUP + 1] == long[: STARTUP + 1]  # trial 3 fails, and is no trial to learn from
    assert short[STARTUP + 1 :] != long[STARTUP + 1 :]


def test_the_quasi_random_sequence_goes_on_where_it_was(tmp_path):
    whole = searched("qmc", 6)
    searched("qmc", 3, tmp_path / "parts.db")
    parts = searched("qmc", 3, tmp_path / "parts.db")
    # the first trial has no y, which is therefore drawn at random
    assert [{**p, "y": None} for p in parts] == [{**p, "y": None} for p in whole]


def test_the_default_is_tpe_with_the_settings_it_always_had():
    before = optuna.create_study(directions=["maximize"] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        before.sampler = optuna.samplers.TPESampler(
            seed=7, n_startup_trials=3, multivariate=True, group=True, constant_liar=True
        )
    now = open_study(f"sqlite:///{MEMORY}", "trials", 7, 3)
    for study in (before, now):
        for _ in range(8):
            trial = study.ask()
            x, n, y = space(trial)
            trial.set_constraint("utility_floor", 0.4 - x)
            study.tell(trial, [x, n / 9, y])
    assert [trial.params for trial in now.trials] == [trial.params for trial in before.trials]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A third party's module that can be imported."""
    (tmp_path / "third_samplers.py").write_text(
        "from optuna.samplers import CmaEsSampler, GridSampler, RandomSampler\n"
        "def grid(seed, startup, done):\n    return GridSampler({'x': [3.0]}, seed)\n"
        "def mine(seed, startup, done):\n    return RandomSampler(seed=seed + done)\n"
        "def one_objective(seed, startup, done):\n    return CmaEsSampler()\n"
        "def none(seed, startup, done):\n    return 7\n"
        "constant = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("third_samplers", None)


def test_a_third_partys_function_is_a_sampler(module):
    study = open_study(f"sqlite:///{MEMORY}", "trials", 3, 4, find_sampler("third_samplers:mine"))
    expected = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3)).ask().suggest_float("x", 0, 1)
    assert study.ask().suggest_float("x", 0, 1) == expected
    assert find_sampler("third_samplers:grid").source == "third_samplers"  # it knows no parameter but x


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpee", "unknown sampler 'tpee'. Did you mean 'tpe'"),
        ("third_samplers:one_objective", "cannot propose a trial of 3 objectives: .*CmaEsSampler"),
        ("third_samplers:none", "must return a sampler of Optuna's, got 7"),
        ("third_samplers:constant", "'int' object is not callable"),
        ("third_samplers:nothing", "has no attribute 'nothing'. Install its module, or name it in the job's plugins"),
        ("third_nowhere:mine", "No module named 'third_nowhere'"),
    ],
)
def test_what_cannot_be_a_sampler_is_refused(module, name, message):
    with pytest.raises(InputError, match=message):
        find_sampler(name)


def test_a_sampler_may_be_added_once(monkeypatch):
    with pytest.raises(InputError, match="there is a sampler 'tpe' already"):
        SAMPLERS.add("tpe", Sampler(make=SAMPLERS["random"].make, meaning="", source=""))
