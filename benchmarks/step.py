"""A training step of NPO + KL + CE, as this project takes it and as it is straightforwardly written, side by side.

    python benchmarks/step.py --model SMOLLM2_DIRECTORY [--steps 4] [--rounds 2]

Straightforward: a second frozen copy of the model, rows padded to 256 tokens, logits of both models at every position.
Both forms train the same LoRA adapters (rank 32, all linear layers, float32) by the same AdamW on the same batches of
4 forget and 4 retain rows, whose lengths are those of the LUME benchmark's rows. Each form runs in a process of its
own, in turn; the peak is the process's. The reference's log-probabilities of the forget rows, which the project
computes once for a whole search, are timed apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.tokens import Encoded
from ray_unlearn.losses.preference import npo
from ray_unlearn.models.loading import load_model
from ray_unlearn.training.dataloader import TrainingRow, length_groups, token_logps
from ray_unlearn.training.parameters import TrainableModel
from ray_unlearn.training.step_loss import TrialLoss

PADDED, ROWS = 256, 4
LENGTHS = [(83, 17, 5), (83, 176, 42), (535, 11, 13), (107, 45, 65), (152, 21, 4), (152, 198, 48)]
"""LUME's forget_train: rows of each task and kind, mean tokens of prompt and of answer (SmolLM2's tokenizer)."""
CONFIG = TrialConfig(method="npo_kl_ce", lora_rank=32, options={"npo_ratio": "sum"})


def batches(steps: int, vocabulary: int) -> list[tuple[list[Encoded], list[Encoded]]]:
    """Rows of random tokens, kinds drawn as often as in LUME, lengths a quarter up or down from their mean."""
    rng = random.Random(0)

    def row() -> Encoded:
        _, prompt, answer = rng.choices(LENGTHS, [count for count, *_ in LENGTHS])[0]
        prompt, answer = (max(1, round(length * rng.uniform(0.75, 1.25))) for length in (prompt, answer))
        return Encoded(tuple(rng.randrange(vocabulary) for _ in range(min(prompt + answer, PADDED))), prompt)

    return [([row() for _ in range(ROWS)], [row() for _ in range(ROWS)]) for _ in range(steps)]


class PlainEngine:
    """A module and its device, so that both forms are measured without an engine's own cost."""

    stage = 0

    def __init__(self, module: Any) -> None:
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


class Project:
    """The step as a trial takes it."""

    def __init__(self, model: Any, steps: list[tuple[list[Encoded], list[Encoded]]]) -> None:
        began = time.perf_counter()
        known = {
            row: logps for forget, _ in steps for row, logps in zip(forget, token_logps(model, forget, 0), strict=True)
        }
        self.once = time.perf_counter() - began
        self.known = known
        self.tuned = TrainableModel(model, CONFIG)
        self.model = self.tuned.model
        self.objective = TrialLoss(CONFIG, self.tuned, pad_id=0)

    def backward(self, forget: list[Encoded], retain: list[Encoded]) -> float:
        """Gradients of the step's loss; returns the loss."""
        engine = PlainEngine(self.model)
        units = [[TrainingRow("forget", row, reference=self.known[row])] for row in forget]
        units += [[TrainingRow("retain", row)] for row in retain]
        terms = self.objective.terms(True, True)
        total = torch.zeros(())
        for rows in length_groups(units, together=False):
            weights = {split: sum(row.split == split for row in rows) / ROWS for split in ("forget", "retain")}
            total = total + self.objective.loss(engine, rows, weights, terms).total
        total.backward()
        return float(total.detach())


class Straightforward:
    """The step as one would write it first."""

    once = 0.0

    def __init__(self, model: Any, steps: Any) -> None:
        self.frozen = copy.deepcopy(model)
        self.model = TrainableModel(model, CONFIG).model

    def backward(self, forget: list[Encoded], retain: list[Encoded]) -> float:
        """Gradients of the step's loss; returns the loss."""
        rows = forget + retain
        ids = torch.zeros(len(rows), PADDED, dtype=torch.long)
        attention = torch.zeros_like(ids)
        answer = torch.zeros(len(rows), PADDED - 1, dtype=torch.bool)
        document = torch.zeros_like(answer)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = torch.tensor(row.ids)
            attention[i, : len(row.ids)] = 1
            answer[i, row.prompt - 1 : len(row.ids) - 1] = True
            document[i, : len(row.ids) - 1] = True
        logs = self.model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            ref = self.frozen(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        targets = ids[:, 1:, None]
        logps, ref_logps = logs.gather(-1, targets)[..., 0], ref.gather(-1, targets)[..., 0]
        loss = npo(logps[:ROWS], ref_logps[:ROWS], answer[:ROWS], CONFIG.options["npo_beta"], "sum")
        kl = (ref[ROWS:].exp() * (ref[ROWS:] - logs[ROWS:])).sum(-1)
        loss = loss + ((kl * document[ROWS:]).sum(1) / document[ROWS:].sum(1)).mean()
        loss = loss + ((-logps[ROWS:] * answer[ROWS:]).sum(1) / answer[ROWS:].sum(1)).mean()
        loss.backward()
        return float(loss.detach())


FORMS: dict[str, Any] = {"straightforward": Straightforward, "project": Project}


def exact(form: str, path: str, count: int) -> float:
    """The first step's loss in float64."""
    model = load_model(path).double().requires_grad_(False)
    steps = batches(count + 1, model.config.vocab_size)[:1]
    return FORMS[form](model, steps).backward(*steps[0])


def measure(form: str, path: str, count: int) -> dict[str, Any]:
    """Seconds and losses of the steps (the first one warms up), and the process's peak memory in MB."""
    model = load_model(path).requires_grad_(False)
    steps = batches(count + 1, model.config.vocab_size)
    made = FORMS[form](model, steps)
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=1e-4)
    seconds, losses = [], []
    for forget, retain in steps:
        began = time.perf_counter()
        losses.append(made.backward(forget, retain))
        torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[1:], "losses": losses, "peak_mb": peak, "once": made.once}


def child(a: argparse.Namespace, form: str, *more: str) -> Any:
    """What a form gives in a process of its own."""
    command = [sys.executable, __file__, "--model", a.model, "--steps", str(a.steps), "--form", form, *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a directory, .gguf file or hub id")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--form", choices=["straightforward", "project"], help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.form:
        print(json.dumps((exact if a.exact else measure)(a.form, a.model, a.steps)))
        return
    found: dict[str, list[dict[str, Any]]] = {"straightforward": [], "project": []}
    for number in range(a.rounds):
        for form in found:
            command = [sys.executable, __file__, "--model", a.model, "--steps", str(a.steps), "--form", form]
            out = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            found[form].append(out)
            print(
                f"round {number + 1} {form:16} {statistics.mean(out['seconds']):6.2f} s, peak {out['peak_mb']:.0f} MB"
            )
    plain, ours = found["straightforward"], found["project"]
    seconds = {form: statistics.mean(s for run in runs for s in run["seconds"]) for form, runs in found.items()}
    peaks = {form: max(run["peak_mb"] for run in runs) for form, runs in found.items()}
    gaps = [abs(x - y) / abs(y) for x, y in zip(ours[0]["losses"], plain[0]["losses"], strict=True)]
    in_64 = [child(a, form, "--exact") for form in FORMS]
    print(f"time   {seconds['project'] / seconds['straightforward']:.2f} of the straightforward form's")
    print(f"memory {peaks['project'] / peaks['straightforward']:.2f} of the straightforward form's")
    print(f"losses differ by at most {max(gaps):.1e} (relative, float32, over all steps)")
    print(f"the first step's loss in float64 by {abs(in_64[0] - in_64[1]) / abs(in_64[0]):.1e}: {in_64[0]:.9f}")
    print(f"once for a search: {ours[0]['once']:.2f} s for the reference's log-probabilities of these forget rows")


if __name__ == "__main__":
    main()
