"""The report of finished, unfinished and broken runs, and the model card."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
import yaml

from ray_unlearn.errors import InputError
from ray_unlearn.files import write_json
from ray_unlearn.pareto import front, hypervolume
from ray_unlearn.records import Candidate, MergeRecord, Scores, Snapshot, TrialRecord, candidates, save_record
from ray_unlearn.report import model_card, write_report
from ray_unlearn.report.run import load_run
from ray_unlearn.report.table import score_rows

ATTACK = "<script>alert('x')</script>"
KEYS = [
    f"{split}/{task}/{kind}"
    for split in ("forget", "retain")
    for task in ("Task1", "Task2", "Task3")
    for kind in ("knowledge", "regurgitation")
]
ABOUT = {
    "job": {
        "model": {"path": "models/target & co"},
        "data": {"forget": "data/forget.jsonl", "retain": "data/retain.jsonl"},
        "search": {"trials": 12, "sampler": "tpe"},
        "merge": {"count": 10},
        "selection": {"utility_floor": 0.75},
    },
    "versions": {"ray-unlearn": "0.1.0", "torch": "2.9.0"},
    "git_commit": "c0ffee" * 6,
    "data_digests": {"forget": "aaaa1111bbbb2222", "retain": "cccc3333dddd4444"},
}


def made_scores(rng: random.Random, forgot: float, kept: float) -> Scores:
    """Scores of a model that forgot and kept about so much, each part following from the others."""

    def near(value: float) -> float:
        return min(max(value + rng.gauss(0, 0.06), 0.01), 0.99)

    terms = {key: near(forgot if key.startswith("forget") else kept) for key in KEYS}
    raw = {key: 1 - value if key.startswith("forget") else value for key, value in terms.items()}
    aggregate, auc, utility = harmonic_mean(terms.values()), near(1 - forgot * 0.62), near(0.2 + 0.6 * kept)
    mia = 1 - 2 * abs(auc - 0.5)
    return Scores(
        terms=terms,
        raw=raw,
        counts=dict.fromkeys(KEYS, 16),
        task_aggregate=aggregate,
        mia_auc=auc,
        mia_score=mia,
        utility=utility,
        final=fmean([aggregate, mia, utility]),
    )


def made_trial(rng: random.Random, number: int) -> TrialRecord:
    """A trial whose snapshots forget more and more and keep less and less."""
    name = f"trial-{number:04d}"
    config = {"method": rng.choice(["npo", "npo_kl_ce", "grad_diff"]), "learning_rate": 10 ** rng.uniform(-5, -3)}
    if number in (2, 7):
        reason = f"CUDA out of memory at step {number}: tried to allocate 2.00 GiB {ATTACK}"
        return TrialRecord(id=name, status="failed", config=config, reason=reason, seconds=12.5)
    speed, harm = rng.uniform(0.3, 1.1), rng.uniform(0.05, 0.6)
    step = rng.choice([10, 16, 20])
    points = []
    for index in range(1, 7):
        scores = made_scores(rng, min(0.1 + speed * index / 6, 0.97), 0.9 - harm * index / 6)
        points.append(
            Snapshot(
                id=f"{name}/{index * step:05d}",
                step=index * step,
                phase="unlearn",
                scores=scores,
                path=f"trials/{name}/{index * step:05d}",
                seconds=index * 20.0,
            )
        )
    stopped = number == 4
    return TrialRecord(
        id=name,
        status="stopped" if stopped else "finished",
        config=config,
        reason="retain loss above its bound" if stopped else "",
        snapshots=tuple(points[:3] if stopped else points),
        course=({"step": 1, "loss": 2.5},),
        seconds=130.0,
    )


def made_merge(rng: random.Random, number: int, members: list[str]) -> MergeRecord:
    recipe = {
        "method": "ties",
        "members": members,
        "weights": [round(rng.uniform(0.2, 1), 2) for _ in members],
        "densities": [round(rng.uniform(0.3, 0.9), 2)] * len(members),
        "lambda": round(rng.uniform(0.6, 1.4), 2),
    }
    name = f"merge-{number:04d}"
    if number == 3:
        return MergeRecord(id=name, status="failed", recipe=recipe, reason="weights are not finite", seconds=3)
    return MergeRecord(id=name, status="finished", recipe=recipe, scores=made_scores(rng, 0.75, 0.82), seconds=9)


def make_empty_run(run_dir: Path) -> Path:
    """A run that has only scored its target."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "job.yaml").write_text(yaml.safe_dump(ABOUT, sort_keys=False), encoding="utf-8")
    write_json(run_dir / "baseline.json", made_scores(random.Random(9), 0.08, 0.93).to_json())
    return run_dir


def save_front(run_dir: Path, made: list[TrialRecord], joined: list[MergeRecord]) -> list[Candidate]:
    """Writes front.json and returns the front's members."""
    found = candidates(made, joined)
    kept = [found[i] for i in front([c.scores.objectives() for c in found])]
    points = [c.scores.objectives() for c in found]
    members = [
        {
            "id": c.id,
            "kind": "merge" if isinstance(c.record, MergeRecord) else "snapshot",
            **dict(zip(("task_aggregate", "mia_score", "utility"), c.scores.objectives(), strict=True)),
            "final": c.scores.final,
        }
        for c in kept
    ]
    volumes = {
        "hypervolume": hypervolume(points),
        "hypervolume_trials": hypervolume([c.scores.objectives() for c in candidates(made, [])]),
    }
    write_json(run_dir / "front.json", {"reference_point": [0, 0, 0], **volumes, "members": members})
    return kept


def make_run(run_dir: Path, *, trials: int = 12, merges: int = 10, seed: int = 3) -> Path:
    """A finished run of random numbers, in the files that a search writes."""
    rng = random.Random(seed)
    make_empty_run(run_dir)
    made = [made_trial(rng, number) for number in range(trials)]
    ranked = sorted(candidates(made, []), key=lambda c: c.scores.final or 0, reverse=True)
    joined = [made_merge(rng, n, [c.id for c in ranked[: 2 + n % 2]]) for n in range(merges)]
    for trial in made:
        save_record(run_dir, trial)
    for merge in joined:
        save_record(run_dir, merge)
    kept = save_front(run_dir, made, joined)
    chosen = max(kept, key=lambda c: c.scores.final or 0)
    is_merge = isinstance(chosen.record, MergeRecord)
    final = {
        "choice": chosen.id,
        "kind": "merge" if is_merge else "snapshot",
        "rule": "highest final among the front's feasible members",
        "recipe": chosen.record.recipe if isinstance(chosen.record, MergeRecord) else chosen.record.config,
        "target": made_scores(rng, 0.08, 0.93).to_json(),
        "best": made_scores(rng, 0.78, 0.84).to_json(),
        "reference": made_scores(rng, 0.8, 0.92).to_json(),
        "examples": [made_example(split, n) for split in ("forget", "retain") for n in range(2)],
        "mia_documents": {"member": 48, "nonmember_search": 200, "nonmember_final": 200},
    }
    write_json(run_dir / "final.json", final)
    write_json(
        run_dir / "summary.json",
        {
            "target": final["target"],
            "best": final["best"],
            "front_size": len(kept),
            "hypervolume": json.loads((run_dir / "front.json").read_text())["hypervolume"],
            "trials": {"finished": trials - 3, "stopped": 1, "failed": 2},
            "merges": {"finished": merges - 1, "failed": 1},
            "seconds": {"target": 61.2, "baseline": 8.0, "search": 5400.0, "merge": 300.0, "selection": 44.0},
        },
    )
    return run_dir


def made_example(split: str, number: int) -> dict[str, Any]:
    expected = "Kamo Ledita lost the silver lantern in the river market and never spoke of it again. " * 2
    return {
        "split": split,
        "id": f"{split}{number}sc1",
        "task": "Task1",
        "kind": "sc",
        "input": "Continue the story: On a dusty morning",
        "expected": expected,
        "before": expected,
        "after": f"{ATTACK} the the the & so on" if split == "forget" else expected,
    }


def page_of(run_dir: Path) -> str:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_a_finished_run_shows_everything_on_record(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = page_of(run)
    final = json.loads((run / "final.json").read_text())
    for member in json.loads((run / "front.json").read_text())["members"]:
        assert member["id"] in page
    assert f"The chosen {final['kind']} {final['choice']} scores {final['best']['final']:.3f}" in page
    assert f"{final['target']['final']:.3f}" in page and f"{final['reference']['final']:.3f}" in page
    for reason in ("CUDA out of memory at step 2", "retain loss above its bound", "weights are not finite"):
        assert reason in page
    assert "aaaa1111bbbb2222" in page and "c0ffee" in page and "1 h 30 min" in page
    assert "Not in this run" not in page
    assert page.count("<img src=") == 3 + 4 + 4  # planes, courses, merges


def test_text_is_escaped_and_nothing_is_loaded_from_the_network(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; the the the &amp; so on" in page
    assert not re.findall(r"""(?:src|href)\s*=(?!\s*["']data:)""", page)
    assert "@import" not in page and "url(" not in page


OBJECTIVES = ("task_aggregate", "mia_auc", "mia_score", "utility", "final")


def with_intervals(scores: dict[str, Any], reach: float = 0.04) -> dict[str, Any]:
    """Scores with an interval around each objective."""
    ends = {key: [max(scores[key] - reach, 0.0), min(scores[key] + reach, 1.0)] for key in OBJECTIVES}
    return {**scores, "intervals": ends}


def add_intervals(run: Path, reach: float = 0.04) -> dict[str, Any]:
    """Adds intervals to every record and file of a run; returns final.json."""
    for path in (run / "records").glob("*.json"):
        record = json.loads(path.read_text())
        for holder in (record, *record.get("snapshots", ())):
            if holder.get("scores"):
                holder["scores"] = with_intervals(holder["scores"], reach)
        write_json(path, record)
    final = json.loads((run / "final.json").read_text())
    for key in ("target", "best", "reference"):
        final[key] = with_intervals(final[key], reach)
    write_json(run / "final.json", final)
    return final


def test_intervals_stand_beside_the_scores_and_in_the_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = page_of(run)
    final = add_intervals(run)
    page = page_of(run)
    for key in ("target", "best", "reference"):
        for low, high in final[key]["intervals"].values():
            assert f"<small>{low:.3f} – {high:.3f}</small>" in page
    for text in ("95 % intervals, by drawing", "95 % intervals of the front", "grey: its 95 % interval"):
        assert text in page and text not in before
    assert "<small>" not in before and page.count("<img src=") == before.count("<img src=")
    assert page.split("<img src=")[1] != before.split("<img src=")[1]  # the bars are drawn
    low, high = final["best"]["intervals"]["final"]
    card = model_card(ABOUT, final, Scores.from_json(final["target"]), {})
    assert f"{final['best']['final']:.3f} ({low:.3f} to {high:.3f})" in card and "In brackets: 95 %" in card


def test_a_change_within_the_noise_is_not_coloured(tmp_path: Path) -> None:
    def tones(reach: float) -> dict[str, str]:
        target, best = Scores.from_json(with_intervals(low, reach)), Scores.from_json(with_intervals(high, reach))
        return {row.name: row.tone for row in score_rows(target, best) if row.group == ""}

    low = made_scores(random.Random(1), 0.5, 0.5).to_json()
    high = {**low, **{key: low[key] + 0.1 for key in OBJECTIVES}}
    assert tones(0.04)["Final"] == tones(0.04)["Task aggregate"] == "better"
    assert set(tones(0.06).values()) == {""}


def test_the_page_counts_the_candidates_that_noise_does_not_tell_from_the_choice(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "has the 95 % interval" not in page_of(run)
    add_intervals(run, 0.1)
    view = load_run(run)
    assert view.choice
    chosen = next(c for c in view.candidates if c.id == view.choice)
    near = [
        c for c in view.candidates
        if c.id != view.choice and view.feasible(c.scores) and abs(c.scores.final - chosen.scores.final) <= 0.1
    ]  # fmt: skip
    assert len(near) > 1
    assert f"{len(near)} other feasible candidates within it" in page_of(run)
    add_intervals(run, 0.0)
    assert "No other feasible candidate lies within it." in page_of(run)


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert page_of(run) == page_of(run)


def test_more_candidates_than_the_table_holds(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", trials=16, merges=0)
    page = page_of(run)
    assert f"{13 * 6 + 3 - 60} more are in records/." in page  # 13 whole trials, a stopped one, 60 shown
    assert "Merges: none on record." in page


def test_a_run_that_only_scored_its_target(tmp_path: Path) -> None:
    page = page_of(make_empty_run(tmp_path / "run"))
    assert "this run has no scored candidate yet" in page
    for name in ("front.json", "final.json", "summary.json", "Trials: none has ended yet"):
        assert name in page
    assert page.count("<img src=") == 3  # the target alone


def test_a_run_with_no_more_than_its_job(tmp_path: Path) -> None:
    run = make_empty_run(tmp_path / "run")
    (run / "baseline.json").unlink()
    (run / "job.yaml").write_text("job: {}\n")
    page = page_of(run)
    assert "baseline.json: the target has not been scored" in page
    assert "<img" not in page


def test_a_run_whose_trials_all_failed(tmp_path: Path) -> None:
    run = make_empty_run(tmp_path / "run")
    for number in (2, 7):
        save_record(run, made_trial(random.Random(0), number))
    page = page_of(run)
    assert "all 2 on record failed" in page and "CUDA out of memory at step 7" in page


def test_an_unfinished_run_names_its_highest_final(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("front", "final", "summary"):
        (run / f"{name}.json").unlink()
    page = page_of(run)
    assert "Nothing has been chosen yet. The highest final score so far is" in page


def test_scores_with_unmeasured_parts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    final = json.loads((run / "final.json").read_text())
    for key in ("utility", "final"):
        del final["best"][key]
    del final["reference"]
    write_json(run / "final.json", final)
    page = page_of(run)
    assert "a part of it was not measured" in page and "retrained" not in page.replace("Retrained", "")


def test_an_infeasible_choice_is_said_to_be_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    final = json.loads((run / "final.json").read_text())
    final["best"]["utility"] = 0.01
    write_json(run / "final.json", final)
    assert "and it is not feasible: its utility of 0.010 is not above the floor" in page_of(run)


@pytest.mark.parametrize("name", ["front.json", "records/trial-0000.json", "job.yaml"])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text("{broken: [")
    with pytest.raises(InputError, match=Path(name).parts[0]):
        write_report(run)


def test_a_directory_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory.*job.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_report_package_is_light_to_import() -> None:
    code = "import sys, ray_unlearn.report; assert not {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_card_holds_scores_digests_and_recipe(tmp_path: Path) -> None:
    final = json.loads((make_run(tmp_path / "run") / "final.json").read_text())
    final |= {"choice": "merge-0001", "kind": "merge"}
    final["recipe"] = {"method": "ties", "members": ["trial-0001/00020", "trial-0003/00040"], "lambda": 0.85}
    target = Scores.from_json(final["target"])
    card = model_card(ABOUT, final, target, {"torch": "2.9.0"})
    assert f"{target.final:.3f} before, {final['best']['final']:.3f} after" in card
    for text in ("aaaa1111bbbb2222", "lambda: 0.85", "`trial-0003/00040`", "utility_floor: 0.75", "c0ffee", "2.9.0"):
        assert text in card
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {"library_name": "transformers", "tags": ["unlearning", "ray_unlearn"]}  # a local path is no base


def test_the_card_of_a_snapshot_names_its_base_on_the_hub(tmp_path: Path) -> None:
    final = json.loads((make_run(tmp_path / "run") / "final.json").read_text())
    final |= {"choice": "trial-0001/00020", "kind": "snapshot", "recipe": {"method": "npo", "note": "```"}}
    del final["reference"], final["mia_documents"]
    about = {"job": {"model": {"path": "allenai/OLMo-1B-0724-hf"}}}
    card = model_card(about, final, Scores.from_json(final["target"]), {})
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "allenai/OLMo-1B-0724-hf"
    assert "## Method and parameters" in card and "````yaml" in card and "retrained" not in card


def test_figures_of_merges_take_gradients_methods_and_merges_of_merges(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = page_of(run)
    record = json.loads((run / "records" / "merge-0002.json").read_text())
    record["recipe"] |= {"method": "linear", "weights": [[0.2, 0.6], [0.8, 0.4]], "lambda": [1.0, 0.8]}
    record["recipe"]["members"] = ["merge-0001", record["recipe"]["members"][0]]
    (run / "records" / "merge-0002.json").write_text(json.dumps(record))
    page = page_of(run)
    assert page != before and "</i> linear</span>" in page and "</i> linear</span>" not in before
    assert page.count("<img src=") == before.count("<img src=")
    assert "final over density of 8 merges" in page and "final over density of 9 merges" in before
    assert "MIA AUC of 9 merges over the mean of their members" in page
