"""The studies' storage: deleted, older, damaged and locked ones are refused before anything is built."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml

from ray_unlearn import cli
from ray_unlearn.errors import InputError
from ray_unlearn.search.study import check_study, open_study

STORED = Path(__file__).parent.parent / "pipeline" / "run_format_1"


@pytest.fixture
def storage(tmp_path):
    """The URL of a study of two trials."""
    url = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(url, "trials", 0, 4)
    for _ in range(2):
        study.ask()
    return url


def test_a_study_that_has_its_records_trials_is_taken(storage):
    check_study(storage, "trials", ["trial-0001", "trial-0000"])
    check_study(storage, "merges", [])


def test_a_study_that_lacks_trials_on_record_is_refused(storage):
    with pytest.raises(InputError, match=r"study 'trials' in sqlite.*has 2 trials.*record of trial-0002"):
        check_study(storage, "trials", ["trial-0002", "trial-0001"])
    with pytest.raises(InputError, match=r"study 'merges' .*has 0 trials.*record of merge-0000"):
        check_study(storage, "merges", ["merge-0000"])


@pytest.mark.parametrize("content", [b"garbage" * 500, None])
def test_a_damaged_database_is_refused_by_name(storage, tmp_path, content):
    path = tmp_path / "study.db"
    path.write_bytes(content or path.read_bytes()[: 5 * 4096])
    with pytest.raises(InputError, match="study.db cannot be opened: .*restore it"):
        check_study(storage, "trials", ["trial-0001"])


def test_a_database_that_another_program_has_locked_is_refused_by_name(storage, tmp_path, monkeypatch):
    other = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InputError, match=r"study.db cannot be opened: .*database is locked.*end that"):
        check_study(storage, "trials", [])
    other.close()


def test_a_run_whose_study_is_gone_is_refused_with_its_records_left_alone(tmp_path, capsys):
    run = Path(shutil.copytree(STORED, tmp_path / "run"))
    about = yaml.safe_load((run / "job.yaml").read_text())
    about["job"]["target"]["cache"] = str(tmp_path / "cache")
    (run / "job.yaml").write_text(yaml.safe_dump(about))
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(about["job"]))
    before = {path: path.read_bytes() for path in run.glob("records/*")}
    assert cli.main(["run", str(tmp_path / "job.yaml"), "--out", str(run)]) == 2
    message = capsys.readouterr().err
    assert "study.db has 0 trials, and there is a record of trial-0000" in message and "restore it" in message
    assert before == {path: path.read_bytes() for path in run.glob("records/*")}
    assert not (tmp_path / "cache").exists()


def test_a_storage_that_cannot_be_opened_is_refused_before_anything_is_built(tmp_path, capsys):
    about = yaml.safe_load((STORED / "job.yaml").read_text())["job"]
    about["target"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(about))
    argv = ["run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run"), "--set", "search.storage=nope"]
    assert cli.main(argv) == 2
    assert "storage nope cannot be opened" in capsys.readouterr().err and not (tmp_path / "cache").exists()
