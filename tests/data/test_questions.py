"""MMLU's files: what is read and what is refused."""

from __future__ import annotations

import pytest

from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.errors import InputError


def write_mmlu(root, **files):
    for name, text in files.items():
        folder = root / name.rsplit("_", 1)[1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return root


def test_mmlu_folders_are_read_by_subject(tmp_path):
    write_mmlu(
        tmp_path,
        world_history_dev='"Who, then?",a,b,c,d,A\n',
        world_history_test='"Two\nlines?",1,"2,5",3,4, C \nQ2?,w,x,y,z,D\n',
        art_dev="",
        art_test="Née?,k,l,m,n,B\n",
    )
    dev, test = load_mmlu(tmp_path)
    assert set(dev) == {"art", "world_history"} and dev["art"] == []
    assert dev["world_history"][0].question == "Who, then?" and dev["world_history"][0].answer == 0
    assert [(q.subject, q.question, q.answer) for q in test] == [
        ("art", "Née?", 1),
        ("world_history", "Two\nlines?", 2),
        ("world_history", "Q2?", 3),
    ]
    assert test[1].options == ("1", "2,5", "3", "4")


@pytest.mark.parametrize(
    "line", ["Q?,a,b,c,A", "Q?,a,b,c,d,e,A", "Q?,a,b,c,d,E", "Q?,a,b,c,d,", "Q?,a,b,c,d,a", "Q?,a,b,c,d,AB", "Q?"]
)
def test_an_mmlu_row_of_other_columns_or_letters_is_refused_with_its_row(tmp_path, line):
    write_mmlu(tmp_path, art_dev="", art_test=f"Q1?,a,b,c,d,A\n{line}\n")
    with pytest.raises(InputError, match=r"art_test\.csv:2: expected question, A, B, C, D, letter"):
        load_mmlu(tmp_path)


def test_mmlu_folders_with_missing_parts_are_refused(tmp_path):
    with pytest.raises(InputError, match="must hold test/SUBJECT_test.csv"):
        load_mmlu(tmp_path / "absent")
    (tmp_path / "test").mkdir()
    with pytest.raises(InputError, match="holds no SUBJECT_test.csv"):
        load_mmlu(tmp_path)
    write_mmlu(tmp_path, art_test="Q?,a,b,c,d,A\n")
    with pytest.raises(InputError, match=r"has no dev file: .*art_dev\.csv is missing"):
        load_mmlu(tmp_path)
