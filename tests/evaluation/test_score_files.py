"""`score` on 2,000 random prediction files, degenerate ones included, against a second, slow implementation."""

from __future__ import annotations

import json
import random
from fractions import Fraction

import pytest
from nltk.stem.porter import PorterStemmer

from ray_unlearn.api.evaluation import score
from ray_unlearn.errors import InputError

STEMMER = PorterStemmer()
WORDS = (
    "the a walked walking houses river Tosu 42 x1 née ΟΔΟΣ straße 東京 Mira's e-mail U.S. \u2028 İ ﬁne nan None".split(
        " "
    )
)
TASKS = ("Task1", "Task2", "Task3")
SPLITS = ("forget", "retain")


# -- the second implementation: exact fractions, recursion by definition -----------------------------


def words(text):
    """Runs of a-z and 0-9 of the lower-case text; those of more than three letters by their stem."""
    found, run = [], ""
    for letter in text.lower() + " ":
        if letter in "abcdefghijklmnopqrstuvwxyz0123456789":
            run += letter
        elif run:
            found.append(STEMMER.stem(run) if len(run) > 3 else run)
            run = ""
    return found


def common(a, b):
    """Length of the longest common subsequence."""
    rows = [[0] * (len(b) + 1)]
    for left in a:
        row = [0]
        for j, right in enumerate(b):
            row.append(rows[-1][j] + 1 if left == right else max(rows[-1][j + 1], row[-1]))
        rows.append(row)
    return rows[-1][-1]


def value(row):
    gold, said = row["expected_output"], row["model_output"]
    if row["kind"] == "qa":
        return Fraction(gold.strip().lower() == said.strip().lower())
    gold_words = words(gold)
    return Fraction(common(gold_words, words(said)), len(gold_words)) if gold_words else Fraction(0)


def second_opinion(rows, members, others, utility):
    cells = {}
    for row in rows:
        name = {"sc": "regurgitation", "qa": "knowledge"}[row["kind"]]
        cells.setdefault(f"{row['split']}/{row['task']}/{name}", []).append(value(row))
    raw = {key: sum(values) / len(values) for key, values in cells.items()}
    terms = {key: 1 - mean if key.startswith("forget") else mean for key, mean in raw.items()}
    zero = any(term == 0 for term in terms.values())
    aggregate = Fraction(0) if zero else len(terms) / sum(1 / term for term in terms.values())
    pairs = [Fraction(m < n) + Fraction(m == n, 2) for m in members for n in others]
    area = sum(pairs) / len(pairs)
    mia = 1 - 2 * abs(area - Fraction(1, 2))
    return raw, terms, aggregate, area, mia, (aggregate + mia + Fraction(utility)) / 3


# -- files -----------------------------------------------------------------------------------------


def said(rng, mood, gold):
    """What the model says: everything right, nothing, the same for all, or a mixture."""
    noise = " ".join(rng.choices(WORDS, k=rng.randint(0, 6)))
    if mood == "right":
        return rng.choice([gold, f" {gold}\n", gold.upper() if gold.upper().lower() == gold.lower() else gold])
    if mood == "wrong":
        return "zz " * rng.randint(1, 9)
    if mood == "empty":
        return rng.choice(["", " ", "\n"])
    part = " ".join(gold.split(" ")[: rng.randint(0, 4)])
    return rng.choice([gold, part, noise, f"{part} {noise}", f"{gold} {noise}", "", "nan", gold + ".", "\ufffd"])


def prediction_file(rng):
    mood = rng.choice(["right", "wrong", "empty", *["mixed"] * 7])
    moods = {split: rng.choice(["right", "wrong", mood]) for split in SPLITS}
    rows = []
    for task in rng.sample(TASKS, rng.randint(1, 3)):
        for kind in rng.choice([("sc",), ("qa",), ("sc", "qa"), ("sc", "qa")]):
            for split in SPLITS:
                for number in range(rng.randint(1, 3)):
                    gold = " ".join(rng.choices(WORDS, k=rng.randint(1, 7)))
                    gold = gold if gold.strip() else "a"
                    text = said(rng, moods[split], gold)
                    name = f"{task}{split}{number}{kind}1"
                    row = {"id": name, "kind": kind, "task": task, "split": split}
                    rows.append(row | {"expected_output": gold, "model_output": text})
    rng.shuffle(rows)
    return rows


def write(path, rows, ascii_only=True):
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "seeds", [range(300), pytest.param(range(300, 2000), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_files_score_as_the_second_implementation_says(tmp_path, seeds):
    aggregates = []
    for seed in seeds:
        rng = random.Random(seed)
        rows, utility = prediction_file(rng), rng.choice([0.0, 1.0, rng.random()])
        losses = {
            name: [rng.choice([0.0, 1e-9, 30.0, rng.random(), rng.randint(0, 3)]) for _ in range(rng.randint(1, 6))]
            for name in ("member", "nonmember")
        }
        mia = tmp_path / "losses.json"
        mia.write_text(json.dumps(losses))
        path = write(tmp_path / "p.jsonl", rows, ascii_only=bool(seed % 2))
        scores = score(path, mia=mia, mmlu_accuracy=utility)
        raw, terms, *parts = second_opinion(rows, losses["member"], losses["nonmember"], utility)
        assert scores.raw == pytest.approx({k: float(v) for k, v in raw.items()}, abs=1e-9), seed
        assert scores.terms == pytest.approx({k: float(v) for k, v in terms.items()}, abs=1e-9), seed
        found = (scores.task_aggregate, scores.mia_auc, scores.mia_score, scores.final)
        assert found == pytest.approx([float(part) for part in parts], abs=1e-9), seed
        aggregates.append(scores.task_aggregate)
    assert 200 < sum(value == 0 for value in aggregates) < 1800 and max(aggregates) == 1.0


def whole_file():
    return [
        {"id": f"{task}{split}{kind}1", "kind": kind, "task": task, "split": split}
        | {"expected_output": "a b", "model_output": "a"}
        for task in TASKS
        for kind in ("sc", "qa")
        for split in SPLITS
    ]


def test_a_split_that_lacks_a_task_is_refused(tmp_path):
    rows = whole_file()
    assert len(score(write(tmp_path / "p.jsonl", rows), official=True).terms) == 12
    for missing in rows:
        there, split = f"{missing['task']}/{missing['kind']}", missing["split"]
        left = [row for row in rows if row is not missing]
        with pytest.raises(InputError, match=f"same tasks and kinds: {split} lacks {there}"):
            score(write(tmp_path / "p.jsonl", left))
    with pytest.raises(InputError, match=r"missing \['Task2/qa', 'Task2/sc'\]"):
        score(write(tmp_path / "p.jsonl", [row for row in rows if row["task"] != "Task2"]), official=True)


def test_predictions_must_hold_each_row_that_was_asked_once(tmp_path):
    rows = whole_file()
    for split in SPLITS:
        asked = [
            {"id": row["id"], "task": row["task"], "input": f"q of {row['id']}", "output": "a b"}
            for row in rows
            if row["split"] == split
        ]
        write(tmp_path / f"{split}.jsonl", asked)
    known = {split: str(tmp_path) for split in SPLITS}
    path = tmp_path / "p.jsonl"
    assert score(write(path, rows), **known).task_aggregate == 0.0
    with pytest.raises(InputError, match=r"p.jsonl:2: id 'Task1forgetsc1' is already used in row 1"):
        score(write(path, [rows[0], *rows]), **known)
    extra = rows[0] | {"id": "Task1forget7sc1"}
    changed = rows[2] | {"expected_output": "a c"}
    with pytest.raises(InputError) as refusal:
        score(write(path, [rows[0], changed, extra, *rows[4:]]), **known)
    for part in (
        "4 problems",
        "retain row 'Task1retainsc1' is missing",
        "retain row 'Task1retainqa1' is missing",
        "forget row 'Task1forget7sc1' is not in",
        "forget row 'Task1forgetqa1' expects 'a c'",
    ):
        assert part in str(refusal.value)
    with pytest.raises(InputError, match="both --forget and --retain"):
        score(write(path, rows), forget=str(tmp_path))
