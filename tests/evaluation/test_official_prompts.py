"""MMLU's prompts are, letter by letter, those of Open-Instruct's evaluation, which reads the files with pandas."""

from __future__ import annotations

import os
from pathlib import Path

import pandas
import pytest

from ray_unlearn.data.questions import load_mmlu
from ray_unlearn.evaluation import mmlu
from ray_unlearn.evaluation.mmlu import mmlu_prompt

ODD = {
    "plain_words": 'Née?,a,"b, c","d ""e""",f,B\n',
    "line_ends": '"Which,\r\nand why?",a,b,"c\r\nd",e,A\r\n"Two\nlines?","x\ny",b,c,d,C\r\n',
    "no_answer": 'Q?,None,NA,nan,null,A\nQ2?,N/A,"",a,b,B\nNone of these?, None,none,c,d,D\n',
    "whole_numbers": "1+1?,1,2,03,4,B\n2+2?,1,2,3,4,D\n",
    "fractions": "1/2?,0.5,1,2.50,1e3,A\n3/2?,3,1.5,2,7,B\n",
    "numbers_with_a_gap": "1?,1,1,1,1,A\n2?,2,,2,None,A\n",
    "truth": "So?,True,False,TRUE,a,A\nNo?,False,False,True,b,B\n",
    "huge_numbers": "Most?,99999999999999999999,1,2,3,A\nLeast?,1,12345678901234567,0,1,B\n",
}


def official_prompt(dev, test, row, subject, shots):
    """Open-Instruct's gen_prompt and format_example, as they join what pandas read."""

    def block(frame, row, with_answer):
        text = frame.iloc[row, 0]
        for column, letter in enumerate("ABCD", start=1):
            text += f"\n{letter}. {frame.iloc[row, column]}"
        return f"{text}\nAnswer:" + (f" {frame.iloc[row, 5]}\n\n" if with_answer else "")

    text = "The following are multiple choice questions (with answers) about "
    text += "".join(f" {word}" for word in subject.split("_")) + ".\n\n"
    return text + "".join(block(dev, i, True) for i in range(min(shots, len(dev)))) + block(test, row, False)


class NoTokens:
    """Finds every prompt short enough."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": []}


def differing(folder, shots=5):
    """Prompts that are not the official ones, of how many."""
    dev, questions = load_mmlu(folder)
    frames = {
        (part, subject): pandas.read_csv(folder / part / f"{subject}_{part}.csv", header=None)
        for subject in dev
        for part in ("dev", "test")
    }
    found, rows = [], dict.fromkeys(dev, 0)
    for question in questions:
        subject = question.subject
        frames_of = (frames["dev", subject], frames["test", subject])
        expected = official_prompt(*frames_of, rows[subject], subject, shots)
        rows[subject] += 1
        if mmlu_prompt(question, dev[subject], shots, NoTokens(), 2048) != expected:
            found.append(question.place)
    return found, len(questions)


def write(folder, files):
    for part in ("dev", "test"):
        (folder / part).mkdir()
        for subject, text in files.items():
            (folder / part / f"{subject}_{part}.csv").write_bytes(text.encode())


def test_odd_fields_are_printed_as_pandas_reads_them(tmp_path):
    write(tmp_path, ODD)
    assert differing(tmp_path) == ([], 16)


def test_a_byte_order_mark_is_no_part_of_a_question(tmp_path):
    write(tmp_path, {"marked": "\ufeffWho?,a,b,c,d,A\n"})
    assert differing(tmp_path) == ([], 1)


def test_cloze_scores_what_the_file_says(tmp_path):
    write(tmp_path, ODD)
    _, questions = load_mmlu(tmp_path)
    gaps = [q for q in questions if q.subject == "numbers_with_a_gap"]
    assert gaps[1].options == ("2", "", "2", "None") and gaps[1].printed == ("2?", "2", "nan", "2", "nan")
    assert mmlu.mmlu_prompt(gaps[1], [], 0, NoTokens(), 2048).endswith("2?\nA. 2\nB. nan\nC. 2\nD. nan\nAnswer:")
    assert next(q for q in questions if q.subject == "plain_words").printed == ()


REAL = os.environ.get("MMLU")


@pytest.mark.skipif(REAL is None, reason="MMLU names no folder with the published dev/ and test/ files")
def test_every_prompt_of_the_published_files_is_the_official_one():
    found, count = differing(Path(REAL))
    assert not found and count == 14_042
