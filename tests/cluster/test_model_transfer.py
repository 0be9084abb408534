"""Models that travel as bytes: unpacked where nobody else could have prepared the place."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from ray_unlearn.cluster.model_transfer import ModelSource


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    return ModelSource.of(str(tmp_path / "model"), shared=False)


def test_files_arrive_whole_once_and_only_for_this_user(source):
    place = Path(source.local())
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert place.parent.stat().st_mode & 0o777 == 0o700
    before = (place / "config.json").stat().st_ino
    assert source.local() == str(place) and (place / "config.json").stat().st_ino == before


def test_a_place_that_others_can_write_or_that_is_a_link_is_refused(source, tmp_path):
    root = tmp_path / "tmp" / f"ray_unlearn-{os.getuid()}-models"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by others"):
        source.local()
    root.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is a link"):
        source.local()


@pytest.mark.parametrize("change", ["other bytes", "one more file", "a link"])
def test_what_does_not_hold_these_bytes_is_unpacked_again(source, tmp_path, change):
    place = Path(source.local())
    if change == "other bytes":
        (place / "model.safetensors").write_bytes(b"WEIGHTS")
    elif change == "one more file":
        (place / "evil.py").write_text("")
    else:
        (place / "config.json").unlink()
        (place / "config.json").symlink_to(tmp_path / "model" / "config.json")
    place = Path(source.local())
    assert sorted(path.name for path in place.iterdir()) == ["config.json", "model.safetensors"]
    assert (place / "model.safetensors").read_bytes() == b"weights" and not (place / "config.json").is_symlink()
