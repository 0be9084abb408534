"""Benchmarks are a table: a job and a command name its rows, and each row's settings are its own."""

from __future__ import annotations

import dataclasses

import pytest
from third_parties import guests

from ray_unlearn import cli
from ray_unlearn.config.job import Job
from ray_unlearn.data.benchmarks import DATASETS
from ray_unlearn.errors import InputError
from ray_unlearn.schema import from_dict


def job(**target):
    return from_dict(Job, {"target": target})


@pytest.mark.parametrize("name", DATASETS)
def test_every_benchmark_says_what_it_is_and_how_its_models_are_trained(name):
    row = DATASETS[name]
    names = {field.name for field in dataclasses.fields(row.settings)}
    assert {"seed", "epochs", "batch_size", "learning_rate"} <= names and row.meaning and row.source
    assert job(benchmark=name).target.settings == dataclasses.asdict(row.settings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "target.settings.layers must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"learning_rate": 0}, "target.settings.learning_rate must be above 0, got 0"),
        ({"stories": "many"}, "target.settings.stories must be int, got 'many'"),
        ({"storeys": 3}, "Did you mean 'stories'"),
    ],
)
def test_sizes_that_make_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        job(benchmark="embedded", settings=settings)


def test_another_benchmark_has_settings_of_its_own():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Sizes:
        rows: int = 3

    with guests():
        DATASETS.add("rows", dataclasses.replace(DATASETS["embedded"], settings=Sizes))
        assert job(benchmark="rows").target.settings == {"rows": 3}
        with pytest.raises(InputError, match="unknown key in target.settings 'layers'"):
            job(benchmark="rows", settings={"layers": 2})


def test_a_command_names_the_known_benchmarks(capsys, tmp_path):
    assert cli.main(["target", "--benchmark", "embeded", "--out", str(tmp_path / "out")]) == 2
    assert "unknown benchmark 'embeded'. Did you mean 'embedded'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
