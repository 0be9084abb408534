"""Writing a merge as a model directory, tensor by tensor through mergekit's writer. The only owner of mergekit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ray_unlearn.errors import InputError
from ray_unlearn.files import publish
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.combine import Change, finite, merge_change
from ray_unlearn.merging.members import Source
from ray_unlearn.models.loading import empty_model, load_model, load_tokenizer, quiet
from ray_unlearn.models.stored_tensors import StoredTensors
from ray_unlearn.protocols import CausalLM

AGREEMENT = 1e-5
"""How far written weights may be from what they should be; on one machine they are the same bits."""


def write_merge(
    recipe: MergeRecipe, base: str, members: Mapping[str, Source], out: Path, dtype: str = "float32"
) -> None:
    """Writes the merge of members, by name, of the model at `base` as a Hugging Face directory at `out`."""
    write_model(base, lambda model: merge_change(model, recipe, members), out, dtype)


def write_model(base: str, change_of: Callable[[CausalLM], Change], out: Path, dtype: str = "float32") -> None:
    """Writes a changed model of the one at `base` as a Hugging Face directory at `out`.

    The base is taken, and the result written, in `dtype`, as load_model holds them: the weights are bit for bit those
    of Merger.merge on a model loaded in that type on the same machine. Neither is ever whole in memory: a tensor is
    read, changed and handed to mergekit's TensorWriter, which keeps one shard of at most 5 GB. A base without
    safetensors of its own names (GGUF, a hub id) is loaded and saved once before. The output is renamed into place.
    """
    from transformers import AutoConfig, GenerationConfig

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as scratch:
        source = _source(base, Path(scratch), dtype)
        model, stored = _weightless(source, dtype), StoredTensors(source)
        change, result = change_of(model), Path(scratch) / "out"
        if all(name in stored for name in change.touched):
            _write_tensors(change, model, stored, result)
        else:
            _write_whole(base, change, result, dtype)
        config = AutoConfig.from_pretrained(source)
        config.dtype = dtype
        config.save_pretrained(result)
        if (source / "generation_config.json").exists():
            GenerationConfig.from_pretrained(source).save_pretrained(result)
        load_tokenizer(base).save_pretrained(result)
        publish(result, out)


def check_written(model: CausalLM, change: Change, out: Path, dtype: str) -> float:
    """The largest difference of the model at `out`, as it is loaded in `dtype`, from `change` applied to `model`, its
    loaded base. Raises RuntimeError, naming the tensor, when one is above AGREEMENT."""
    written: Mapping[str, Tensor] = StoredTensors(out)
    if any(name not in written for name, _ in model.named_parameters()):  # stored under other names than held
        written = dict(load_model(str(out), dtype).named_parameters())
    worst = 0.0
    for name, parameter in model.named_parameters():
        untouched = parameter.detach()
        expected = change.weights(name, untouched) if name in change.touched else untouched
        difference = float((written[name].detach().to(expected).float() - expected.float()).abs().max())
        if not difference <= AGREEMENT:
            raise RuntimeError(
                f"the written {name} is {difference:.2e} from what it should be; at most {AGREEMENT:g} is accepted."
            )
        worst = max(worst, difference)
    return worst


def _source(base: str, scratch: Path, dtype: str) -> Path:
    """A directory with the base's tensors under the names that the model gives them, where it can be had."""
    place = Path(base)
    if (place / "config.json").exists():
        stored = StoredTensors(place)
        if all(name in stored for name, _ in empty_model(base).named_parameters()):
            return place
    load_model(base, dtype).save_pretrained(scratch / "base")
    return scratch / "base"


def _weightless(source: Path, dtype: str) -> CausalLM:
    """The model's parameters in the types that loading gives them (some families keep a few in float32)."""
    from transformers import AutoModelForCausalLM

    quiet()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype), device_map="meta")
    return cast(CausalLM, model)


def _write_tensors(change: Change, model: CausalLM, stored: StoredTensors, out: Path) -> None:
    from mergekit.io.tensor_writer import TensorWriter

    types = {name: parameter.dtype for name, parameter in model.named_parameters()}
    tied = set(model.state_dict()) - set(types) - {name for name, _ in model.named_buffers()}
    with torch.no_grad(), TensorWriter(str(out)) as writer:
        for name in stored:
            if name in tied:  # written once, under its parameter's name
                continue
            tensor = stored[name]
            if name in types:  # what is no parameter stays as it is
                tensor = tensor.to(types[name])
            if name in change.touched:
                tensor = change.weights(name, tensor)
            if name in types and not finite(tensor):
                raise InputError(f"{name} of the model to be written holds NaN or infinity; look for it in the base.")
            writer.save_tensor(name, tensor)


def _write_whole(base: str, change: Change, out: Path, dtype: str) -> None:
    """Through memory, for families whose files have other tensors than the model (experts, one by one)."""
    model = load_model(base, dtype)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in change.touched:
            parameters[name].copy_(change.weights(name, parameters[name]))
    model.save_pretrained(out)
