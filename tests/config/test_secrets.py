"""Passwords of a storage's URL: never in what is written, pickled or said."""

from __future__ import annotations

import pickle

import pytest
import yaml

from ray_unlearn.config.job import Job, load_job
from ray_unlearn.config.secrets import redacted, revealed, without_secrets, written
from ray_unlearn.errors import InputError
from ray_unlearn.schema import from_dict

SECRET = "hunter2@x"
URL = f"postgresql://me:{SECRET}@127.0.0.1:1/db"
VARIABLE_URL = "postgresql://me:$OPTUNA_SECRET@127.0.0.1:1/db"


def job_with(storage):
    return from_dict(Job, {"target": {"benchmark": "embedded"}, "search": {"storage": storage}})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, "postgresql://me:***@127.0.0.1:1/db"),
        (VARIABLE_URL, VARIABLE_URL),
        ("mysql+pymysql://u:${PW}@h/d", "mysql+pymysql://u:${PW}@h/d"),
        ("redis://:secret@h:6379", "redis://:***@h:6379"),
        ("mysql://u:a$b@h/d", "mysql://u:***@h/d"),
        ("sqlite:////tmp/a@b/study.db", "sqlite:////tmp/a@b/study.db"),
        ("postgresql://h/d", "postgresql://h/d"),
    ],
)
def test_a_password_is_stars_and_a_variable_is_its_name(url, shown):
    assert redacted(url) == shown and redacted(f"cannot open {url}: no") == f"cannot open {shown}: no"


def test_a_jobs_variable_stays_one_until_the_storage_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTUNA_SECRET", SECRET)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"target": {"benchmark": "embedded"}, "search": {"storage": VARIABLE_URL}}))
    job = load_job(path)
    assert SECRET not in repr(job) and written(job)["search"]["storage"] == VARIABLE_URL
    assert revealed(job.search.storage) == URL
    monkeypatch.delenv("OPTUNA_SECRET")
    with pytest.raises(InputError, match=r"names the environment variable \$OPTUNA_SECRET, which is not set"):
        revealed(job.search.storage)


def test_a_written_job_holds_no_password_and_is_still_the_same_job():
    assert SECRET not in repr(written(job_with(URL)))
    assert written(job_with(URL)) == written(job_with(URL)) != written(job_with("sqlite:///a.db"))


@pytest.mark.parametrize("url", [URL, VARIABLE_URL])
def test_the_error_of_a_storage_that_cannot_be_opened_does_not_say_it(url, monkeypatch):
    from ray_unlearn.search.study import open_study

    monkeypatch.setenv("OPTUNA_SECRET", SECRET)
    with pytest.raises(InputError, match="cannot be opened") as caught:
        open_study(url, "trials", 0, 4)
    assert SECRET not in str(caught.value) and caught.value.__suppress_context__
    assert without_secrets(f"refused {SECRET}, {URL}", url) == "refused ***, postgresql://me:***@127.0.0.1:1/db"


def test_what_tune_pickles_of_the_searcher_holds_no_storage(tmp_path):
    from ray_unlearn.search.study import open_study
    from ray_unlearn.search.tune import TrialSearch

    study = open_study(f"sqlite:///{tmp_path / 'hidden-name.db'}", "trials", 0, 4)
    searcher = TrialSearch(study, dict, dict, 0.5)
    searcher._asked["a"] = study.ask()
    assert b"hidden-name" not in pickle.dumps(searcher)
