"""CONTRIBUTING's examples, made literally in a copy of the project: three files each, and what is said then works."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from third_parties import guests

from ray_unlearn import cli, plugins
from ray_unlearn.config.job import load_job
from ray_unlearn.config.trial import TrialConfig

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^( *)`([\w./]+)`:\n\1```(diff|python)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
COMMANDS = re.compile(r"^```\n((?:pytest|ray-unlearn) .*?)^```", re.DOTALL | re.MULTILINE)
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(section.split("\n", 1) for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:])
KINDS = ["A method", "A metric", "A merge method", "A data set", "A sampler", "An attack"]
NAMES = ["inverted_hinge", "repetition", "quorum", "phone_book", "nsga3", "few_shot"]


def blocks(section):
    """(path, whether it is a change of a file, the lines) of each file that a section shows."""
    for indent, path, language, code in BLOCK.findall(SECTIONS[section]):
        lines = [line.removeprefix(indent) for line in code.splitlines()]
        yield path, language == "diff", lines


def changed(text, lines):
    """The text after a diff's hunks, which empty lines part; each must fit in one place."""
    hunks = [[]]
    for line in lines:
        if line:
            hunks[-1].append(line)
        else:
            hunks.append([])
    there = text.splitlines()
    for hunk in hunks:
        before, after = ([line[1:] for line in hunk if line[0] != sign] for sign in "+-")
        places = [i for i in range(len(there)) if there[i : i + len(before)] == before]
        assert len(places) == 1, f"{len(places)} places for {before}"
        there[places[0] : places[0] + len(before)] = after
    return "\n".join(there) + "\n"


def apply(section, place):
    """Makes what a section shows in a copy; returns the paths."""
    paths = []
    for path, is_diff, lines in blocks(section):
        file = place / path
        assert file.exists() == is_diff, f"{path} is {'not there' if is_diff else 'there already'}"
        text = changed(file.read_text(encoding="utf-8"), lines) if is_diff else "\n".join(lines) + "\n"
        file.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def commands(section):
    """The words of each command that a section says."""
    return [shlex.split(line) for text in COMMANDS.findall(SECTIONS[section]) for line in text.splitlines()]


def contents(place):
    return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with every example made, and how many files each of them touched."""
    place = tmp_path_factory.mktemp("project")
    for folder in ("ray_unlearn", "search_spaces", "jobs", "tests", "docs"):
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, place)
    touched = {}
    for kind in KINDS:
        before = contents(place)
        paths = apply(kind, place)
        touched[kind] = {path for path, content in contents(place).items() if before.get(path) != content}
        assert touched[kind] == {place / path for path in paths}
    return place, touched


def run_there(place, *command):
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run([sys.executable, *command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_every_kind_of_addition_takes_three_files_at_most(copy):
    _, touched = copy
    assert all(1 <= len(paths) <= 3 for paths in touched.values()), touched
    assert set(KINDS) < set(SECTIONS)


def test_a_change_that_fits_nowhere_or_twice_is_seen():
    assert changed("a\nb\n", ["-b", "+c", "", "+x", " a"]) == "x\na\nc\n"
    for text in ("a\n", "b\nb\n"):
        with pytest.raises(AssertionError, match="^[02] places"):
            changed(text, ["-b", "+c"])


def test_the_tests_that_are_said_pass_and_so_do_those_of_whole_tables(copy):
    """In one process: every `pytest PATHS -k NAME` of the text, and the tests that look at every row of a table."""
    place, _ = copy
    said = [words for kind in KINDS for words in commands(kind) if words[0] == "pytest"]
    assert [words[-1] for words in said] == NAMES and all(words[-2] == "-k" for words in said)
    paths = sorted({path for words in said for path in words[1:-2]} | {"tests/test_docs.py"})
    wanted = " or ".join([*NAMES, "every", "the_tree"])
    options = ["-n", "0", "-p", "no:cacheprovider", "-m", "not ray", "-rA", "--durations", "0"]
    printed = run_there(place, "-m", "pytest", *options, *paths, "-k", f"({wanted}) and not after_every")
    passed = re.findall(r"^PASSED (\S+)", printed, re.MULTILINE)
    for words in said:
        mine = [name for name in passed if words[-1] in name and name.startswith(tuple(words[1:-2]))]
        assert mine, f"{shlex.join(words)} runs nothing"


def test_what_was_added_is_in_the_lists_and_in_the_tables(copy):
    place, _ = copy
    lists = [words[1] for kind in KINDS for words in commands(kind) if words[0] == "ray-unlearn" and len(words) == 2]
    assert lists == ["methods", "metrics", "merge-methods"]
    code = f"""
from ray_unlearn import cli
for name in {lists}: cli.main([name])
from ray_unlearn.attacks import ATTACKS
from ray_unlearn.config.job import Job
from ray_unlearn.schema import from_dict
from ray_unlearn.search.samplers import find_sampler
job = {{"target": {{"benchmark": "phone_book"}}, "search": {{"sampler": "nsga3"}}, "merge": {{"methods": ["quorum"]}}}}
made = from_dict(Job, job | {{"evaluation": {{"metrics": ["repetition"]}}}})
print("job", made.target.settings["people"], find_sampler(made.search.sampler).source, *ATTACKS)
"""
    printed = run_there(place, "-c", code)
    for name, more in [("inverted_hinge", "hinge_margin=1.0"), ("repetition", "seq-rep-4"), ("quorum", "quorum=2")]:
        row = re.search(rf"^{name}\n(?:  .*\n)+", printed, re.MULTILINE)
        assert row and more in row[0]
    assert "job 24 Deb and Jain 2014 prefix few_shot" in printed


@pytest.mark.slow
def test_the_new_data_set_is_built_with_its_models(copy):
    place, _ = copy
    said = [words for words in commands("A data set") if words[0] == "ray-unlearn"]
    run_there(place, "-m", "ray_unlearn", *said[0][1:])
    assert {"forget.jsonl", "target", "reference", "settings.json"} <= {
        path.name for path in (place / "targets" / "phone_book").iterdir()
    }


def test_a_plug_in_does_the_same_from_outside(tmp_path, monkeypatch, capsys):
    """The module, the commands and the job of the last section, in this process; the groups of its entry points."""
    section = SECTIONS["A plug-in"]
    ((path, _, lines),) = blocks("A plug-in")
    monkeypatch.chdir(tmp_path)
    Path(path).write_text("\n".join(lines) + "\n")
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    Path("job.yaml").write_text("target: {benchmark: embedded}\n" + yaml)
    with guests():
        try:
            for words in commands("A plug-in"):
                assert words[0] == "ray-unlearn" and cli.main(words[1:]) == 0
            printed = capsys.readouterr().out
            assert "\nunlikelihood\n" in printed and "\nanswer_words\n" in printed
            job = load_job(Path("job.yaml"))
            assert job.eval_settings.metrics == ("answer_words",)
            assert TrialConfig(method="unlikelihood", options=job.search.fixed).options["unlikelihood_power"] == 2.0
        finally:
            sys.modules.pop("my_plugin", None)
    groups = {f"ray_unlearn.{kind}" for kind in re.findall(r"`(?:ray_unlearn)?\.(\w+)`", section)}
    assert groups == set(plugins.GROUPS)
