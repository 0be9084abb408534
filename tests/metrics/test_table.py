"""The table of metrics: a metric is a function and a row, and nothing else in the package knows it by its name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ray_unlearn
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.metric_suite import check_inputs, more_metrics
from ray_unlearn.evaluation.signals import MAKERS, ModelHere
from ray_unlearn.evaluation.spec import EvalSet
from ray_unlearn.metrics import METRICS, Metric
from ray_unlearn.metrics.table import DOCUMENTS, ROWS, SIGNALS, WHOLE
from ray_unlearn.records import Example

PACKAGE = Path(ray_unlearn.__file__).parent
NAMES = {name for name, metric in METRICS.items() if metric.signals}
"""Those that every evaluation measures are the names of objectives and terms too."""
WORDS = {"formula": "f", "range": (0, 1), "best": {"forget": 0.0}, "collapsed": "0", "source": "s"}


TABLES = {"METRICS", "MEASURES"}
"""Dicts whose keys are names that they give: of metrics, and of what an attack reads off a row."""


def named(source):
    """Names of metrics that stand in code as texts, but for the keys of TABLES."""
    tree, keys = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in TABLES:
            keys |= {id(key) for key in getattr(node.value, "keys", ())}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in NAMES]
    return [node.value for node in texts if id(node) not in keys]


def test_no_code_knows_a_metric_by_its_name():
    assert named('METRICS = {"perplexity": 1}\nif name == "privleak": pass') == ["privleak"]
    assert len(NAMES) > 15
    found = {str(path): named(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_every_signal_is_made_somewhere_and_wanted_by_some_metric():
    wanted = {signal.removeprefix("reference_") for metric in METRICS.values() for signal in metric.signals}
    assert set(MAKERS) == set(SIGNALS) == wanted
    assert all(set(metric.groups) <= {*ROWS, *DOCUMENTS, *WHOLE} for metric in METRICS.values())


def test_a_signal_that_nobody_makes_is_refused():
    with pytest.raises(InputError, match="unknown signal of a metric 'answer_logprobs'. Did you mean"):
        Metric(compute=len, signals=("answer_logprobs",), **WORDS)
    Metric(compute=len, signals=("reference_answer_log_probs",), **WORDS)


def test_a_new_metric_is_a_function_and_a_row(monkeypatch):
    """Here one of the forget rows alone, of two signals that no metric of the table takes together."""

    def surplus(expected, generated, split):
        return float(len(generated) - len(expected)) if split == "forget" else -1.0

    row = Metric(compute=surplus, signals=("expected", "generated", "split"), groups=("forget",), **WORDS)
    monkeypatch.setitem(METRICS, "surplus", row)
    rows = [Example(id=f"{n}qa1", input="?", output="ab", task="T", kind="qa") for n in range(3)]
    data = EvalSet(forget=rows[:2], retain=rows[2:])
    assert check_inputs(["surplus"], data, reference=False) == ["surplus"]
    one, other = ModelHere(model=None, texts=["abc", "abcd", ""]), ModelHere(model=None, texts=["", "ab", ""])
    found = more_metrics(["surplus"], one, None, data, reference=other)["surplus"]
    assert found == {"forget": {"value": 1.5, "interval": [1.0, 2.0], "reference": -1.0, "difference": 2.5}}
