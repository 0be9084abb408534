"""Who proposes the next trial, by name: Optuna's samplers, with the settings they are used with here."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_unlearn.errors import InputError
from ray_unlearn.pareto import OBJECTIVES
from ray_unlearn.tables import Table

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

MakeSampler = Callable[[int, int, int], "BaseSampler"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A sampler of several objectives and a constraint, which Optuna's trials carry (Trial.set_constraint)."""

    make: MakeSampler
    """(seed, startup, done) -> Optuna's sampler. `startup` trials come before it learns from them; `done` are in the
    study already: a resumed one must not draw its beginning's numbers again."""
    meaning: str
    source: str

    def open(self, seed: int, startup: int, done: int) -> BaseSampler:
        """What `make` makes; raises InputError where that is no sampler of Optuna's."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.samplers import BaseSampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            made = self.make(seed, startup, done)
        if not isinstance(made, BaseSampler):
            raise InputError(f"a sampler's function must return a sampler of Optuna's, got {made!r:.80}.")
        return made


def _tpe(seed: int, startup: int, done: int) -> BaseSampler:
    from optuna.samplers import TPESampler

    return TPESampler(
        seed=seed + done, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True
    )  # fmt: skip


def _random(seed: int, startup: int, done: int) -> BaseSampler:
    from optuna.samplers import RandomSampler

    return RandomSampler(seed=seed + done)


def _nsga2(seed: int, startup: int, done: int) -> BaseSampler:
    from optuna.samplers import NSGAIISampler
    from optuna.samplers.nsgaii import SBXCrossover

    # Optuna's own default, uniform crossover, only shuffles the numbers that the first generation drew.
    return NSGAIISampler(seed=seed + done, population_size=max(2, startup), crossover=SBXCrossover())


def _qmc(seed: int, startup: int, done: int) -> BaseSampler:
    from optuna.samplers import QMCSampler, RandomSampler

    # The study remembers its place in the sequence, which goes on only under the same seed.
    others = RandomSampler(seed=seed + done)
    return QMCSampler(seed=seed, scramble=True, independent_sampler=others, warn_independent_sampling=False)


def _gp(seed: int, startup: int, done: int) -> BaseSampler:
    from optuna.samplers import GPSampler

    return GPSampler(seed=seed + done, n_startup_trials=startup, warn_independent_sampling=False)


SAMPLERS = Table(
    "sampler",
    Sampler,
    {
        "tpe": Sampler(
            make=_tpe,
            meaning="densities of good and of other trials, over all parameters jointly, conditional ones in groups",
            source="Bergstra et al. 2011; several objectives: Ozaki et al. 2022",
        ),
        "random": Sampler(
            make=_random, meaning="each parameter by itself; learns nothing", source="Bergstra and Bengio 2012"
        ),
        "nsga2": Sampler(
            make=_nsga2,
            meaning="crossover and mutation of the best, in generations of `startup` trials; parameters that not all "
            "trials have are random",
            source="Deb et al. 2002",
        ),
        "qmc": Sampler(
            make=_qmc,
            meaning="a scrambled Sobol sequence over the first trial's parameters, the others random; learns nothing",
            source="Sobol 1967; Owen 1998",
        ),
        "gp": Sampler(
            make=_gp,
            meaning="expected growth of the hypervolume under Gaussian processes; parameters that not all trials have "
            "are random, so fix method, tuning and schedule",
            source="Daulton et al. 2020; with constraints: Gardner et al. 2014",
        ),
    },
)


def find_sampler(name: str) -> Sampler:
    """The sampler of a name in the table, or of a third party's `module:name`, a function like Sampler.make.

    Raises InputError for one that is not there, or cannot propose a trial of this project's objectives.
    """
    sampler = _third_party(name) if ":" in name else SAMPLERS.find(name)
    import optuna

    try:
        made = sampler.open(0, 1, 0)
        study = optuna.create_study(directions=["maximize"] * len(OBJECTIVES), sampler=made)
        study.ask()
        (trial,) = study.trials
        made.sample_relative(study, trial, made.infer_relative_search_space(study, trial))
    except Exception as error:
        raise InputError(
            f"search.sampler {name!r} cannot propose a trial of {len(OBJECTIVES)} objectives: "
            f"{type(error).__name__}: {error}"
        ) from error
    return sampler


def _third_party(name: str) -> Sampler:
    module, _, attribute = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise InputError(
            f"search.sampler {name!r} cannot be loaded: {type(error).__name__}: {error}. Install its module, or "
            "name it in the job's plugins."
        ) from error
    return Sampler(make=make, meaning=f"{attribute} of {module}", source=module)
