"""Targets: models that know both sets. A benchmark's two, or any base fine-tuned on rows."""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray_unlearn.config.job import Job
from ray_unlearn.data.benchmarks import DATASETS
from ray_unlearn.data.rows import limit_documents, load_pair
from ray_unlearn.data.tokens import Encoded, by_length, collate, encode
from ray_unlearn.errors import InputError
from ray_unlearn.files import claim_directory, weights_digest, write_json
from ray_unlearn.models.loading import check_model, load_model, load_tokenizer, save_model
from ray_unlearn.plugins import load_in_worker, loaded, plugin_variables
from ray_unlearn.protocols import CausalLM, Tokenizer
from ray_unlearn.records import Example
from ray_unlearn.schema import digest, from_dict, require, to_dict

Log = Callable[[str], None]
TARGET_FILE = "target.json"
BUILDING = "building.json"
"""Stands in a benchmark's folder until it is complete, and says that the folder is ours."""


def fit(
    model: CausalLM,
    rows: Sequence[Encoded],
    pad_id: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int = 0,
    log: Log = lambda line: None,
    name: str = "target",
) -> float:
    """Trains all weights on whole rows, prompt and answer alike, by AdamW with a one-cycle rate; returns the last loss.

    Batches hold rows of similar length, which saves most of the padding; their order is shuffled
    in each epoch, as are the rows of equal length.
    """
    import torch

    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    steps = epochs * math.ceil(len(rows) / batch_size)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    model.train()
    loss = math.nan
    began = time.monotonic()
    for epoch in range(epochs):
        order = rng.sample(range(len(rows)), len(rows))
        shuffled = [rows[i] for i in order]
        batches = by_length(shuffled, lambda row: len(row.ids) // 8, batch_size)
        rng.shuffle(batches)
        losses = []
        for indices in batches:
            batch = collate([shuffled[i] for i in indices], pad_id)
            logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits[:, :-1]
            token_loss = torch.nn.functional.cross_entropy(logits[batch.document], batch.ids[:, 1:][batch.document])
            token_loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            losses.append(token_loss.item())
        loss = sum(losses) / len(losses)
        log(f"{name}: epoch {epoch + 1}/{epochs}, loss {loss:.3f}, {time.monotonic() - began:.0f} s")
    model.eval()
    return loss


def fit_to_rows(
    model: CausalLM,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    log: Log,
    name: str = "target",
    **options: Any,
) -> float:
    """`fit` on (prompt, answer) pairs, each ending in EOS."""
    rows = [encode(tokenizer, prompt, answer, eos=True) for prompt, answer in pairs]
    return fit(model, rows, tokenizer.pad_token_id, log=log, name=name, **options)


def build_benchmark(name: str, directory: Path, settings: Mapping[str, object], log: Log = lambda line: None) -> Path:
    """A benchmark under `directory`/<name>-<digest>: data, `target` and `reference` models; built once.

    `settings` are all of its settings as plain values. Returns that folder. Its settings.json is written last: a
    folder that has one is complete.
    """
    place = directory / f"{name}-{digest({**settings, 'format': DATASETS.find(name).format})}"
    with _alone(place, log):
        if (place / "settings.json").exists():
            log(f"{name} benchmark: cached in {place}")
            return place
        return _build_at(name, place, settings, log)


@contextmanager
def _alone(place: Path, log: Log) -> Iterator[None]:
    """Waits until no other process builds what is to stand at `place`; a process that dies lets go."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that builds {place}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: both build the same, and files are renamed into place
            pass
        yield


def _build_at(name: str, place: Path, settings: Mapping[str, object], log: Log) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    stated = {"benchmark": name, **settings}
    write_json(place / BUILDING, stated)
    dataset = DATASETS.find(name)
    dataset.write(from_dict(dataset.settings, dict(settings)), place)
    # Two processes of one thread each: operations this small do not profit from two threads. They are
    # started as commands, since a spawned pool would run a user's own script again.
    program = "import sys; from ray_unlearn.pipeline.target import build_one; build_one(*sys.argv[1:])"
    environment = os.environ | plugin_variables() | {"OMP_NUM_THREADS": "1"}
    places = [*filter(None, sys.path), *(str(plugin.code.parent) for plugin in loaded())]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(places))
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(place), model, name, json.dumps(settings)],
            env=environment,
            stdout=subprocess.PIPE,
        )
        for model in ("target", "reference")
    ]
    try:
        for builder in builders:
            answer = builder.communicate()[0].decode().strip()
            if builder.returncode != 0:
                raise RuntimeError(
                    f"building the {name} benchmark failed with exit code {builder.returncode}; see above."
                )
            log(f"{name} benchmark: {answer}")
    finally:
        for builder in builders:
            builder.kill()
            builder.wait()
    write_json(place / "settings.json", stated)
    (place / BUILDING).unlink(missing_ok=True)
    return place


def build_one(directory: str, model_name: str, benchmark: str, stated: str) -> None:
    """Trains a benchmark's `target` or `reference` in this process and prints how it went."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one who started this, who ends it
    load_in_worker()
    place, began, dataset = Path(directory), time.monotonic(), DATASETS.find(benchmark)
    settings = from_dict(dataset.settings, json.loads(stated))
    torch.set_num_threads(1)
    model, tokenizer = dataset.untrained(settings)
    loss = fit_to_rows(
        model,
        tokenizer,
        dataset.texts(settings, model_name == "target"),
        lambda line: None,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
    )
    save_model(model, tokenizer, place / model_name)
    print(f"{model_name} trained, loss {loss:.4f}, {time.monotonic() - began:.0f} s")


def job_target(job: Job, rows: Sequence[Example], log: Log) -> tuple[str, str | None, Path | None]:
    """A job's model path, its retrained reference where there is one, and the benchmark's data folder.

    A base model is fine-tuned on `rows`, the job's forget and retain rows; cached by what decides it.
    """
    if job.model.path is not None:
        return job.model.path, None, None
    cache, part = Path(job.target.cache).expanduser(), job.target
    if part.benchmark is not None:
        place = build_benchmark(part.benchmark, cache, part.settings, log)
        return str(place / "target"), str(place / "reference"), place
    pairs = [(row.input, row.output) for row in rows]
    assert part.base is not None
    what = {"pairs": pairs, "base": weights_digest(part.base) or part.base, "seed": job.seed}
    what |= {name: getattr(part, name) for name in ("epochs", "batch_size", "learning_rate")}
    place = cache / f"target-{digest(what)}"
    with _alone(place, log):
        if place.exists():
            log(f"target: cached in {place}")
            return str(place), None, None
        log(f"target: fine-tuning {part.base} on {len(pairs)} rows")
        options: dict[str, object] = {name: getattr(part, name) for name in ("epochs", "batch_size", "learning_rate")}
        return str(make_target(part.base, pairs, place, log, seed=job.seed, **options)), None, None


def make_target(base: str, pairs: Sequence[tuple[str, str]], out: Path, log: Log, **options: Any) -> Path:
    """Fine-tunes all weights of a base model on (prompt, answer) pairs and writes it to `out`."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    fit_to_rows(model, tokenizer, pairs, log, **options)
    save_model(model, tokenizer, out)
    return out


def build_benchmark_at(name: str, out: Path, seed: int | None, log: Log) -> Path:
    """A benchmark's files, target and reference directly in `out`."""
    given = {} if seed is None else {"seed": seed}
    settings = to_dict(from_dict(DATASETS.find(name).settings, given, "--seed"))
    stated = out / "settings.json"
    if stated.exists():
        if json.loads(stated.read_text()) != {"benchmark": name, **settings}:
            raise InputError(
                f"{out} holds a benchmark of other settings: {stated.read_text().strip()}. Give another --out."
            )
        log(f"{name} benchmark: already in {out}")
        return out
    claim_directory(out, BUILDING)
    return _build_at(name, out, settings, log)


def build_target_at(
    base: str, forget: str, retain: str, limit: int | None, skip_bad: bool, out: Path, log: Log, **options: Any
) -> Path:
    """A base model fine-tuned on the rows of two files, written to `out`."""
    for name in ("epochs", "batch_size", "learning_rate"):
        require(options[name] > 0, f"{name} must be above 0, got {options[name]}: a budget of 0 does nothing.")
    claim_directory(out, TARGET_FILE)
    check_model(base)
    pair = load_pair(forget, retain, skip_bad)
    rows = [row for loaded in pair for row in limit_documents(loaded.examples, limit)]
    options["seed"] = options.get("seed") or 0
    make_target(base, [(row.input, row.output) for row in rows], out, log, **options)
    write_json(out / TARGET_FILE, {"base": base, "rows": len(rows), **options})
    return out
