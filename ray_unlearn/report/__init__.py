"""The report of a run, and the card of the model it chose. Drawing libraries are imported only when used."""

from __future__ import annotations

from pathlib import Path

from ray_unlearn.files import write_text
from ray_unlearn.report.card import model_card

__all__ = ["model_card", "write_report"]


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html from the run's files, finished or not, and returns its path.

    Reads what is there and says in the page what is missing. Raises InputError when `run_dir` lacks
    job.yaml or one of its files cannot be read.
    """
    from ray_unlearn.report.page import render  # brings matplotlib and jinja2
    from ray_unlearn.report.run import load_run

    path = Path(run_dir) / "report.html"
    write_text(path, render(load_run(Path(run_dir))))
    return path
