"""A snapshot's files are those that were written, or are refused; safetensors are read as the library reads them."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from safetensors.torch import save

from ray_unlearn.cluster.coordinator import Coordinator
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.models.snapshot_files import read_snapshot, read_tensors, write_snapshot
from ray_unlearn.schema import to_dict

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.0, dtype=torch.float64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
}


@pytest.fixture
def snapshot(tmp_path):
    """A snapshot as a run keeps it: posted to its coordinator."""

    async def story():
        coordinator = Coordinator(str(tmp_path), 1)
        await coordinator.submit("trial-0000", to_dict(TrialConfig()), queued=False)
        content = {"step": 3, "phase": "forget", "scores": {"terms": {}, "raw": {}, "counts": {}}, "seconds": 1.0}
        files = {"changed.safetensors": save(TENSORS)}
        await coordinator.post(0, "trial-0000", "snapshot", content | {"files": files, "course": []})

    asyncio.run(story())
    return tmp_path / "snapshots" / "trial-0000" / "00003"


def test_a_kept_snapshot_is_read_as_it_was_posted(snapshot):
    files = read_snapshot(snapshot)
    assert set(files) == {"changed.safetensors"} and bytes(files["changed.safetensors"]) == save(TENSORS)
    assert set(json.loads((snapshot / "digests.json").read_text())) == {"changed.safetensors"}
    for name, tensor in read_tensors(files["changed.safetensors"], "x").items():
        assert tensor.equal(TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
        assert tensor.shape == TENSORS[name].shape


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "changed.safetensors is not what was written: its SHA-256 differs. Copy the snapshot's folder back"),
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), "changed.safetensors is not what was written"),
        (lambda path: path.write_bytes(b""), "changed.safetensors is empty"),
        (lambda path: path.unlink(), "changed.safetensors is missing. Copy the snapshot's folder back"),
        (lambda path: path.with_name("digests.json").write_text("{"), "digests.json is damaged"),
        (lambda path: path.with_name("digests.json").write_text("[1]"), "digests.json is damaged"),
    ],
    ids=["flipped bit", "cut", "empty", "missing", "digests cut", "digests a list"],
)
def test_a_damaged_snapshot_is_refused_with_its_file_and_what_to_do(snapshot, damage, message):
    damage(snapshot / "changed.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        read_snapshot(snapshot)
    assert str(snapshot) in str(caught.value)


def test_a_snapshot_of_an_older_run_has_no_digests_and_is_read(snapshot):
    (snapshot / "digests.json").unlink()
    assert set(read_snapshot(snapshot)) == {"changed.safetensors"}


def test_what_a_killed_write_left_is_no_part_of_the_snapshot_written_again(tmp_path):
    left = tmp_path / ".00001.tmp"
    left.mkdir()
    (left / "adapter_config.json").write_text("half")
    write_snapshot(tmp_path / "00001", {"changed.safetensors": save(TENSORS)})
    assert sorted(path.name for path in (tmp_path / "00001").iterdir()) == ["changed.safetensors", "digests.json"]
    assert not left.exists()


def header(entry, content=b"\0" * 16):
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + content


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header({"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}, b"\0" * 20),
        header({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}),
        header({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}),
        header({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}),
        header({"dtype": "F32", "shape": [4]}),
        header(3),
        (2).to_bytes(8, "little") + b"[]",
    ],
    ids=["nothing", "endless", "size", "beyond", "before", "shape", "no offsets", "number", "list"],
)
def test_what_is_no_safetensors_file_is_refused(data):
    with pytest.raises(InputError, match="x is no whole safetensors file"):
        read_tensors(data, "x")


def test_types_that_are_no_floats_are_refused_by_name():
    with pytest.raises(InputError, match=r"x: a has the type I8; only floating-point weights \(F64, F32, F16, BF16\)"):
        read_tensors(save({"a": torch.ones(2, dtype=torch.int8)}), "x")
