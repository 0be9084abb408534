"""The README.md that goes with the chosen model: what was done to it, what it scored, what that does not show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.records import Scores
from ray_unlearn.report.table import GROUPS, score_rows
from ray_unlearn.run_files import DocumentCounts, Final

LIMITS = """\
- Only the documents that are no members in the membership test are new to the search. The forget and retain
  terms and the utility come from rows that the search also scored its candidates on, so they may flatter the choice.
- The membership test compares losses of whole documents. It shows nothing about stronger attacks.
- Forget terms compare greedy answers to the prompts of the forget set. Paraphrased prompts, other languages,
  sampling, jailbreaks and attacks on the weights were not tried, so knowledge may still be reachable.
- Nothing here shows whether the forgotten text comes back after fine-tuning or quantisation.
- Utility is one test on a limited number of questions; other abilities and safety behaviour were not measured.
- The scores describe behaviour. They are no proof that the data's influence is gone."""


def model_card(job: Mapping[str, Any], final: Final, versions: Mapping[str, str]) -> str:
    """README.md of the chosen model, with Hugging Face front matter.

    `job` is the whole of job.yaml (job, data_digests, git_commit).
    """
    settings = job.get("job", {})
    path = str((settings.get("model") or {}).get("path") or "")
    return "\n".join(
        [
            _front_matter(path),
            f"# Unlearned {_text(path.rstrip('/').rpartition('/')[2]) or 'model'}\n",
            *_what_was_done(path, final),
            *_scores(final.target, final.best, final.reference),
            *_candidate(final),
            "## Data\n",
            *_table(("data", "digest"), sorted((job.get("data_digests") or {}).items())),
            *_documents(final.mia_documents),
            "## Limits\n",
            LIMITS + "\n",
            "## Versions\n",
            *_table(("library", "version"), sorted(versions.items())),
            f"Commit of ray_unlearn: {_text(job.get('git_commit') or 'not known')}.\n",
            "<details>\n<summary>The job</summary>\n",
            _yaml_block(settings),
            "</details>\n",
        ]
    )


def merge_card(plan: Mapping[str, Any]) -> str:
    """README.md of a merge made by hand: the content of its merge.json, from which it can be made again."""
    method, members = _code(plan["method"]), ", ".join(_code(member) for member in plan["members"])
    return "\n".join(
        [
            _front_matter(str(plan["base"])),
            "# Merged model\n",
            f"A merge by ray_unlearn over the base {_code(plan['base'])}; not scored.\n",
            "## Merge recipe\n",
            f"Method {method}; members {members}. `ray-unlearn merge --recipe` takes this file.\n",
            _yaml_block(plan),
        ]
    )


def _front_matter(path: str) -> str:
    values: dict[str, object] = {"library_name": "transformers", "tags": ["unlearning", "ray_unlearn"]}
    # the hub resolves base_model, so a folder on this machine must not be named there
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) and not Path(path).exists():
        values["base_model"] = path
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _what_was_done(path: str, final: Final) -> list[str]:
    kind = "a merge of snapshots" if final.kind == "merge" else "a snapshot of one trial"
    return [
        f"This model was made from {_code(path) if path else 'a target model'} by unlearning: training and merging "
        "meant to make it forget a set of rows while it keeps the rest. ray_unlearn searched over trials and merges; "
        f"{_code(final.choice)} was chosen, {kind}.\n",
        f"Final score: {_number(final.target.final)} before, {_number(final.best.final)} after.\n",
        *([f"Rule of the choice: {_text(final.rule)}\n"] if final.rule else []),
    ]


def _scores(target: Scores, best: Scores, reference: Scores | None) -> list[str]:
    head = ("measure", "meaning", "rows", "before", "after", *(("retrained",) if reference else ()))
    lines = ["## Scores\n", "Both models on the same rows and documents.\n"]
    rows = score_rows(target, best, reference)
    columns = 3 if reference else 2
    for group in dict.fromkeys(row.group for row in rows):
        cells = [
            (row.name, row.meaning, "" if row.count is None else row.count)
            + tuple(map(_estimate, (row.target, row.best, row.reference)[:columns], row.intervals))
            for row in rows
            if row.group == group
        ]
        lines += [f"### {GROUPS.get(group, group)}\n", *_table(head, cells)]
    if best.intervals:
        lines.append("In brackets: 95 % bootstrap intervals over documents. They show no randomness of training.\n")
    if reference:
        lines.append("`retrained` is a model trained without the forget set: what perfect forgetting would score.\n")
    return lines


def _candidate(final: Final) -> list[str]:
    recipe, names = final.recipe, final.recipe.get("members")
    method = _code(recipe.get("method", "not recorded"))
    if final.kind == "merge":
        members = ", ".join(map(_code, names if isinstance(names, list) else ())) or "not recorded"
        return ["## Merge recipe\n", f"Method {method}; members {members}.\n", _yaml_block(recipe)]
    return ["## Method and parameters\n", f"Method {method}, with the trial's configuration:\n", _yaml_block(recipe)]


def _documents(counts: DocumentCounts | None) -> list[str]:
    if counts is None:
        return []
    return [
        f"Membership test: {counts.member} members; {counts.nonmember_final} unseen documents "
        f"for the scores above, {counts.nonmember_search} others during the search.\n"
    ]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _estimate(value: float | None, interval: Sequence[float] | None) -> str:
    return _number(value) + ("" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})")


def _text(value: object) -> str:
    """Text as one line that neither breaks a table nor opens HTML."""
    escaped = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(escaped.split())


def _code(value: object) -> str:
    return f"`{' '.join(str(value).replace('`', chr(39)).split())}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> list[str]:
    if not rows:
        return ["None on record.\n"]
    lines = [head, ("---",) * len(head), *rows]
    return ["\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines) + "\n"]


def _yaml_block(value: object) -> str:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    # a fence longer than any run of backticks inside cannot be closed by the text
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text}{fence}\n"
