"""Files to examples to batches: what is read, what is refused and how, and which tokens count as the answer."""

from __future__ import annotations

import json
import random

import pytest

from ray_unlearn import files
from ray_unlearn.data import rows as data
from ray_unlearn.data.rows import check_cells, find_file, limit_documents, load_documents, load_pair
from ray_unlearn.data.tokens import by_length
from ray_unlearn.errors import InputError
from ray_unlearn.records import Example


def row(name="a1sc1", **changes):
    return {"id": name, "input": f"prompt of {name}", "output": "answer", "task": "Task1", "split": "x", **changes}


def write(path, rows):
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def load_examples(path, stem, skip_bad=False):
    """One file alone; the package loads forget and retain together."""
    file = data._scan(find_file(path, stem), data.ROW_FIELDS)
    data._refuse(file.problems, [file], skip_bad)
    examples = [data._example(row) for _, row in file.rows]
    return data.Loaded(examples, len(file.problems), files.file_digest(file.path))


# -- good files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", [write, write_parquet])
def test_good_rows_are_read_in_order_with_their_kind(tmp_path, writer):
    rows = [row('"6adb-4b"sc1'), row('"6adb-4b"qa0', input=" Née? ", output="né\nx"), row("sc2"), row("plain-qa9")]
    path = writer(tmp_path / f"rows.{'jsonl' if writer is write else 'parquet'}", rows)
    loaded = load_examples(path, "forget")
    assert loaded.dropped == 0
    assert [example.kind for example in loaded.examples] == ["sc", "qa", "sc", "qa"]
    for example, given in zip(loaded.examples, rows, strict=True):
        assert (example.id, example.input, example.output, example.task) == tuple(
            given[name] for name in ("id", "input", "output", "task")
        )


@pytest.mark.parametrize("writer", [write, write_parquet])
def test_a_kind_column_wins_over_the_id(tmp_path, writer):
    rows = [row("x1sc1", kind="qa"), row("anything", kind="sc"), row("y1qa1", kind=None)]
    path = writer(tmp_path / f"rows.{'jsonl' if writer is write else 'parquet'}", rows)
    assert [example.kind for example in load_examples(path, "forget").examples] == ["qa", "sc", "qa"]


def test_a_directory_holds_its_split_under_its_name(tmp_path):
    write_parquet(tmp_path / "retain.parquet", [row("r1sc1")])
    write(tmp_path / "forget.jsonl", [row("f1sc1")])
    assert load_examples(tmp_path, "forget").examples[0].id == "f1sc1"
    assert load_examples(str(tmp_path), "retain").examples[0].id == "r1sc1"
    assert find_file(tmp_path, "forget").name == "forget.jsonl"
    (tmp_path / "forget.jsonl").unlink()
    with pytest.raises(InputError, match=r"holds no forget.jsonl or forget.parquet; it has: retain.parquet"):
        load_examples(tmp_path, "forget")


def test_windows_line_ends_blank_lines_and_separators_inside_text_are_no_rows(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\r\n".join([json.dumps(row("a1sc1")).encode(), b"", json.dumps(row("a2sc1")).encode(), b""]))
    assert [example.id for example in load_examples(path, "f").examples] == ["a1sc1", "a2sc1"]
    write(path, [row("a1sc1", output="one\u2028two\u0085three")])  # splitlines() would break this row
    assert load_examples(path, "f").examples[0].output == "one\u2028two\u0085three"


def test_the_digest_is_that_of_the_files_bytes(tmp_path):
    one, other = write(tmp_path / "a.jsonl", [row()]), write(tmp_path / "b.jsonl", [row()])
    assert load_examples(one, "x").digest == load_examples(other, "x").digest
    write(other, [row(output="else")])
    assert load_examples(one, "x").digest != load_examples(other, "x").digest


# -- refusals --------------------------------------------------------------------------------------


def without(name):
    kept = row("b1sc1")
    del kept[name]
    return kept


BAD_ROWS = [
    *[(without(name), f"field '{name}' is missing") for name in ("id", "input", "output", "task")],
    *[(row("b1sc1", **{name: ""}), f"field '{name}' is empty") for name in ("id", "input", "output", "task")],
    (row("b1sc1", output=" \n"), "field 'output' is empty"),
    (row("b1sc1", output=7), "field 'output' must be text, got 7"),
    (row("b1sc1", input=None), "field 'input' must be text, got None"),
    (row("b1sc1", task=["Task1"]), r"field 'task' must be text, got \['Task1'\]"),
    (row("b1xx1"), "id 'b1xx1' does not end in sc or qa"),
    (row("b1sc"), "id 'b1sc' does not end in sc or qa"),
    (row("b1sc1", kind="other"), "kind must be sc or qa, got 'other'"),
    (row("b1sc1", alternate=row()["output"]), "alternate is the output itself"),
    (row("b1sc1", perturbed="one"), "perturbed must be a list of texts, got 'one'"),
    (row("b1sc1", perturbed=["one", ""]), "field 'perturbed' is empty"),
    (row("b1sc1", perturbed=["one", row()["output"]]), "perturbed holds the output itself"),
    (row("b1sc1", paraphrased=7), "paraphrased must be a text or a list of texts, got 7"),
    (row("b1sc1", paraphrased=["one", " "]), "field 'paraphrased' is empty"),
    (row("b1sc1", paraphrased=row()["output"]), "paraphrased holds the output itself"),
    (row("b1sc1", paraphrased="one", perturbed=["two", "one"]), "perturbed holds the paraphrased answer 'one'"),
    (json.dumps(row("b1sc1", output="half \ud800")), "field 'output' holds half of a surrogate pair"),
    ("[" * 100_000, "broken JSON"),
    (row("a1sc1"), "id 'a1sc1' is already used in row 1"),
    ('{"id": "b1sc1",', "broken JSON"),
    ('["b1sc1"]', "a row must be a JSON object"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_file_and_row_and_can_be_skipped(tmp_path, bad, message):
    path = write(tmp_path / "forget.jsonl", [row("a1sc1"), bad, row("c1sc1")])
    with pytest.raises(InputError, match=rf"1 bad rows:\n  .*forget\.jsonl:2: {message}"):
        load_examples(path, "forget")
    loaded = load_examples(path, "forget", skip_bad=True)
    assert [example.id for example in loaded.examples] == ["a1sc1", "c1sc1"] and loaded.dropped == 1


def test_a_bad_parquet_row_is_refused_with_its_row(tmp_path):
    path = write_parquet(tmp_path / "forget.parquet", [row("a1sc1"), row("b1sc1"), row("c1sc1", output=None)])
    with pytest.raises(InputError, match=r"forget\.parquet:3: field 'output' must be text, got None"):
        load_examples(path, "forget")
    assert load_examples(path, "forget", skip_bad=True).dropped == 1


def test_wrong_answers_are_read_from_either_kind_of_file(tmp_path):
    rows = [row("a1sc1", perturbed=["one", "two"]), row("b1sc1", perturbed=[]), row("c1sc1")]
    for path in (write(tmp_path / "f.jsonl", rows), write_parquet(tmp_path / "f.parquet", rows)):
        assert [example.perturbed for example in load_examples(path, "f").examples] == [("one", "two"), (), ()]


def test_a_paraphrase_is_a_text_or_a_list_of_texts(tmp_path):
    rows = [row("a1sc1", paraphrased=["one", "two"]), row("b1sc1", paraphrased=[]), row("c1sc1")]
    for path in (write(tmp_path / "f.jsonl", rows), write_parquet(tmp_path / "f.parquet", rows)):
        assert [example.paraphrased for example in load_examples(path, "f").examples] == [("one", "two"), (), ()]
    path = write_parquet(tmp_path / "one.parquet", [row("a1sc1", paraphrased="one"), row("b1sc1")])
    assert [example.paraphrased for example in load_examples(path, "f").examples] == [("one",), ()]


def test_blank_lines_count_in_row_numbers(tmp_path):
    path = write(tmp_path / "forget.jsonl", [row("a1sc1"), "", "", row("b1xx1")])
    with pytest.raises(InputError, match=r"forget\.jsonl:4: "):
        load_examples(path, "forget")


@pytest.mark.parametrize(("count", "shown", "more"), [(20, 20, None), (21, 20, 1), (73, 20, 53)])
def test_the_first_twenty_bad_rows_are_shown_then_a_count(tmp_path, count, shown, more):
    path = write(tmp_path / "forget.jsonl", [row("a1sc1")] + [row(f"b{i}xx1") for i in range(count)])
    with pytest.raises(InputError) as caught:
        load_examples(path, "forget")
    message = str(caught.value)
    assert message.startswith(f"{count} bad rows:") and message.count("forget.jsonl:") == shown
    assert f"forget.jsonl:{shown + 1}: " in message and "--skip-bad-rows" in message
    assert (f"... and {more} more" in message) if more else ("more" not in message)
    assert load_examples(path, "forget", skip_bad=True).dropped == count


def test_empty_unreadable_and_absent_files_are_refused(tmp_path):
    for content in ("", "\n\n"):
        (tmp_path / "f.jsonl").write_text(content)
        with pytest.raises(InputError, match=r"f\.jsonl has no rows; at least one is needed"):
            load_examples(tmp_path / "f.jsonl", "forget")
    write(tmp_path / "f.jsonl", [row("b1xx1")])
    with pytest.raises(InputError, match=r"has no good rows"):
        load_examples(tmp_path / "f.jsonl", "forget", skip_bad=True)
    (tmp_path / "f.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(InputError, match="is not UTF-8 text"):
        load_examples(tmp_path / "f.jsonl", "forget")
    (tmp_path / "f.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match="is not a readable parquet file"):
        load_examples(tmp_path / "f.parquet", "forget")
    with pytest.raises(InputError, match=r"no such file: .*absent\.jsonl"):
        load_examples(tmp_path / "absent.jsonl", "forget")
    (tmp_path / "f.csv").write_text("id\n")
    with pytest.raises(InputError, match=r"must end in .jsonl or .parquet, got '.csv'"):
        load_examples(tmp_path / "f.csv", "forget")


def example(name="a1sc1", task="Task1", kind="sc", input="p", output="a"):
    return Example(id=name, input=input, output=output, task=task, kind=kind)


def test_bad_rows_of_both_files_and_rows_in_both_are_listed_together_or_dropped(tmp_path):
    forget = write(tmp_path / "forget.jsonl", [row("f1sc1", input="same"), row("f2xx1"), row("f3sc1", input="mine")])
    retain = write(
        tmp_path / "retain.jsonl",
        [row("r1sc1"), "{", row("r3sc1", input="same"), row("r4sc1", input="same", output="b")],
    )
    with pytest.raises(InputError) as caught:
        load_pair(forget, retain)
    message = str(caught.value)
    assert message.startswith("3 bad rows:") and "forget.jsonl:2: id" in message and "retain.jsonl:2: broken" in message
    assert f"{forget}:1: the same row is in {retain}:3" in message
    left, right = load_pair(forget, retain, skip_bad=True)
    assert [example.id for example in left.examples] == ["f3sc1"] and left.dropped == 2
    assert [example.id for example in right.examples] == ["r1sc1", "r4sc1"] and right.dropped == 2


def test_splits_with_unlike_tasks_or_kinds_are_refused_by_their_missing_cells():
    forget = [example(), example(task="Task2", kind="qa")]
    retain = [example(input="q"), example(input="q2", task="Task3", kind="sc")]
    with pytest.raises(InputError, match="retain lacks Task2/qa; forget lacks Task3/sc"):
        check_cells(forget, retain)


def test_documents_are_read_in_order_and_checked(tmp_path):
    path = write(tmp_path / "mia.jsonl", [{"id": "1", "document": "one"}, {"id": "2", "document": "two"}])
    assert load_documents(path) == ["one", "two"]
    write(path, [{"id": "1", "document": "one"}, {"id": "1", "document": "two"}])
    with pytest.raises(InputError, match=r"mia\.jsonl:2: id '1' is already used in row 1"):
        load_documents(path)
    write(path, [{"id": "1", "text": "one"}])
    with pytest.raises(InputError, match=r"mia\.jsonl:1: field 'document' is missing"):
        load_documents(path)


# -- limits and groups -----------------------------------------------------------------------------


def test_limit_keeps_the_first_whole_documents_of_each_task():
    names = [("Task1", "d1sc1"), ("Task1", "d2sc1"), ("Task2", "d3sc1"), ("Task1", "d1qa0"), ("Task2", "d4qa1")]
    rows = [example(name, task) for task, name in names]
    assert [e.id for e in limit_documents(rows, 1)] == ["d1sc1", "d3sc1", "d1qa0"]
    assert [e.id for e in limit_documents(rows, {"Task1": 2})] == ["d1sc1", "d2sc1", "d1qa0"]
    assert limit_documents(rows, None) == rows and limit_documents(rows, 99) == rows
    with pytest.raises(InputError, match=r"unknown task in data.limit: 'task1'. Did you mean 'Task1'\?"):
        limit_documents(rows, {"task1": 2, "Task2": 1})


@pytest.mark.parametrize("seed", range(10))
def test_by_length_covers_every_index_once_in_groups_of_rising_length(seed):
    rng = random.Random(seed)
    items = ["x" * rng.randint(0, 9) for _ in range(rng.randint(0, 30))]
    size = rng.randint(1, 7)
    groups = by_length(items, len, size)
    order = [i for group in groups for i in group]
    assert sorted(order) == list(range(len(items)))
    assert all(len(group) == size for group in groups[:-1]) and all(0 < len(group) <= size for group in groups)
    assert [len(items[i]) for i in order] == sorted(map(len, items))


# -- tokens ----------------------------------------------------------------------------------------


# -- MMLU ------------------------------------------------------------------------------------------
