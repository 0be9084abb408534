"""One trial outside of a search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_unlearn.api.evaluation import eval_set
from ray_unlearn.config.trial import TrialConfig
from ray_unlearn.errors import InputError
from ray_unlearn.evaluation.spec import EvalSettings
from ray_unlearn.files import claim_file
from ray_unlearn.models.loading import check_model
from ray_unlearn.plugins import load_plugins
from ray_unlearn.records import TrialRecord, load_records
from ray_unlearn.schema import from_dict, to_dict


def read_trial_config(
    recipe_name: str | None,
    config: str | None,
    overrides: Sequence[str],
    geometry: Any = None,
    log: Callable[[str], None] = lambda line: None,
) -> TrialConfig:
    """The configuration of a recipe or a YAML file, with overrides applied; a recipe's is adapted to `geometry`."""
    from ray_unlearn.config.job import apply_override
    from ray_unlearn.config.recipes import recipe, scaled

    if (recipe_name is None) == (config is None):
        raise InputError("give either --recipe NAME or --config FILE.")
    if recipe_name is not None:
        found = recipe(recipe_name)
        found.trial()
        data = dict(found.config)
        if geometry is not None:
            data, changed = scaled(found.config, found.model, geometry)
            log(f"{recipe_name} scaled to the model: {'; '.join(changed) or 'nothing had to change'}")
    else:
        assert config is not None
        if geometry is not None:
            raise InputError("--scale-to-model goes with --recipe, which says what model it was made for.")
        try:
            data = yaml.safe_load(Path(config).read_text(encoding="utf-8")) or {}
        except FileNotFoundError as error:
            raise InputError(f"no such file: {config}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{config} is not readable YAML: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"{config} must hold a mapping of trial settings, got {data!r:.60}.")
    for override in overrides:
        apply_override(data, override)
    return from_dict(TrialConfig, data, "trial")


def train(
    *,
    model: str,
    forget: str,
    retain: str,
    out: str | Path,
    recipe: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    scale_to_model: bool = False,
    address: str | None = None,
    workers: int = 1,
    gpus_per_worker: float = 0,
    dtype: str = "float32",
    evaluation: dict[str, Any] | None = None,
    skip_bad_rows: bool = False,
    plugins: Sequence[str] = (),
    log: Callable[[str], None] = lambda line: None,
) -> TrialRecord:
    """One trial through the same Ray Train and DeepSpeed path as in a search; records and snapshots go to `out`.

    `plugins` are modules or .py files whose methods may be named (ray_unlearn.plugins).
    """
    from ray_unlearn.cluster.session import cluster
    from ray_unlearn.config.job import ResourcesPart
    from ray_unlearn.config.recipes import Geometry
    from ray_unlearn.evaluation.checks import check_fit
    from ray_unlearn.models.loading import empty_model
    from ray_unlearn.pipeline.lock import owned
    from ray_unlearn.training.dataloader import check_rows
    from ray_unlearn.training.parameters import check_trainable

    load_plugins(plugins)
    check_model(model)
    data = eval_set(forget, retain, skip_bad_rows=skip_bad_rows)
    shapes = empty_model(model)
    here = Geometry(layers=shapes.config.num_hidden_layers, hidden=shapes.config.hidden_size, rows=len(data.forget))
    trial = read_trial_config(recipe, config, overrides, here if scale_to_model else None, log)
    check_trainable(shapes, trial)
    check_rows(trial, data.forget)
    settings = EvalSettings(**(evaluation or {}))
    for line in check_fit(model, data, settings):
        log(line)
    resources = ResourcesPart(workers=workers, gpus_per_worker=gpus_per_worker, executor="cold", dashboard=False)
    run_dir = Path(out).expanduser().resolve()
    claim_file(run_dir / "records" / "trial")
    load_records(run_dir)  # a damaged one is refused before Ray is started
    with owned(run_dir, log), cluster(address, resources) as started_here:
        from ray_unlearn.cluster.executor import Executor, events
        from ray_unlearn.cluster.model_transfer import ModelSource, WorkerSpec

        spec = WorkerSpec(
            model=ModelSource.of(model, shared=started_here),
            forget=data.forget,
            retain=data.retain,
            eval_set=data,
            eval_settings=settings,
            dtype=dtype,
            utility_floor=0.0,
        )
        number = 1 + max((int(record.id.removeprefix("trial-")) for record in load_records(run_dir)[0]), default=-1)
        name = f"trial-{number:04d}"
        with Executor(run_dir, spec, resources, run_dir / "ray") as executor:
            for event, content in events(executor.handle, name, to_dict(trial)):
                log(f"{name} {event}: " + ", ".join(f"{key} {value}" for key, value in content.items() if value != ""))
        return next(record for record in load_records(run_dir)[0] if record.id == name)
