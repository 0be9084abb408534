"""MMLU choices are those of a loop over questions, in letters and in cloze."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from slow_scores import plain_cloze, plain_letters, questions

from ray_unlearn.data.questions import Question
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation import mmlu
from ray_unlearn.evaluation.mmlu import mmlu_prompt
from ray_unlearn.evaluation.scoring import score_model
from ray_unlearn.evaluation.spec import EvalSet, EvalSettings
from ray_unlearn.evaluation.work_units import mmlu_choices
from ray_unlearn.models.cached_passes import reads_in_pieces


def unprejudiced(tiny):
    """The model with a head of its own that sees what differs between questions, not what all of them share."""
    model = copy.deepcopy(tiny.model)
    ids = [tiny.tokenizer(f"{q.question}\nAnswer:")["input_ids"] for q in questions(tiny, 20)]
    last = [model.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    shared = torch.nn.functional.normalize(torch.stack(last).mean(0), dim=0)
    head = model.lm_head.weight.clone()
    model.lm_head.weight = torch.nn.Parameter(head - (head @ shared)[:, None] * shared, requires_grad=False)
    return model


@pytest.mark.parametrize("mode", ["cloze", "letters"])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_choices_are_those_of_a_loop_over_questions(tiny, mode, size):
    asked = [*questions(tiny, 30), Question("alone", "Which", ("a", "b b", "c", "d"), 0)]
    dev = {"towns": asked[:3], "far_places": asked[3:4], "alone": []}
    settings = EvalSettings(mmlu_mode=mode, mmlu_shots=2, batch_size=size)
    even = SimpleNamespace(model=unprejudiced(tiny), tokenizer=tiny.tokenizer)
    expected = [plain_cloze(even, q) if mode == "cloze" else plain_letters(even, q, dev, 2) for q in asked]
    assert len(set(expected)) > 1
    assert mmlu_choices(even.model, tiny.tokenizer, asked, dev, settings) == expected


def test_a_subjects_examples_are_computed_once(tiny):
    asked = [Question("towns", q.question, q.options, q.answer) for q in questions(tiny, 9)]
    model, calls = copy.deepcopy(tiny.model), []
    assert reads_in_pieces(model, 512)  # shown before the passes are counted
    model.register_forward_pre_hook(lambda m, a, given: calls.append(given["input_ids"].numel()), with_kwargs=True)
    settings = EvalSettings(mmlu_shots=3, batch_size=4)
    mmlu_choices(model, tiny.tokenizer, asked, {"towns": asked[:3]}, settings)
    whole = [len(tiny.tokenizer(mmlu_prompt(q, asked[:3], 3, tiny.tokenizer, 2048))["input_ids"]) for q in asked]
    assert len(calls) == 1 + 3 and sum(calls) < sum(whole) / 2


def test_the_accuracy_counts_each_question_once(tiny):
    asked = questions(tiny)
    settings = EvalSettings(mmlu_mode="cloze", batch_size=2)
    chosen = [plain_cloze(tiny, q) for q in asked]
    answers = [
        Question(q.subject, q.question, q.options, choice if i % 3 else (choice + 1) % 4)
        for i, (q, choice) in enumerate(zip(asked, chosen, strict=True))
    ]
    scores = score_model(tiny.model, tiny.tokenizer, EvalSet(questions=answers), settings)
    assert scores.utility == pytest.approx(8 / 12)


def test_shots_are_dropped_from_the_end_until_the_prompt_fits(tiny):
    asked = questions(tiny, 4)
    full = mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, 2048)
    bare = mmlu_prompt(asked[0], asked[1:], 0, tiny.tokenizer, 2048)
    size = len(tiny.tokenizer(full)["input_ids"])
    assert mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=size) == full
    fewer = mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=size - 1)
    assert fewer == mmlu_prompt(asked[0], asked[1:], 2, tiny.tokenizer, 2048) != full
    assert mmlu_prompt(asked[0], asked[1:], 3, tiny.tokenizer, limit=1) == bare  # the question itself always stays
    assert bare.startswith("The following are multiple choice questions (with answers) about  ")
    assert bare.endswith("\nAnswer:")


def test_questions_that_cannot_be_asked_are_refused(tiny):
    long = Question("towns", "far " * 600, ("a", "b", "c", "d"), 0)
    for mode in ("letters", "cloze"):
        with pytest.raises(
            InputError, match=r"towns \(question 1\): \d+ tokens without any example, .* model's context is 512"
        ):
            mmlu_choices(tiny.model, tiny.tokenizer, [long], {}, EvalSettings(mmlu_mode=mode))
    model = copy.deepcopy(tiny.model)
    next(model.parameters()).fill_(float("nan"))
    for mode in ("letters", "cloze"):
        with pytest.raises(InputError, match="NaN on MMLU"):
            mmlu_choices(model, tiny.tokenizer, questions(tiny, 2), {}, EvalSettings(mmlu_mode=mode))

    empty = Question("towns", "Which is ", ("a", "b", "", "d"), 0)
    with pytest.raises(InputError, match=r"towns \(question 1\): option C has no token to score"):
        mmlu_choices(tiny.model, tiny.tokenizer, [empty], {}, EvalSettings(mmlu_mode="cloze"))

    class Same:
        def __call__(self, text, **options):
            return {"input_ids": [3]}

    with pytest.raises(InputError, match="does not tell the letters A to D apart"):
        mmlu.letter_choices(tiny.model, Same(), questions(tiny, 2), {}, 0, 4)
