"""A cluster that was there before: `submit` sends a job to it, and the job's run joins it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from small import small_job

pytestmark = pytest.mark.ray

PORTS = {"port": 26379, "dashboard-port": 28265, "dashboard-agent-listen-port": 28266}


@pytest.fixture
def head(tmp_path_factory):
    """A Ray head with a dashboard on this machine, stopped afterwards, and no other."""
    folder = Path("/tmp") / f"ru{os.getpid()}"  # sockets inside have a short limit for their path
    binary = Path(sys.executable).with_name("ray")
    environment = os.environ | {"PATH": f"{binary.parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    options = [f"--{name}={value}" for name, value in PORTS.items()]
    command = [str(binary), "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", *options]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "Ray runtime started" in line:
            break
    else:
        pytest.fail("the head did not start")
    yield f"http://127.0.0.1:{PORTS['dashboard-port']}"
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for member in family:  # asked to stop, Ray takes half a minute over it
        member.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_submitted_job_runs_on_the_cluster(head, tmp_path):
    data = small_job(tmp_path / "cache")
    data["search"]["trials"] = 1
    data["merge"]["candidates"] = 0
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(data))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ray_unlearn", "submit", str(job), "--address", head, "--out", str(out)]
    answer = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"RAY_AUTH_MODE": "disabled"}
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "SUCCEEDED" in answer.stderr and "trial-0000 finished" in answer.stdout
    assert json.loads((out / "summary.json").read_text())["trials"]["finished"] == 1
    assert (out / "best" / "model.safetensors").exists()
