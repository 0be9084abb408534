"""Writing a merge as a model directory, tensor by tensor through mergekit's writer. The only owner of mergekit."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ray_unlearn.errors import InputError
from ray_unlearn.files import publish
from ray_unlearn.merging import MergeRecipe
from ray_unlearn.merging.combine import Combiner
from ray_unlearn.merging.members import Source
from ray_unlearn.models.loading import empty_model, load_model, load_tokenizer
from ray_unlearn.models.stored_tensors import StoredTensors


def write_merge(recipe: MergeRecipe, base: str, members: Mapping[str, Source], out: Path) -> None:
    """Writes the merge of members, by name, of the model at `base` as a Hugging Face directory at `out`.

    float32. The weights are bit for bit those of Merger.merge on the same machine. Neither the base
    nor the result is ever whole in memory: a tensor is read, merged and handed to mergekit's
    TensorWriter, which keeps one shard of at most 5 GB. A base without safetensors of its own names
    (GGUF, a hub id) is loaded and saved once before. The output is renamed into place.
    """
    from transformers import AutoConfig, GenerationConfig

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merge-") as scratch:
        source = _source(base, Path(scratch))
        combiner = Combiner(empty_model(str(source)))
        for name in recipe.leaves():
            combiner.add(name, members[name])
        result = Path(scratch) / "out"
        _write_tensors(recipe, combiner, StoredTensors(source), result)
        config = AutoConfig.from_pretrained(source)
        config.dtype = "float32"
        config.save_pretrained(result)
        if (source / "generation_config.json").exists():
            GenerationConfig.from_pretrained(source).save_pretrained(result)
        load_tokenizer(base).save_pretrained(result)
        publish(result, out)


def _source(base: str, scratch: Path) -> Path:
    """A directory with the base's tensors under the names that the model gives them."""
    place = Path(base)
    if (place / "config.json").exists():
        stored = StoredTensors(place)
        if all(name in stored for name, _ in empty_model(base).named_parameters()):
            return place
    load_model(base).save_pretrained(scratch / "base")
    return scratch / "base"


def _write_tensors(recipe: MergeRecipe, combiner: Combiner, stored: StoredTensors, out: Path) -> None:
    from mergekit.io.tensor_writer import TensorWriter

    parameters = {name for name, _ in combiner.base.named_parameters()}
    touched = set(combiner.touched(recipe))
    absent = sorted(touched.difference(stored))
    if absent:
        raise InputError(f"the base's files lack {len(absent)} tensors that members change: {absent[:8]}.")
    tied = set(combiner.base.state_dict()) - parameters - {name for name, _ in combiner.base.named_buffers()}
    with torch.no_grad(), TensorWriter(str(out)) as writer:
        for name in stored:
            if name in tied:  # written once, under its parameter's name
                continue
            tensor = stored[name]
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if name in touched:
                tensor = combiner.merged(recipe, name, tensor).add_(tensor)
            writer.save_tensor(name, tensor)
