"""Joining a Ray cluster, or starting one on this machine and stopping it again."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray_unlearn.errors import InputError
from ray_unlearn.files import PACKAGE
from ray_unlearn.plugins import loaded, plugin_variables

if TYPE_CHECKING:
    from ray_unlearn.config.job import Job, ResourcesPart

QUIET = {
    # Polled this often, a finished Train run is noticed in a fraction of the default two seconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    # A first worker group may wait for a slow import or a growing cluster.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_AIR_NEW_OUTPUT": "0",
    # Tune would take Ctrl-C for itself, end its search early, and the run would go on to the next stage.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that spin while they wait make a shared CPU several times slower than ones that sleep.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def prepare_environment() -> None:
    """Environment variables that Ray's processes must find before Ray is imported; a user's own values win."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def cluster(address: str | None, resources: ResourcesPart) -> Iterator[bool]:
    """Connects to `address` (or RAY_ADDRESS), or starts Ray here; yields whether it was started here.

    A cluster started here is stopped on the way out. Raises InputError when the cluster cannot be
    reached, or is smaller than the trials side by side need.
    """
    prepare_environment()
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise InputError(
            f"{address} is a Ray Client address; the run's driver must be on the cluster. "
            "Use `ray-unlearn submit JOB.yaml --address http://HOST:8265`."
        )
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address and address != "local":
            ray.init(address=address, runtime_env=worker_environment(elsewhere=True), **options)
        else:
            environment = worker_environment(elsewhere=False)
            ray.init("local", runtime_env=environment, include_dashboard=resources.dashboard, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"the Ray cluster {address or 'local'} cannot be used: {error}") from error
    finally:
        _handle(signal.SIGTERM, on_sigterm)  # Ray's own would end the process without a word
    try:
        check_room(resources, ray.nodes())
        yield not address or address == "local"
    finally:
        with _undisturbed():
            ray.shutdown(wait_for_processes=True)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignores signals that would end the process: a second Ctrl-C must not leave Ray's processes behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        _handle(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            _handle(number, handler)


def _handle(number: signal.Signals, handler: Any) -> None:
    """Sets a signal's handler, which the main thread alone may do."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def worker_environment(elsewhere: bool) -> dict[str, object]:
    """What workers import that they may lack: plugins and, on another machine, this package.

    The driver's own sys.path does not reach them. Empty where there is nothing, which starts workers sooner.
    """
    plugins = loaded()
    environment: dict[str, Any] = {}
    code = [*([PACKAGE] if elsewhere else []), *dict.fromkeys(plugin.code for plugin in plugins)]
    if code:
        environment["py_modules"] = [str(path) for path in code]
    if plugins:
        environment["env_vars"] = plugin_variables()
    return environment


def check_room(resources: ResourcesPart, nodes: list[dict[str, Any]]) -> None:
    """Refuses trials that the cluster could never start, which Ray would wait for without a word."""
    each = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    have = [node["Resources"] for node in nodes if node["Alive"]]
    for name, value in each.items():
        needed, total = value * resources.workers * resources.concurrency, sum(node.get(name, 0) for node in have)
        if needed > total:
            raise InputError(
                f"the trials side by side need {needed:g} {name}s (workers x {name.lower()}s_per_worker x "
                f"concurrency), and the cluster has {total:g}: lower resources.concurrency or resources.workers."
            )
    if not any(all(node.get(name, 0) >= value for name, value in each.items()) for node in have):
        raise InputError(
            f"no node of the cluster has {each['CPU']:g} CPUs and {each['GPU']:g} GPUs for one worker: lower "
            "resources.cpus_per_worker or resources.gpus_per_worker."
        )


def check_storage(job: Job, shared: bool) -> None:
    """Refuses several nodes without a place that all of them can write: Ray Train needs one."""
    import ray

    nodes = sum(node["Alive"] for node in ray.nodes())
    if nodes > 1 and not shared and job.resources.storage is None:
        raise InputError(
            f"the cluster has {nodes} nodes, and Ray Train needs a place that all of them can write: set "
            "resources.storage to a shared folder or an s3:// URI, or resources.shared_storage to true if all nodes "
            "see the run's directory."
        )
