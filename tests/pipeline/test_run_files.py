"""The files of a run: today's format is read again, what is damaged or foreign is refused by its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from ray_unlearn import records, run_files
from ray_unlearn.config.job import Job
from ray_unlearn.errors import InputError
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.pipeline.directory import claim, stage
from ray_unlearn.report import write_report
from ray_unlearn.schema import from_dict, to_dict

STORED = Path(__file__).parent / "run_format_1"
"""A run's files as they were written before they stated a format."""


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def job_of(run: Path) -> Job:
    return from_dict(Job, yaml.safe_load((run / "job.yaml").read_text())["job"])


def test_a_stored_run_of_format_1_is_read_resumed_and_reported(run):
    (trial,), (merge,) = records.load_records(run)
    assert trial.id == "trial-0000" and [snapshot.step for snapshot in trial.snapshots] == [4, 8]
    assert trial.snapshots[1].scores.objectives() == (0.0, pytest.approx(1 / 48), 0.5)
    assert MergeRecipe.from_json(merge.recipe).members and merge.scores
    assert run_files.read_baseline(run).utility == 0.5 and run_files.read_final(run).choice == "trial-0000/00004"
    assert set(run_files.read_seconds(run)) == {"target", "baseline", "search", "merge", "selection"}
    claim(run, job_of(run))
    assert "trial-0000/00004" in write_report(run).read_text()


def test_records_are_written_with_their_format_and_read_back_the_same(run):
    for record in (*records.load_records(run)[0], *records.load_records(run)[1]):
        records.save_record(run, record)
        path = run / "records" / f"{record.id}.json"
        assert json.loads(path.read_text())["format"] == records.FORMAT
        assert records.load_record(path) == record


def test_a_job_stored_before_a_key_was_added_is_the_same_job(run):
    job, about = job_of(run), yaml.safe_load((run / "job.yaml").read_text())
    del about["job"]["merge"]["layerwise"], about["job"]["comparison"]  # as of a version that did not have them
    (run / "job.yaml").write_text(yaml.safe_dump(about))
    claim(run, job)
    other = to_dict(job)
    other["merge"]["layerwise"] = False  # what it now has by default was not asked for
    with pytest.raises(InputError, match=r"another job.*\n  merge.layerwise: True there, False now"):
        claim(run, from_dict(Job, other))


def change(path: Path, **keys: object) -> str:
    return json.dumps({**json.loads(path.read_text()), **keys})


DAMAGED = [
    ("records/trial-0000.json", lambda path: path.read_text()[:200], "not readable JSON"),
    ("records/trial-0000.json", lambda path: "", "it is empty"),
    ("records/trial-0000.json", lambda path: "[]", r"must hold a JSON object, got \[\]"),
    ("records/trial-0000.json", lambda path: change(path, future=1), "unknown key in the record 'future'"),
    ("records/trial-0000.json", lambda path: change(path, format=2), "its format is 2, .* reads up to 1"),
    ("records/trial-0000.json", lambda path: change(path, id="trial-0007"), "its id is 'trial-0007'"),
    ("records/trial-0000.json", lambda path: change(path, status="done"), "unknown value for status: 'done'"),
    ("records/trial-0000.json", lambda path: change(path, seconds="soon"), "record.seconds must be float"),
    (
        "records/trial-0000.json",
        lambda path: change(path, snapshots=[{"id": "x"}]),
        r"snapshots\[0\] lacks 'step'",
    ),
    ("records/trial-0000.json", lambda path: change(path, seconds=float("nan")), "NaN is no number"),
    ("records/trial-abcd.json", lambda path: "{}", "its name is not that of a trial"),
    ("records/notes.json", lambda path: "{}", "its name is not that of a trial"),
    ("records/merge-0001.json", lambda path: change(path, recipe=None), "record.recipe must be a mapping"),
    ("baseline.json", lambda path: "{", "scored again"),
    ("baseline.json", lambda path: "{}", "lacks 'terms', 'raw', 'counts'"),
    ("baseline.json", lambda path: change(path, utility="high"), "scores.utility must be float"),
    ("seconds.json", lambda path: '{"target": 1', "the stages' times"),
    ("seconds.json", lambda path: '{"target": null}', "target must be float"),
    ("final.json", lambda path: "{}", "lacks 'choice', 'kind'"),
    ("final.json", lambda path: change(path, target={}), "lacks 'terms', 'raw', 'counts'"),
    ("front.json", lambda path: '{"members": [1], "hypervolume": 1}', r"members\[0\] must be a mapping"),
    ("summary.json", lambda path: "", "it is empty"),
    ("job.yaml", lambda path: "job: [", "not readable YAML"),
    ("job.yaml", lambda path: "- 1", "must be a mapping"),
    ("job.yaml", lambda path: "job: {model: 3}", "job.model must be a mapping, got 3"),
    ("job.yaml", lambda path: "job: {}\nformat: 9", "its format is 9"),
    ("job.yaml", lambda path: "job: {}\ndata_digests: 1", "data_digests must be a mapping"),
]


@pytest.mark.parametrize(("name", "content", "message"), DAMAGED)
def test_a_damaged_or_foreign_file_is_refused_by_name_and_left_as_it_is(run, name, content, message):
    job, path = job_of(run), run / name
    path.write_text(content(path))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"(?s)/{name}.*{message}"):
        claim(run, job)
    if name != "seconds.json":  # the report takes them from the summary
        with pytest.raises(InputError, match=rf"(?s)/{name}.*{message}"):
            write_report(run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_job_of_another_version_and_one_without_its_run_are_refused(run):
    job = job_of(run)
    about = yaml.safe_load((run / "job.yaml").read_text())
    stored = about["job"]["search"]
    stored["budget"] = 3
    (run / "job.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(InputError, match=r"job.yaml.*'budget'.*of ray-unlearn 0\.1\.0"):
        claim(run, job)
    del stored["budget"], about["run_id"]
    (run / "job.yaml").write_text(yaml.safe_dump(about))
    with pytest.raises(InputError, match="has no run_id"):
        claim(run, job)
    (run / "job.yaml").unlink()
    with pytest.raises(InputError, match="holds records and no job.yaml"):
        claim(run, job)


def test_what_killed_writes_left_is_removed_when_a_run_goes_on(run):
    left = [".job.yaml.1.tmp", ".best.1.tmp/x", "records/.trial-0001.json.1.tmp", "snapshots/trial-0000/.00004.tmp/x"]
    for name in left:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("half")
    claim(run, job_of(run))
    assert not [path for path in run.rglob(".*")]


def test_a_stage_adds_its_seconds_to_those_of_earlier_starts(run):
    before = run_files.read_seconds(run)
    with stage(run, "merge"):
        pass
    after = run_files.read_seconds(run)
    assert after["merge"] == pytest.approx(before["merge"], abs=0.5) and after["search"] == before["search"]
