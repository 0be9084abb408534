"""Evaluation beside the plain loop that it must equal: one row after another through `model.generate`.

    python benchmarks/evaluation.py --model MODEL --forget forget.jsonl --retain retain.jsonl [--rows 100]
        [--mia-member M --mia-nonmember N] [--mmlu DIR] [--threads 2]

In one process and in turn, on the same rows: seconds of both and their ratio, by the clock and by the processor's
time (on a busy machine the truer one), the floor (one prefill of each row, alone), and how many rows differ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ray_unlearn.api.evaluation import eval_set
from ray_unlearn.data.questions import Question
from ray_unlearn.evaluation.generation import decode
from ray_unlearn.evaluation.mmlu import mmlu_prompt
from ray_unlearn.evaluation.scoring import ModelOutputs, score_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import compute, split_work
from ray_unlearn.models.loading import load_model, load_tokenizer
from ray_unlearn.records import Example

Seconds = tuple[float, float]
"""By the clock, and of the processor over all threads."""


def timed(work: Callable[[], Any]) -> tuple[Seconds, Any]:
    began = (time.perf_counter(), time.process_time())
    result = work()
    return (time.perf_counter() - began[0], time.process_time() - began[1]), result


def plain_texts(model: Any, tokenizer: Any, rows: Sequence[Example], max_new_tokens: int) -> list[str]:
    """The official loop: one row, no padding, transformers' own greedy search."""
    texts = []
    for row in rows:
        ids = torch.tensor([tokenizer(row.input)["input_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(decode(tokenizer, out[0, ids.shape[1] :].tolist()))
    return texts


def prefill(model: Any, tokenizer: Any, rows: Sequence[Example]) -> None:
    """The floor: each row's prompt and answer through the model once."""
    for row in rows:
        model(input_ids=torch.tensor([tokenizer(f"{row.input} {row.output}")["input_ids"]]), use_cache=False)


def plain_losses(model: Any, tokenizer: Any, documents: Sequence[str]) -> list[float]:
    losses = []
    for document in documents:
        ids = torch.tensor([tokenizer(document)["input_ids"]])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


def plain_choices(
    model: Any, tokenizer: Any, questions: Sequence[Question], dev: dict[str, list[Question]], shots: int
) -> list[int]:
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"]
    choices = []
    for question in questions:
        prompt = mmlu_prompt(question, dev[question.subject], shots, tokenizer, 2048)
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits
        choices.append(int(logits[0, -1, letters].argmax()))
    return choices


def some_questions(data: EvalSet, subjects: int, questions: int) -> list[Question]:
    """The first questions of some subjects: a whole MMLU shares each subject's examples among a hundred and more."""
    names = sorted(data.dev)
    chosen = names[:: max(1, len(names) // subjects)][:subjects]
    return [q for name in chosen for q in [q for q in data.questions if q.subject == name][:questions]]


def ours(model: Any, tokenizer: Any, data: EvalSet, settings: EvalSettings) -> ModelOutputs:
    units = split_work(data, settings)
    return ModelOutputs.of(units, [compute(unit, model, tokenizer, data, settings) for unit in units])


def show(name: str, plain: Seconds, fast: Seconds, rest: str) -> None:
    clock, processor = (p / f for p, f in zip(plain, fast, strict=True))
    print(
        f"{name:14} plain {plain[0]:7.2f} s   ours {fast[0]:7.2f} s   {clock:5.1f} times faster "
        f"({processor:.1f} by processor time)   {rest}",
        flush=True,
    )


def compare_texts(model: Any, tokenizer: Any, data: EvalSet, settings: EvalSettings) -> None:
    rows = [*data.forget, *data.retain]
    known = EvalSet(forget=data.forget, retain=data.retain)
    fast, measured = timed(lambda: ours(model, tokenizer, known, settings))
    alone, _ = timed(lambda: score_model(model, tokenizer, known, settings))
    plain, expected = timed(lambda: plain_texts(model, tokenizer, rows, settings.max_new_tokens))
    floor, _ = timed(lambda: prefill(model, tokenizer, rows))
    differ = [row.id for row, a, b in zip(rows, measured.texts, expected, strict=True) if a != b]
    said = sum(text.strip() == row.output.strip() for text, row in zip(expected, rows, strict=True))
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in expected)
    show("generations", plain, fast, f"{len(differ)} of {len(rows)} rows differ {differ[:5] or ''}")
    show("  scores alone", plain, alone, "no texts: rows end when their score is certain")
    show("  floor", plain, floor, "one prefill of each row, alone")
    print(f"  {said} rows say their answer to the letter; {tokens} tokens made")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "forget", "retain"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("adapter", "mia-member", "mia-nonmember", "mmlu"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--rows", type=int, help="rows of each split (default: all)")
    parser.add_argument("--subjects", type=int, default=3, help="MMLU subjects, evenly spread over the folder")
    parser.add_argument("--questions", type=int, default=20, help="questions of each subject; real ones have 100 up")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model, tokenizer = load_model(a.model, "float32", a.adapter), load_tokenizer(a.model)
    data = eval_set(a.forget, a.retain, a.mia_member, a.mia_nonmember, a.mmlu)
    settings = EvalSettings(max_new_tokens=a.max_new_tokens, batch_size=a.batch_size, mmlu_shots=a.shots)
    print(f"{a.model} {a.adapter or ''}: float32, {a.threads} threads, batches of {a.batch_size}")
    with torch.no_grad():
        prefill(model, tokenizer, data.forget[:2])  # what a first pass sets up is nobody's time
        compare_texts(model, tokenizer, EvalSet(forget=data.forget[: a.rows], retain=data.retain[: a.rows]), settings)
        if data.members:
            documents = EvalSet(members=data.members[: a.rows], nonmembers=data.nonmembers[: a.rows])
            plain, expected = timed(lambda: plain_losses(model, tokenizer, [*documents.members, *documents.nonmembers]))
            fast, measured = timed(lambda: ours(model, tokenizer, documents, settings))
            gap = max(abs(x - y) for x, y in zip(measured.losses, expected, strict=True))
            show("losses", plain, fast, f"largest difference {gap:.1e} over {len(expected)} documents")
        if data.questions:
            asked = EvalSet(questions=some_questions(data, a.subjects, a.questions), dev=data.dev)
            fast, measured = timed(lambda: ours(model, tokenizer, asked, settings))
            plain, chosen = timed(lambda: plain_choices(model, tokenizer, asked.questions, asked.dev, a.shots))
            differ = sum(x != y for x, y in zip(measured.choices, chosen, strict=True))
            show("MMLU", plain, fast, f"{differ} of {len(chosen)} choices differ")


if __name__ == "__main__":
    main()
