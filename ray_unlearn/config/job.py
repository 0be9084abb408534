"""Jobs: one YAML file that says everything a run needs; its parts, defaults, overrides and comparison."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.config.recipes import recipe, recipes
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.data.benchmarks import DATASETS
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.spec import MMLU_MODES, EvalSettings
from ray_unlearn.losses import OPTIONS
from ray_unlearn.merging import MERGES
from ray_unlearn.metrics import METRICS
from ray_unlearn.models.loading import DTYPES
from ray_unlearn.plugins import load_plugins
from ray_unlearn.schema import check_fields, from_dict, option, require, to_dict

VARIABLE = re.compile(r"\$([A-Za-z_]|\{)")
RECIPE_KEYS = [
    *"forget_weight retain_weight kl_weight forget_on kl_on epochs schedule chunk_size tuning lora_rank".split(),
    *OPTIONS,
]
"""What a recipe says as a first point. Learning rate and batch depend on the model's size: the space says those."""


@dataclass(frozen=True)
class FirstPoint:
    """Searched parameters to try first, and the recipe they are of, whose keys the space need not all ask for."""

    parameters: dict[str, object]
    recipe: str | None


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """The model that is to forget."""

    path: str | None = None
    """Directory, .gguf file or hub id; null when `target` makes the model."""
    dtype: str = option("float32", choices=DTYPES)
    """Precision of training and scoring; float32 on CPU, bfloat16 on GPU."""


@dataclass(frozen=True, kw_only=True)
class TargetPart:
    """How to make the model, where it is not given."""

    benchmark: str | None = option(None, choices=DATASETS)
    """A data set to build, with the model that knows it: `embedded`, or a plugin's (data.benchmarks.DATASETS)."""
    settings: dict[str, object] = field(default_factory=dict)
    """The benchmark's sizes; defaults are filled in."""
    base: str | None = None
    """A base model to fine-tune on the forget and retain rows."""
    epochs: int = option(10, at_least=1)
    batch_size: int = option(8, at_least=1)
    learning_rate: float = option(2e-4, above=0)
    cache: str = "~/.cache/ray_unlearn"
    """Folder of finished targets, by digest of what made them."""


@dataclass(frozen=True, kw_only=True)
class DataPart:
    """Files; with a benchmark those left null are the benchmark's own."""

    forget: str | None = None
    retain: str | None = None
    mia_member: str | None = None
    mia_nonmember: str | None = None
    """Unseen documents: the search sees every other one, the final score the rest."""
    mmlu: str | None = None
    """Folder with dev/ and test/, the utility test."""
    limit: dict[str, int] | int | None = option(None, at_least=1)
    """Documents kept of each task: one number, or one for each task; null for all."""
    mia_limit: int | None = option(None, at_least=1)
    """Members, and twice as many non-members, that are kept; null for all."""
    skip_bad_rows: bool = False
    """Drop and count bad rows instead of refusing the file."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPart:
    """How every model of the run generates."""

    max_new_tokens: int = option(256, at_least=1)
    """Tokens generated at most for a row (the organisers' 256)."""
    batch_size: int = option(32, at_least=1)
    """Rows in one forward pass."""
    metrics: list[str] = option([], choices=METRICS)
    """Further metrics of every model that is scored (ray-unlearn metrics); they decide nothing."""


@dataclass(frozen=True, kw_only=True)
class MmluPart:
    """How utility is measured."""

    mode: str = option("letters", choices=MMLU_MODES)
    """`letters`: next-token probabilities of A-D; `cloze`: length-normalised log-probability of the option texts."""
    shots: int = option(5, at_least=0)
    """Solved examples before a question, in `letters` mode."""
    limit: int | None = option(None, at_least=1)
    """Questions kept, evenly over the subjects; null for all."""


@dataclass(frozen=True, kw_only=True)
class SearchPart:
    """The search over trials."""

    trials: int = option(24, at_least=1)
    spaces: list[str] = field(default_factory=lambda: ["npo_kl_ce", "ascent_kl_ce"])
    """Names of shipped spaces, or paths of .py files; which one a trial uses is itself searched."""
    fixed: dict[str, object] = field(default_factory=dict)
    """TrialConfig fields that every trial gets whatever its space says."""
    ranges: dict[str, object] = field(default_factory=dict)
    """Searched parameter -> [low, high] or list of choices, in place of the space's own."""
    first_points: list[object] = field(default_factory=list)
    """Recipe names, or mappings of searched parameters, that are tried first."""
    sampler: str = "tpe"
    """Who proposes trials: a name in search.samplers (`tpe`, `random`, `nsga2`, `qmc`, `gp`), or `module:function`."""
    startup: int = option(8, at_least=0)
    """Trials before the sampler learns from them (first points included)."""
    storage: str | None = None
    """RDB URL of the Optuna studies; null for study.db in the run's directory."""


@dataclass(frozen=True, kw_only=True)
class ResourcesPart:
    """Machines of one trial, and how many trials run side by side."""

    workers: int = option(1, at_least=1)
    """Ray Train workers of a trial."""
    cpus_per_worker: float = option(1, above=0)
    gpus_per_worker: float = option(0, at_least=0)
    concurrency: int = option(1, at_least=1)
    """Trials side by side; each gets its own workers."""
    executor: str = option("warm", choices=("warm", "cold"))
    """`warm`: long-lived workers, libraries and base loaded once; `cold`: a Train run for each trial."""
    shared_storage: bool | None = None
    """Whether all nodes see the model's path and the run's directory; null: only on a cluster this run starts.
    Where they do not, models, data and snapshots travel through Ray."""
    storage: str | None = None
    """Folder or URI (s3://...) that all nodes can write, for Ray Train's own files; null for the run's directory,
    which on several nodes must then be shared."""
    dashboard: bool = True
    """Whether a cluster that this run starts gets Ray's dashboard."""

    def __post_init__(self) -> None:
        check_fields(self, "resources")  # it is built without a job too


@dataclass(frozen=True, kw_only=True)
class MergePart:
    """The search over merges of front members."""

    candidates: int = option(24, at_least=0)
    """Merges tried at most; 0 for none."""
    patience: int = option(16, at_least=0)
    """Merges without growth of the hypervolume after which the search ends; 0 tries all `candidates`."""
    methods: list[str] = option(["ties", "linear"], choices=MERGES, if_empty="name at least one")
    """The first points are the first one's; the segment between the two ends is `linear`'s where it is among them."""
    max_members: int = option(3, at_least=1)
    pool: int = option(8, at_least=1)
    """Snapshots offered at most: the front first, then the best by final."""
    remerged: int = option(2, at_least=0)
    """Merges of the front that may become members of later merges."""
    layerwise: bool = True
    """Whether weights that change from the first layer to the last are tried too."""
    startup: int = option(8, at_least=0)
    timeout: float | None = option(7200.0, above=0)
    """Seconds for one merge, loading included, after which its actor is replaced and it has failed; null for never. One
    merge takes about as long as scoring the target."""


@dataclass(frozen=True, kw_only=True)
class ComparisonPart:
    """Published recipes side by side, in place of a search."""

    recipes: list[str] = field(default_factory=list)
    """Names of recipes, or `all`; empty for a search."""
    seeds: list[int] = option([0], at_least=0, if_empty="give at least one")
    """Each recipe is run with each of them."""
    scale_to_model: bool = False
    """Whether layers, learning rate and batch are adapted to the model; what was changed is in the table."""

    def __post_init__(self) -> None:
        for name in self.names():
            recipe(name)

    def names(self) -> list[str]:
        """The recipes' names in order."""
        return list(recipes()) if self.recipes == ["all"] else self.recipes


@dataclass(frozen=True, kw_only=True)
class SelectionPart:
    """How the delivered model is chosen."""

    utility_floor: float = option(0.75, above=0, at_most=1)
    """A candidate is feasible if its utility is above this share of the target's."""
    weights: list[float] = option([1.0, 1.0, 1.0], at_least=0)
    """Of task aggregate, MIA score and utility; equal ones choose by `final`."""
    examples: int = option(4, at_least=0)
    """Rows of each split, task and kind shown before and after in the report."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything a run needs."""

    seed: int = option(0, at_least=0)
    plugins: list[str] = field(default_factory=list)
    """Modules, or paths of .py files, that add methods, metrics and the like; installed ones need not be named."""
    model: ModelPart = field(default_factory=ModelPart)
    target: TargetPart = field(default_factory=TargetPart)
    data: DataPart = field(default_factory=DataPart)
    evaluation: EvaluationPart = field(default_factory=EvaluationPart)
    mmlu: MmluPart = field(default_factory=MmluPart)
    search: SearchPart = field(default_factory=SearchPart)
    resources: ResourcesPart = field(default_factory=ResourcesPart)
    merge: MergePart = field(default_factory=MergePart)
    comparison: ComparisonPart = field(default_factory=ComparisonPart)
    selection: SelectionPart = field(default_factory=SelectionPart)

    @staticmethod
    def gathered(data: dict[str, Any]) -> dict[str, object]:
        """The same mapping, its plugins loaded: names in its parts may be theirs."""
        if isinstance(data.get("plugins", []), list):
            load_plugins(data.get("plugins", []))
        return data

    def __post_init__(self) -> None:
        load_plugins(self.plugins)  # the names below may be theirs
        check_fields(self)
        given = [self.model.path, self.target.benchmark, self.target.base]
        require(
            sum(value is not None for value in given) == 1,
            "exactly one of model.path, target.benchmark and target.base must be given, got "
            f"model.path={given[0]!r}, target.benchmark={given[1]!r}, target.base={given[2]!r}.",
        )
        if self.target.benchmark is not None:
            made = DATASETS.find(self.target.benchmark).settings
            settings = to_dict(from_dict(made, self.target.settings, "target.settings"))
            object.__setattr__(self, "target", replace(self.target, settings=settings))
        else:
            for name in ("forget", "retain", "mia_member", "mia_nonmember", "mmlu"):
                require(getattr(self.data, name) is not None, f"data.{name} is missing; give a file (see --help).")
        weights = self.selection.weights
        three = len(weights) == 3 and sum(weights) > 0
        require(three, f"selection.weights must be three numbers of at least 0, not all 0, got {weights}.")
        shared = {key: value for key, value in self.search.fixed.items() if key not in OPTIONS}
        from_dict(TrialConfig, shared, "search.fixed")  # a method's own parameters are checked with the method
        self.first_points()

    @property
    def eval_settings(self) -> EvalSettings:
        """How a model is scored."""
        return EvalSettings(
            max_new_tokens=self.evaluation.max_new_tokens,
            batch_size=self.evaluation.batch_size,
            mmlu_mode=self.mmlu.mode,
            mmlu_shots=self.mmlu.shots,
            metrics=tuple(self.evaluation.metrics),
        )

    @property
    def trials(self) -> int:
        """Trials that the job makes: the search's budget, or each recipe of a comparison with each seed."""
        names = [name for name in self.comparison.names() if recipe(name).config]
        return len(names) * len(self.comparison.seeds) if names else self.search.trials

    def first_points(self) -> list[FirstPoint]:
        """The first points as mappings of searched parameters; recipe names are looked up."""
        points: list[FirstPoint] = []
        for point in self.search.first_points:
            if isinstance(point, str):
                stated, checked = recipe(point).config, to_dict(recipe(point).trial())
                checked |= checked["options"]
                chosen = {key: checked[key] for key in RECIPE_KEYS if key in stated}
                points.append(FirstPoint({"space": checked["method"], **chosen}, point))
            elif isinstance(point, dict):
                points.append(FirstPoint(point, None))
            else:
                raise InputError(
                    f"search.first_points takes recipe names ({', '.join(recipes())}) or mappings, got {point!r}."
                )
        return points


def load_job(path: Path, overrides: list[str] | None = None) -> Job:
    """The job of a YAML file, with `key=value` overrides (dotted keys, YAML values) applied."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such job file: {path}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable YAML: {error}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of keys to values, got {data!r:.60}.")
    for override in overrides or []:
        apply_override(data, override)
    expanded = _expand(data)
    search = data.get("search")
    if isinstance(search, dict) and "storage" in search:
        expanded["search"]["storage"] = search["storage"]  # its variables hold a password, and wait until it is opened
    return from_dict(Job, expanded)


def _expand(value: object) -> Any:
    """Environment variables (`$LUME/forget.jsonl`) in every text of a job; an unset one is refused."""
    if isinstance(value, dict):
        return {key: _expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item) for item in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    expanded = os.path.expandvars(value)
    if VARIABLE.search(expanded):
        raise InputError(
            f"{value!r} names an environment variable that is not set: export it, or give the value by --set."
        )
    return expanded


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one dotted key of plain nested mappings to a YAML value, in place."""
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise InputError(f"--set takes key=value with a dotted key, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {override}: {parent!r} is not a mapping.")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not YAML: {error}") from error


def differences(a: Mapping[str, object], b: Mapping[str, object], where: str = "") -> list[str]:
    """Dotted keys in which two jobs differ, with both values."""
    found = []
    for key in sorted({*a, *b}):
        left, right, name = a.get(key), b.get(key), f"{where}{key}"
        if isinstance(left, dict) and isinstance(right, dict):
            found += differences(left, right, f"{name}.")
        elif left != right:
            found.append(f"{name}: {left!r} there, {right!r} now")
    return found
