"""What travels to a cluster with a job, and the line that a shell there reads."""

from __future__ import annotations

import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from third_parties import guests

from ray_unlearn.config.job import load_job
from ray_unlearn.pipeline import submit

SPACE = "def space(trial):\n    return {'method': 'npo', 'epochs': %d}\n"


@pytest.fixture
def client(monkeypatch):
    """The Jobs API's client, which keeps what it was given: a real cluster's shell is not needed to read a line."""
    import ray.job_submission

    taken = {}

    class Client:
        def __init__(self, address):
            pass

        def submit_job(self, **options):
            taken.update(options)
            return "job-1"

        async def tail_job_logs(self, name):
            yield "line\n"

        def get_job_status(self, name):
            return ray.job_submission.JobStatus.SUCCEEDED

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Client)
    return taken


@pytest.mark.parametrize("name", ["x;touch PWNED;echo .yaml", "my job.yaml", "$(touch PWNED).yaml", "job.yaml"])
def test_the_name_of_a_job_file_and_of_a_directory_never_reach_a_shell_as_code(tmp_path, client, name):
    path = tmp_path / name
    path.write_text(yaml.safe_dump({"target": {"benchmark": "embedded"}}))
    assert submit.submit(path, "http://127.0.0.1:8265", out="runs/a b;ls") == 0
    words = shlex.split(client["entrypoint"])
    assert words[:4] == ["python", "-m", "ray_unlearn", "run"] and words[-3:] == ["job.yaml", "--out", "runs/a b;ls"]
    assert "touch" not in client["entrypoint"]


def test_two_spaces_of_one_file_name_both_travel_and_first_points_still_name_them(tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(SPACE % (number + 1))
    names = [str(tmp_path / folder / "mine.py") for folder in ("a", "b")]
    job = {"target": {"benchmark": "embedded"}, "search": {"spaces": ["npo", *names]}}
    job["search"]["first_points"] = [{"space": names[1]}, "zjuklab-model1"]
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    place = tmp_path / "packed"
    place.mkdir()
    submit.pack(load_job(tmp_path / "job.yaml"), place)
    packed = load_job(place / "job.yaml").search
    assert packed.spaces[0] == "npo"
    assert [(place / name).read_text() for name in packed.spaces[1:]] == [SPACE % 1, SPACE % 2]
    assert packed.first_points == [{"space": packed.spaces[2]}, "zjuklab-model1"]
    assert SimpleNamespace(**vars(packed)).spaces != names and (place / "ray_unlearn" / "__init__.py").exists()


METHOD = """
from ray_unlearn.losses import METHODS, Method
METHODS.add("{0}", Method(forget="npo", formula="NPO", source="a test"))
"""


def test_plugins_travel_and_are_found_where_the_job_arrives(tmp_path):
    (tmp_path / "site" / "third_packed").mkdir(parents=True)
    (tmp_path / "site" / "third_packed" / "__init__.py").write_text(METHOD.format("packed_package"))
    (tmp_path / "third_packed_file.py").write_text(METHOD.format("packed_file"))
    names = ["third_packed", str(tmp_path / "third_packed_file.py")]
    job = {"plugins": names, "target": {"benchmark": "embedded"}, "search": {"fixed": {"method": "packed_file"}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    place = tmp_path / "packed"
    place.mkdir()
    with guests():
        sys.path.append(str(tmp_path / "site"))
        submit.pack(load_job(tmp_path / "job.yaml"), place)
    program = (
        "from ray_unlearn.config.job import load_job; from pathlib import Path; from ray_unlearn.losses import METHODS;"
        "print(load_job(Path('job.yaml')).plugins, {'packed_file', 'packed_package'} <= set(METHODS))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=place, env={"PATH": ""}, timeout=120
    )
    assert answer.stdout.strip() == "['third_packed', 'third_packed_file'] True", answer.stderr
