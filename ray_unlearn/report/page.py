"""The report as one HTML page: gathers what the template shows, and says what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from ray_unlearn.merging import MERGES
from ray_unlearn.records import Candidate, MergeRecord, TrialRecord
from ray_unlearn.report import figures
from ray_unlearn.report.run import RunView
from ray_unlearn.report.table import GROUPS, TableRow, score_rows
from ray_unlearn.run_files import Final

SHOWN_CANDIDATES = 60


def render(run: RunView) -> str:
    """The page's HTML. Every value goes through autoescaping."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, signed=_signed, duration=_duration, interval=_interval)
    final = run.final
    model = _model_name(run.about["job"])
    groups = _score_groups(run)
    view: dict[str, object] = {
        "title": f"Unlearning of {model.rstrip('/').rpartition('/')[2]}",
        "run": run,
        "model": model,
        "final": final,
        "verdict": _verdict(run),
        "missing": _missing(run),
        "facts": _facts(run),
        "scores": groups,
        "scores_have_intervals": any(row.intervals != (None, None, None) for group in groups for row in group.rows),
        "has_reference": final is not None and final.reference is not None,
        "planes": _planes(run),
        **_recipes(run),
        "candidates": _candidate_rows(run),
        "has_intervals": any(c.scores.intervals for c in run.candidates),
        "told_apart": _told_apart(run),
        "shown": SHOWN_CANDIDATES,
        "failures": _failures(run),
        "examples": _examples(final),
        "job_yaml": _yaml(run.about["job"]),
        "recipe_yaml": _yaml(final.recipe if final else {}),
        "seconds": (run.summary or {}).get("seconds") or {},
        **_courses(run),
    }
    return environment.get_template("page.html.jinja").render(view)


def _model_name(job: Mapping[str, Any]) -> str:
    """The given model's path, the base it was made from, or the benchmark that made it."""
    model, target = job.get("model") or {}, job.get("target") or {}
    made = f"the {target['benchmark']} benchmark's target" if target.get("benchmark") else target.get("base")
    return str(model.get("path") or made or "a model not named")


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.3f} – {ends[1]:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _verdict(run: RunView) -> dict[str, str]:
    """One sentence on how the run came out, and the tone of its box: good, poor or open."""
    if run.final is None:
        return {"tone": "open", "text": _unfinished(run)}
    target, best = run.final.target, run.final.best
    start = f"The chosen {run.final.kind} {run.final.choice}"
    if best.final is None or target.final is None:
        return {"tone": "open", "text": f"{start} has no final score to compare: a part of it was not measured."}
    gain = best.final - target.final
    word = "above" if gain > 0 else "below" if gain < 0 else "the same as"
    compared = f"{start} scores {best.final:.3f}, {word} the target's {target.final:.3f}"
    allowed = run.feasible(best, target)
    if allowed is None:
        return {"tone": "open", "text": f"{compared}; whether it is feasible is not known: no utility floor."}
    least = (run.floor or 0) * (target.utility or 0)
    bound = f"its utility of {best.utility:.3f} is {'above' if allowed else 'not above'} the floor of {least:.3f}"
    text = f"{compared}, and it is {'feasible' if allowed else 'not feasible'}: {bound} ({run.floor:g} × the target's)."
    return {"tone": "good" if allowed and gain > 0 else "poor", "text": text}


def _unfinished(run: RunView) -> str:
    """The verdict of a run that has chosen nothing yet."""
    scored = [(c.scores.final, c.id) for c in run.candidates if c.scores.final is not None]
    if not scored:
        return "Nothing has been chosen: this run has no scored candidate yet."
    final, identity = max(scored)
    text = f"Nothing has been chosen yet. The highest final score so far is {final:.3f}, of {identity}"
    if run.baseline is not None and run.baseline.final is not None:
        text += f"; the target scores {run.baseline.final:.3f} on the same documents"
    return f"{text}."


def _missing(run: RunView) -> list[str]:
    """What a finished run would have and this one has not, in plain words."""
    statuses = Counter(trial.status for trial in run.trials)
    notes = [
        (run.baseline is None, "baseline.json: the target has not been scored, so no utility floor is drawn."),
        (not run.trials, "Trials: none has ended yet."),
        (
            bool(run.trials) and statuses["failed"] == len(run.trials),
            f"Trials: all {len(run.trials)} on record failed; see the reasons below.",
        ),
        (not run.merges, "Merges: none on record."),
        (
            bool(run.merges) and all(merge.status == "failed" for merge in run.merges),
            f"Merges: all {len(run.merges)} on record failed; see the reasons below.",
        ),
        (run.front is None, "front.json: the front has not been computed."),
        (run.final is None, "final.json: no candidate has been chosen and scored on unseen MIA documents."),
        (run.summary is None, "summary.json: the run has not ended, so there are no seconds by stage."),
    ]
    return [text for absent, text in notes if absent]


def _facts(run: RunView) -> list[tuple[str, str]]:
    """The counts at the head of the page."""
    facts = []
    for noun, records in (("trial", run.trials), ("merge", run.merges)):
        statuses = Counter(record.status for record in records)
        parts = ", ".join(f"{statuses[s]} {s}" for s in ("finished", "stopped", "failed") if statuses[s])
        facts.append((_count(len(records), noun), parts or "none on record"))
    facts.append((_count(len(run.candidates), "candidate"), "snapshots and merges with scores"))
    if run.front is not None:
        without = _number(run.front.hypervolume_trials)
        facts.append((f"{len(run.front_ids)} on the front", "no other is at least as good in all three objectives"))
        facts.append((_number(run.front.hypervolume), f"hypervolume of the front; without merges {without}"))
    return facts


class ScoreGroup(NamedTuple):
    """Measures under one heading."""

    name: str
    rows: list[TableRow]


def _score_groups(run: RunView) -> list[ScoreGroup]:
    """Target against best; before the end, the target alone on the documents of the search."""
    final = run.final
    if final is None:
        rows = score_rows(run.baseline, None) if run.baseline else []
    else:
        rows = score_rows(final.target, final.best, final.reference)
    groups = dict.fromkeys(row.group for row in rows)
    return [ScoreGroup(GROUPS.get(group, group), [r for r in rows if r.group == group]) for group in groups]


def _planes(run: RunView) -> list[figures.Picture]:
    if not run.candidates and run.baseline is None:
        return []
    return figures.planes(
        run.candidates,
        target=run.baseline,
        infeasible={c.id for c in run.candidates if run.feasible(c.scores) is False},
        front=set(run.front_ids),
        choice=run.choice,
        least_utility=run.least_utility,
    )


def _courses(run: RunView) -> dict[str, object]:
    """The figure of the courses and the trials it highlights, with why."""
    drawn = [trial for trial in run.trials if trial.status != "failed" and trial.snapshots]
    owners = {snapshot.id: trial.id for trial in drawn for snapshot in trial.snapshots}
    recipe = run.final.recipe if run.final else {}
    if run.choice in owners:
        why, wanted = "the trial of the choice", [owners[run.choice]]
    elif run.choice is not None:
        why = "the trials that the chosen merge was made of"
        leaves = recipe.get("member_trials") or recipe.get("members") or ()  # a member may be a merge itself
        wanted = [owners[name] for name in leaves if name in owners] if isinstance(leaves, (dict, list)) else []
    else:
        scored = [(s.scores.final, trial.id) for trial in drawn for s in trial.snapshots if s.scores.final is not None]
        why, wanted = "the trial with the highest final so far", [max(scored)[1]] if scored else []
    unique = list(dict.fromkeys(wanted))
    colours = {trial: figures.HIGHLIGHTS[i % len(figures.HIGHLIGHTS)] for i, trial in enumerate(unique)}
    pictures = (
        figures.courses(
            drawn,
            target=run.baseline,
            highlighted=colours,
            choice=run.choice,
            least_utility=run.least_utility,
        )
        if drawn
        else []
    )
    return {"courses": pictures, "highlighted": colours, "highlighted_why": why}


def _recipes(run: RunView) -> dict[str, object]:
    """The figures of the merges, and the colours of their methods."""
    methods = list(dict.fromkeys(str(merge.recipe.get("method")) for merge in run.merges if merge.scores))
    colours = {method: figures.METHODS[i % len(figures.METHODS)] for i, method in enumerate(methods)}
    aucs = {c.id: c.scores.mia_auc for c in run.candidates if c.scores.mia_auc is not None}
    snapshots = [
        c.scores
        for c in run.candidates
        if not isinstance(c.record, MergeRecord) and c.scores.final is not None and run.feasible(c.scores) is not False
    ]
    pictures = figures.recipes(
        run.merges,
        colours=colours,
        thinned={name for name, method in MERGES.items() if method.uses_density},
        best_snapshot=max(snapshots, key=lambda scores: scores.final or 0.0, default=None),
        choice=run.choice,
    )
    pictures += figures.balance(run.merges, aucs=aucs, colours=colours, choice=run.choice)
    return {"recipes": pictures, "merge_colours": colours}


def _candidate_rows(run: RunView) -> list[dict[str, object]]:
    """All candidates: the front's members first, then by final; the template cuts the list."""
    front = set(run.front_ids)

    def place(candidate: Candidate) -> tuple[bool, float, str]:
        final = candidate.scores.final
        return candidate.id not in front, -(final if final is not None else -1.0), candidate.id

    return [
        {
            "id": candidate.id,
            "kind": "merge" if isinstance(candidate.record, MergeRecord) else "snapshot",
            "method": _method(candidate),
            "scores": candidate.scores,
            "feasible": {True: "yes", False: "no", None: "not known"}[run.feasible(candidate.scores)],
            "front": candidate.id in front,
            "choice": candidate.id == run.choice,
        }
        for candidate in sorted(run.candidates, key=place)
    ]


def _told_apart(run: RunView) -> str:
    """How many other feasible candidates have a final score in the interval of the choice; empty where not known."""
    chosen = next((c.scores for c in run.candidates if c.id == run.choice), None)
    ends = chosen.intervals.get("final") if chosen else None
    if chosen is None or ends is None:
        return ""
    others = [c.scores for c in run.candidates if c.id != run.choice and run.feasible(c.scores) is not False]
    within = sum(scores.final is not None and ends[0] <= scores.final <= ends[1] for scores in others)
    text = f"The choice's final of {_number(chosen.final)} has the 95 % interval {_interval(ends)}. "
    if not within:
        return text + "No other feasible candidate lies within it."
    return text + f"{_count(within, 'other feasible candidate')} within it: differences this small may be noise."


def _method(candidate: Candidate) -> str:
    if isinstance(candidate.record, MergeRecord):
        recipe = candidate.record.recipe
        return f"{recipe.get('method', '–')} of {len(recipe.get('members', []))}"
    return str(candidate.record.config.get("method", "–"))


def _failures(run: RunView) -> list[TrialRecord | MergeRecord]:
    records: list[TrialRecord | MergeRecord] = [*run.trials, *run.merges]
    return [record for record in records if record.status != "finished"]


def _examples(final: Final | None) -> list[dict[str, object]]:
    examples = final.examples if final else ()
    notes = {
        "forget": "These rows should be forgotten: after, the answer should no longer be the expected text.",
        "retain": "These rows should be kept: after, the answer should still be the expected text.",
    }
    return [
        {"split": split, "note": note, "rows": [e for e in examples if e.split == split]}
        for split, note in notes.items()
        if any(e.split == split for e in examples)
    ]
