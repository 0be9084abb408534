"""MMLU questions over the tiny benchmark, and what a loop over them chooses."""

from __future__ import annotations

import random

import torch

from ray_unlearn.data.questions import Question


def questions(tiny, count=12):
    rng = random.Random(5)
    made = []
    for i in range(count):
        question, options, _ = rng.choice(tiny.data.facts)
        options = tuple(f"{option} {'of old ' * rng.randint(0, 2)}{i}" for option in options)
        made.append(Question(rng.choice(["towns", "far_places"]), question, options, rng.randrange(4)))
    return made


def plain_cloze(tiny, question):
    """Lowest mean token loss of the option's tokens after the bare question."""
    means = []
    for option in question.options:
        prompt = tiny.tokenizer(question.question)["input_ids"]
        ids = tiny.tokenizer(f"{question.question} {option}")["input_ids"]
        logps = tiny.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        values = [-logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        means.append(sum(values) / len(values))
    return means.index(min(means))


def plain_letters(tiny, question, dev, shots):
    """Most probable of the four letters' tokens after the few-shot prompt, its text spelled out here."""

    def block(q):
        a, b, c, d = q.options
        return f"{q.question}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"

    # Open-Instruct's format_subject puts a space before each word of the subject, the first one too.
    subject = "".join(" " + word for word in question.subject.split("_"))
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for shot in dev[question.subject][:shots]:
        text += f"{block(shot)} {'ABCD'[shot.answer]}\n\n"
    ids = tiny.tokenizer(text + block(question))["input_ids"]
    last = tiny.model(input_ids=torch.tensor([ids])).logits[0, -1]
    values = [last[tiny.tokenizer(f" {letter}")["input_ids"][-1]].item() for letter in "ABCD"]
    return values.index(max(values))
