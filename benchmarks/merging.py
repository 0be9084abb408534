"""A candidate merge in the resident model against mergekit-yaml and loading its output, side by side.

    python benchmarks/merging.py MODEL            # a Hugging Face directory, e.g. SmolLM2-135M-Instruct

Both merge the same LoRA members (random, all linear layers) by TIES at the same numbers; mergekit reads
them as MODEL+ADAPTER. Prints both times, their ratio, the peak memory of the process that merges, and how
far the two results are apart. OMP_NUM_THREADS sets the threads of both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

WEIGHTS = [0.5, 0.3, 0.2]
DENSITY = 0.8
MIB = 2**20


def make_members(model: str, folder: Path, count: int, rank: int) -> list[Path]:
    """Random adapters on every linear layer but the head, of the size that training gives them."""
    from ray_unlearn.models.loading import empty_model

    empty = empty_model(model)
    linear = {name: m for name, m in empty.named_modules() if isinstance(m, torch.nn.Linear)}
    linear = {name: m for name, m in linear.items() if m is not empty.get_output_embeddings()}
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, module in linear.items():
            key = f"base_model.model.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) * 0.02
            state[f"{key}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) * 0.02
        place = folder / f"adapter-{seed}"
        place.mkdir()
        save_file(state, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        config |= {"target_modules": sorted({name.split(".")[-1] for name in linear})}
        config |= {"base_model_name_or_path": model, "bias": "none", "inference_mode": True}
        (place / "adapter_config.json").write_text(json.dumps(config))
        found.append(place)
    return found


class Memory(threading.Thread):
    """The largest private memory (RssAnon + RssShmem) of this process, sampled every 3 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = self.now()

    @staticmethod
    def now() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def resident(model: str, members: list[Path], repeats: int, out: str) -> dict[str, float]:
    """Times and memory of candidate merges into a loaded model; runs in a process of its own."""
    from ray_unlearn.merging import MergeRecipe
    from ray_unlearn.merging.resident import Merger
    from ray_unlearn.models.loading import empty_model, load_model
    from ray_unlearn.models.snapshot_files import read_snapshot

    empty_model(model)  # imports the architecture: libraries are not what is measured
    memory = Memory()
    memory.start()
    loaded = load_model(model).requires_grad_(False)
    files = {place.name: read_snapshot(place) for place in members}
    began = time.perf_counter()
    merger = Merger(loaded, files, model)
    taken = time.perf_counter() - began

    def recipe_of(density: float, lambda_: float = 1.0) -> MergeRecipe:
        weights = WEIGHTS[: len(members)]
        return MergeRecipe(members=list(files), weights=weights, densities=[density] * len(files), lambda_=lambda_)

    def merge(density: float, lambda_: float = 1.0) -> float:
        return seconds(lambda: merger.merge(recipe_of(density, lambda_)))

    first = merge(DENSITY)
    merged = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()} if out else {}
    if out:
        save_file(merged, out)
        return {}
    other = [merge(round(0.25 + 0.05 * (step % 10), 2)) for step in range(repeats)]
    same = [merge(DENSITY, 0.9 + 0.01 * step) for step in range(repeats)]
    parameters, touched = dict(loaded.named_parameters()), merger.combiner.touched(recipe_of(DENSITY))
    return {
        "taken": taken,
        "first": first,
        "other_density": statistics.median(other),
        "known_density": statistics.median(same),
        "restore": seconds(merger.restore),
        "model_bytes": 4.0 * sum(parameter.numel() for parameter in loaded.parameters()),
        "member_bytes": float(sum(len(data) for part in files.values() for data in part.values())),
        "mapped_bytes": 4.0 * sum(p.numel() for name, p in parameters.items() if name not in touched),
        "peak_bytes": float(memory.peak - memory.start_bytes),
        "max_rss": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def load_written(path: str) -> float:
    """Time to load a model directory, libraries already imported; runs in a process of its own."""
    from ray_unlearn.models.loading import empty_model, load_model

    empty_model(path)  # imports the architecture
    return seconds(lambda: load_model(path))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def by_mergekit(model: str, members: list[Path], folder: Path) -> dict[str, float]:
    """Time of mergekit-yaml on the same inputs, of its start-up alone, and of loading what it wrote."""
    config = {
        "merge_method": "ties",
        "base_model": model,
        "dtype": "float32",
        "parameters": {"normalize": True, "lambda": 1.0},
        "models": [
            {"model": f"{model}+{place}", "parameters": {"weight": weight, "density": DENSITY}}
            for place, weight in zip(members, WEIGHTS, strict=False)
        ],
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "mergekit-yaml")]
    start = seconds(lambda: subprocess.run([*command, "--help"], check=True, capture_output=True))
    arguments = [
        str(folder / "merge.yaml"),
        str(folder / "out"),
        "--lora-merge-cache",
        str(folder / "cache"),
        "--quiet",
    ]
    took = seconds(lambda: subprocess.run([*command, *arguments], check=True, capture_output=True))
    return {"command": took, "start": start, "load": alone(load_written, str(folder / "out"))}


def compare(model: str, members: list[Path], ours: Path, theirs: Path) -> str:
    """How far two results are apart, and how many of the weights that differ lie where a density cuts a member.

    There two tools may differ: the members' deltas are whole steps of the base's rounding, so that many magnitudes
    equal the threshold, and mergekit's sort of them is not stable.
    """
    mine, other = load_file(ours), {}
    for path in sorted(theirs.glob("*.safetensors")):
        other |= load_file(path)
    apart, entries, largest = {}, 0, 0.0
    for name, tensor in mine.items():
        difference = (tensor - other[name]).abs()
        entries, largest = entries + tensor.numel(), max(largest, float(difference.max()))
        if bool((difference > 1e-6).any()):
            apart[name] = difference > 1e-6
    count = sum(int(places.sum()) for places in apart.values())
    return (
        f"{count} of {entries} weights differ by more than 1e-6 (largest difference {largest:.2e}); "
        f"{at_thresholds(model, members, apart)} of them are at a member's threshold"
    )


def at_thresholds(model: str, members: list[Path], places: dict[str, torch.Tensor]) -> int:
    """How many of those weights have, in some member, a magnitude within one rounding step of its threshold."""
    from ray_unlearn.merging.members import Member
    from ray_unlearn.merging.sparsify import count_magnitudes, find_cut, keep_count
    from ray_unlearn.models.loading import load_model
    from ray_unlearn.models.snapshot_files import read_snapshot

    loaded = load_model(model).requires_grad_(False)
    taken = [Member.of(read_snapshot(place), loaded, place.name) for place in members]
    found = 0
    for name, chosen in places.items():
        base = loaded.get_parameter(name).float()
        near = torch.zeros_like(chosen)
        for member in taken:
            delta = member.delta(name, base)
            threshold = find_cut(delta, keep_count(delta.numel(), DENSITY), count_magnitudes(delta)).threshold
            step = torch.finfo(torch.float32).eps * (base + delta).abs()
            near |= (delta.abs() - threshold).abs() <= step
        found += int((near & chosen).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--members", type=int, default=3, choices=[1, 2, 3])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = str(Path(a.model).resolve())
        members = make_members(model, folder, a.members, a.rank)
        r = alone(resident, model, members, a.repeats, "")
        print(f"{a.members} members of rank {a.rank} into {Path(model).name}, {torch.get_num_threads()} threads")
        print(f"resident: members taken, once, in {r['taken']:.2f} s (base copied, magnitudes counted)")
        print(f"          first candidate {r['first']:.2f} s, then {a.repeats} of each kind, median:")
        print(f"          a density that is new {r['other_density']:.2f} s, a known one {r['known_density']:.2f} s")
        print(f"          the base restored in {r['restore']:.2f} s")
        print(f"          private memory {r['peak_bytes'] / MIB:.0f} MiB over that of the libraries at the peak,")
        print(f"          untouched weights mapped {r['mapped_bytes'] / MIB:.0f}, model {r['model_bytes'] / MIB:.0f},")
        print(f"          members {r['member_bytes'] / MIB:.0f}; all resident memory {r['max_rss'] / MIB:.0f} MiB")
        net = (r["peak_bytes"] + r["mapped_bytes"] - r["member_bytes"]) / r["model_bytes"]
        print(
            f"          with the untouched weights, less the members: {net:.2f} x the model (target: 1.6)", flush=True
        )
        k = by_mergekit(model, members, folder)
        total = k["command"] + k["load"]
        print(f"mergekit: mergekit-yaml {k['command']:.2f} s (start-up {k['start']:.2f}), loading {k['load']:.2f} s")
        for name in ("first", "other_density", "known_density"):
            whole, bare = total / r[name], (total - k["start"]) / r[name]
            print(
                f"ratio     {name.replace('_', ' '):14} 1/{whole:.0f}, without start-up 1/{bare:.0f}   (target: 1/20)"
            )
        alone(resident, model, members, 0, str(folder / "ours.safetensors"))
        print(f"results   {compare(model, members, folder / 'ours.safetensors', folder / 'out')}")


if __name__ == "__main__":
    main()
