"""The report of finished, unfinished and broken runs, and the model card."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_runs import ABOUT, made_scores, made_trial, make_empty_run, make_run, page_of

from ray_unlearn.errors import InputError
from ray_unlearn.files import write_json
from ray_unlearn.records import Scores, save_record
from ray_unlearn.report import model_card, write_report
from ray_unlearn.report.run import load_run
from ray_unlearn.report.table import score_rows
from ray_unlearn.run_files import Final


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
    card = model_card(ABOUT, Final.from_json(final), {})
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
    card = model_card(ABOUT, Final.from_json(final), {"torch": "2.9.0"})
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
    card = model_card(about, Final.from_json(final), {})
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
