"""Figures of the report: records in, pictures (SVG as data URIs) out. No pyplot, so no global figures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_unlearn.records import Candidate, MergeRecord, Scores, TrialRecord

NAMES = {"task_aggregate": "Task aggregate", "mia_score": "MIA score", "utility": "Utility", "mia_auc": "MIA AUC"}
PLANES = (("task_aggregate", "mia_score"), ("task_aggregate", "utility"), ("mia_score", "utility"))
SNAPSHOT, MERGE, CHOICE, INK, QUIET = "#4a78a8", "#e07b00", "#c1121f", "#1f2933", "#8a94a0"
METHODS = (MERGE, "#2a8c5a", "#6a3d9a", "#0b7a99", "#8c564b", "#d99a00")
HIGHLIGHTS = ("#c1121f", "#111827", "#d99a00", "#6a3d9a", "#0b7a99")
HALO = (patheffects.withStroke(linewidth=3, foreground="white"),)


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, with the text for those who do not see it."""

    alt: str
    uri: str


def planes(
    found: Sequence[Candidate],
    *,
    target: Scores | None,
    infeasible: Collection[str],
    front: Collection[str],
    choice: str | None,
    least_utility: float | None,
) -> list[Picture]:
    """The candidates in the three planes of two objectives each."""
    pictures = []
    for x, y in PLANES:
        figure, axes = _axes(4.1, 4.0)
        _unit_axes(axes, x, y)
        if y == "utility" and least_utility is not None:
            _level(axes, least_utility, f"utility floor {least_utility:.2f}")
        drawn = [c for c in found if getattr(c.scores, x) is not None and getattr(c.scores, y) is not None]
        _points(axes, drawn, x, y, infeasible)
        _bars(axes, [c.scores for c in drawn if c.id in front], x, y)
        rings = [(getattr(c.scores, x), getattr(c.scores, y)) for c in drawn if c.id in front]
        if rings:
            xs, ys = zip(*rings, strict=True)
            axes.scatter(xs, ys, s=95, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=5)
        if target is not None and getattr(target, x) is not None and getattr(target, y) is not None:
            _cross(axes, getattr(target, x), getattr(target, y))
        points = [(getattr(c.scores, x), getattr(c.scores, y)) for c in drawn]
        for candidate, point in zip(drawn, points, strict=True):
            if candidate.id == choice:
                _star(axes, *point)
                _label(axes, candidate.id, point, points)
        pictures.append(Picture(f"{NAMES[y]} over {NAMES[x]} of {len(drawn)} candidates", _uri(figure)))
    return pictures


def courses(
    trials: Sequence[TrialRecord],
    *,
    target: Scores | None,
    highlighted: Mapping[str, str],
    choice: str | None,
    least_utility: float | None,
) -> list[Picture]:
    """Each objective and the MIA AUC over optimiser steps; trials in `highlighted` get its colour."""
    pictures = []
    for key, name in NAMES.items():
        figure, axes = _axes(3.5, 3.1)
        axes.set(ylim=(-0.03, 1.03), xlabel="optimiser step")
        axes.set_title("MIA AUC (best: 0.5)" if key == "mia_auc" else name, fontsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_xlim(0, 1.05 * max((s.step for trial in trials for s in trial.snapshots), default=1))
        if key == "mia_auc":
            _level(axes, 0.5)
        elif key == "utility" and least_utility is not None:
            _level(axes, least_utility, f"floor {least_utility:.2f}")
        if target is not None and getattr(target, key) is not None:
            _cross(axes, 0, getattr(target, key))
        for trial in sorted(trials, key=lambda trial: trial.id in highlighted):
            known = [s for s in trial.snapshots if getattr(s.scores, key) is not None]
            steps, values = [s.step for s in known], [getattr(s.scores, key) for s in known]
            strong = trial.id in highlighted
            colour = highlighted.get(trial.id, SNAPSHOT)
            width, alpha, size = (2.0, 1.0, 4.0) if strong else (0.9, 0.4, 2.0)
            axes.plot(steps, values, color=colour, linewidth=width, alpha=alpha, marker="o", markersize=size)
            for snapshot in known:
                if snapshot.id == choice:
                    _star(axes, snapshot.step, getattr(snapshot.scores, key))
        pictures.append(Picture(f"{name} over optimiser steps of {len(trials)} trials", _uri(figure)))
    return pictures


def recipes(
    merges: Sequence[MergeRecord],
    *,
    colours: Mapping[str, str],
    thinned: Collection[str],
    best_snapshot: Scores | None,
    choice: str | None,
) -> list[Picture]:
    """Density, lambda and weights of each scored merge against its final score; `colours` by method.

    Densities only of the methods in `thinned`, which use them.
    """
    level = best_snapshot.final if best_snapshot else None
    band = best_snapshot.intervals.get("final") if best_snapshot else None
    known = [(merge, merge.scores.final) for merge in merges if merge.scores and merge.scores.final is not None]
    pictures = []
    for key, name in (("densities", "density"), ("lambda", "lambda"), ("weights", "weight of each member")):
        spans = [
            (merge, _values(merge.recipe.get(key)), final)
            for merge, final in known
            if key != "densities" or merge.recipe.get("method") in thinned
        ]
        spans = [span for span in spans if span[1]]
        if not spans:
            continue
        figure, axes = _axes(4.1, 3.4)
        axes.set(xlabel=name, ylabel="final")
        finals = [final for _, _, final in spans] + ([] if level is None else [level])
        margin = max(0.12 * (max(finals) - min(finals)), 0.01)
        axes.set_ylim(min(finals) - margin, max(finals) + margin)
        if level is not None:
            _level(axes, level)
        if band is not None:
            axes.axhspan(band[0], band[1], color=QUIET, alpha=0.13, linewidth=0, zorder=0)
        points = [(value, final) for _, values, final in spans for value in values]
        for merge, values, final in spans:
            chosen, own = merge.id == choice, colours.get(str(merge.recipe.get("method")), MERGE)
            colour = CHOICE if chosen else own
            axes.plot(values, [final] * len(values), color=colour, linewidth=0.9, alpha=0.6, zorder=5 if chosen else 2)
            if not chosen:
                axes.scatter(values, [final] * len(values), marker="D", s=26, color=own, alpha=0.85, zorder=4)
                continue
            for value in sorted(set(values)):
                _star(axes, value, final)
            _label(axes, merge.id, (values[0], final), points)
        pictures.append(Picture(f"final over {name} of {len(spans)} merges", _uri(figure)))
    return pictures


def balance(
    merges: Sequence[MergeRecord], *, aucs: Mapping[str, float], colours: Mapping[str, str], choice: str | None
) -> list[Picture]:
    """The MIA AUC of each merge over the mean of its members' AUCs by weight: what the merge made of a balance.

    `aucs` by id, of snapshots and merges. Empty where no merge has both.
    """
    points = []
    for merge in merges:
        members, weights = merge.recipe.get("members", []), merge.recipe.get("weights", [])
        means = [sum(found) / len(found) for weight in weights if (found := _values(weight))]
        known = len(means) == len(members) and all(member in aucs for member in members) and sum(means) > 0
        if known and merge.scores and merge.scores.mia_auc is not None:
            mean = sum(w * aucs[m] for w, m in zip(means, members, strict=True)) / sum(means)
            points.append((merge, mean, merge.scores.mia_auc))
    if not points:
        return []
    figure, axes = _axes(4.1, 3.4)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="members' MIA AUC, by weight", ylabel="MIA AUC")
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.9, zorder=1)
    _level(axes, 0.5)
    places = [(mean, area) for _, mean, area in points]
    for merge, mean, area in points:
        if merge.id == choice:
            _star(axes, mean, area)
            _label(axes, merge.id, (mean, area), places)
        else:
            colour = colours.get(str(merge.recipe.get("method")), MERGE)
            axes.scatter(mean, area, marker="D", s=26, color=colour, alpha=0.85, zorder=4)
    return [Picture(f"MIA AUC of {len(points)} merges over the mean of their members' by weight", _uri(figure))]


def _values(value: object) -> list[float]:
    """The numbers of a recipe's entry: one, a list of them, gradients over depth among them, or none."""
    if isinstance(value, (list, tuple)):
        return [number for entry in value for number in _values(entry)]
    entries = [value]
    return [float(entry) for entry in entries if isinstance(entry, (int, float)) and not isinstance(entry, bool)]


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors="#4b5560", labelsize=9)
    axes.grid(color="#e6e9ed", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _unit_axes(axes: Axes, x: str, y: str) -> None:
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=ticks, yticks=ticks, xlabel=NAMES[x], ylabel=NAMES[y])
    axes.set_aspect("equal")


def _points(axes: Axes, drawn: Sequence[Candidate], x: str, y: str, infeasible: Collection[str]) -> None:
    """Filled where feasible, hollow where not; merges are diamonds."""
    for is_merge, marker, size, colour in ((False, "o", 24, SNAPSHOT), (True, "D", 30, MERGE)):
        for hollow in (True, False):
            points = [
                (getattr(c.scores, x), getattr(c.scores, y))
                for c in drawn
                if isinstance(c.record, MergeRecord) == is_merge and (c.id in infeasible) == hollow
            ]
            if points:
                face = "white" if hollow else colour
                xs, ys = zip(*points, strict=True)
                axes.scatter(xs, ys, marker=marker, s=size, facecolors=face, edgecolors=colour, alpha=0.85, zorder=3)


def _bars(axes: Axes, scores: Sequence[Scores], x: str, y: str) -> None:
    """Thin bars over the intervals of both objectives, behind the points; none where a record has no intervals."""
    for one in scores:
        if x in one.intervals and y in one.intervals:
            at = getattr(one, x), getattr(one, y)
            axes.plot(one.intervals[x], [at[1]] * 2, color=QUIET, linewidth=0.8, alpha=0.7, zorder=2)
            axes.plot([at[0]] * 2, one.intervals[y], color=QUIET, linewidth=0.8, alpha=0.7, zorder=2)


def _level(axes: Axes, value: float, text: str = "") -> None:
    """A dashed horizontal line, with its meaning written above its left end."""
    axes.axhline(value, color=QUIET, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        text,
        (0.01, value),
        xycoords=("axes fraction", "data"),
        xytext=(2, 3),
        textcoords="offset points",
        fontsize=8,
        color="#5b6570",
        path_effects=HALO,
        zorder=7,
    )


def _cross(axes: Axes, x: float, y: float) -> None:
    """The mark of the target."""
    axes.scatter(x, y, marker="x", s=70, color="black", linewidths=2.2, zorder=6, clip_on=False)


def _star(axes: Axes, x: float, y: float) -> None:
    """The mark of the chosen candidate."""
    axes.scatter(x, y, marker="*", s=260, color=CHOICE, edgecolors="white", linewidths=0.9, zorder=8, clip_on=False)


def _label(axes: Axes, text: str, point: tuple[float, float], points: Sequence[tuple[float, float]]) -> None:
    """Names a point where the fewest others are covered, the nearest such place first, joined by a thin line."""
    others = [tuple(axes.transLimits.transform(other)) for other in points]
    here = tuple(axes.transLimits.transform(point))
    half_width, half_height = 0.0125 * len(text), 0.035

    def cost(place: tuple[float, float]) -> tuple[int, float]:
        covered = sum(abs(x - place[0]) < half_width and abs(y - place[1]) < half_height for x, y in others)
        distance = math.dist(here, place)
        return covered, distance if distance > 0.1 else 1 + distance  # not on the star itself

    columns = [half_width + (1 - 2 * half_width) * i / 16 for i in range(17)]
    place = min(((x, 0.04 + 0.92 * j / 24) for x in columns for j in range(25)), key=cost)
    axes.annotate(
        text,
        point,
        xytext=place,
        textcoords="axes fraction",
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold",
        color=CHOICE,
        path_effects=HALO,
        arrowprops={"arrowstyle": "-", "color": CHOICE, "linewidth": 0.9, "shrinkB": 7},
        zorder=9,
    )


def _uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "ray_unlearn"}):  # the same records give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
