"""Files: what does not fit on the disk is said with path and bytes, and leaves nothing half written."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import pytest

from ray_unlearn.errors import DiskFullError
from ray_unlearn.files import room_for, write_json
from ray_unlearn.models.loading import save_model
from ray_unlearn.models.snapshot_files import write_snapshot


@contextmanager
def files_of_at_most(size):
    """As little room as a full disk, for this process alone: the system refuses to let a file grow beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "text": lambda place, tiny: write_json(place, {"text": "x" * 100_000}),
    "snapshot": lambda place, tiny: write_snapshot(place, {"a.safetensors": b"x" * 50_000, "b": b"y" * 50_000}),
    "model": lambda place, tiny: save_model(tiny.model, tiny.tokenizer, place),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_without_room_names_path_and_bytes_and_leaves_what_was_there(tmp_path, tiny, name):
    place = tmp_path / "place"
    WRITERS[name](place, tiny)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    if name == "snapshot":  # never written twice
        place = tmp_path / "other"
    with files_of_at_most(20_000), pytest.raises(DiskFullError) as caught:
        WRITERS[name](place, tiny)
    message = str(caught.value)
    assert str(place) in message and f"are free in {tmp_path}" in message and "the same command then goes on" in message
    needed = int(message.partition(" bytes are needed")[0].rpartition(" ")[2].replace(",", ""))
    assert needed >= 100_000
    assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(122, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT ...]"),
    ],
)
def test_the_systems_want_of_room_is_known_in_every_librarys_words(tmp_path, error):
    with pytest.raises(DiskFullError, match="for want of room"), room_for(tmp_path / "x" / "y"):
        try:
            raise error
        except Exception as cause:
            raise ValueError("could not go on") from cause


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="Permission denied"), room_for(tmp_path):
        raise PermissionError(13, "Permission denied")
