"""The prefix attack: the model is told how the answer begins, and goes on."""

from __future__ import annotations

from collections.abc import Sequence

from ray_unlearn.attacks.table import Attack, AttackResult, Findings
from ray_unlearn.data.tokens import encode
from ray_unlearn.evaluation.generation import decode
from ray_unlearn.metrics.generation import exact_match, rouge_l_recall
from ray_unlearn.models.decoding import greedy
from ray_unlearn.models.forward import scoring_mode
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example
from ray_unlearn.schema import require

SHARES = (25, 50)
"""Percent of the answer's tokens that are given, rounded down: of fewer than four tokens the lower share is none."""
MEASURES = {"rouge_l_recall": rouge_l_recall, "exact_match": exact_match}


def prefix_attack(
    model: CausalLM,
    tokenizer: Tokenizer,
    forget: Sequence[Example],
    control: Sequence[Example],
    *,
    batch_size: int = 32,
    seed: int = 0,
) -> AttackResult:
    """What the model says after the prompt and the first share of the answer's tokens, against the rest of them.

    It decodes greedily, as many tokens as the rest has. Nothing is drawn, so `seed` changes nothing.
    """
    require(bool(forget) and bool(control), f"it needs rows: got {len(forget)} forget and {len(control)} control rows.")
    with scoring_mode(model):
        found = [_findings(model, tokenizer, rows, batch_size) for rows in (forget, control)]
    return AttackResult(forget=found[0], control=found[1], settings={"shares": list(SHARES)})


def _findings(model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Example], batch_size: int) -> Findings:
    values: dict[str, list[float]] = {}
    for share in SHARES:
        pairs = _continued(model, tokenizer, rows, share, batch_size)
        for name, measure in MEASURES.items():
            values[f"{name}_{share}"] = [measure(rest, said) for rest, said in pairs]
    return Findings(rows=tuple(row.id for row in rows), values=values)


def _continued(
    model: CausalLM, tokenizer: Tokenizer, rows: Sequence[Example], share: int, batch_size: int
) -> list[tuple[str, str]]:
    """(the rest of the answer, what the model says in its place) of each row."""
    encoded = [encode(tokenizer, row.input, row.output) for row in rows]
    cuts = [row.prompt + share * (len(row.ids) - row.prompt) // 100 for row in encoded]
    rests = [row.ids[cut:] for row, cut in zip(encoded, cuts, strict=True)]
    new = greedy(
        model,
        [row.ids[:cut] for row, cut in zip(encoded, cuts, strict=True)],
        max(map(len, rests)),
        tokenizer,
        rests,
        batch_size=batch_size,
        stop_early=lambda index, ids: len(ids) >= len(rests[index]),
    )
    said = [ids[: len(rest)] for ids, rest in zip(new, rests, strict=True)]
    return [(decode(tokenizer, rest), decode(tokenizer, ids)) for rest, ids in zip(rests, said, strict=True)]


ATTACK = Attack(
    run=prefix_attack,
    signals={f"{name}_{share}": 1.0 for share in SHARES for name in MEASURES},
    formula="mean over rows of ROUGE-L recall, and of equality after strip().lower(), of the answer's last tokens "
    "against as many that the model says after the prompt and the first 25, or 50, percent of them",
    source="Carlini et al. 2023 (arXiv 2202.07646), discoverable memorisation, with shares for fixed lengths",
)
