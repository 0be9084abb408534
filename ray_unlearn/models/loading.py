"""Loading models and tokenizers: directories, hub ids, GGUF files; adapters; what can be wrong with them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_unlearn.errors import InputError, problem_list
from ray_unlearn.files import publish, room_for
from ray_unlearn.protocols import CausalLM, ModelConfig, Tokenizer

if TYPE_CHECKING:
    from torch.nn import Module

DTYPES = ("float32", "bfloat16")


def quiet() -> None:
    """Keeps transformers from drawing bars and from warning about what is meant here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_model(path: str) -> None:
    """Refuses, before anything is loaded, a model path that cannot work."""
    place = Path(path)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise InputError(f"no such GGUF file: {path}.")
        return
    if not place.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return  # a hub id: transformers will say whether it exists
        raise InputError(f"no such model: {path!r} is neither a directory, a .gguf file nor a hub id OWNER/NAME.")
    if not (place / "config.json").exists():
        raise InputError(f"{path} is no model directory: it has no config.json.")
    if not any((place / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise InputError(f"{path} has no tokenizer (tokenizer.json): save it there with tokenizer.save_pretrained.")


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a model, with a padding token (EOS where it has none)."""
    from transformers import AutoTokenizer

    quiet()
    check_model(path)
    place = Path(path)
    try:
        if place.suffix == ".gguf":
            tokenizer = AutoTokenizer.from_pretrained(str(place.parent), gguf_file=place.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # broken files raise many kinds
        raise InputError(f"the tokenizer of {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {path} has neither EOS nor padding token; generation could not stop.")
        tokenizer.pad_token = tokenizer.eos_token
    return cast(Tokenizer, tokenizer)


def load_model(path: str, dtype: str = "float32", adapter: str | None = None) -> CausalLM:
    """The causal language model at `path`, in evaluation mode, with `adapter` (a PEFT directory) merged in."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    from ray_unlearn.models.forward import check_causal

    quiet()
    check_model(path)
    place = Path(path)
    options: dict[str, object] = {"dtype": getattr(torch, dtype)}
    name = path
    if place.suffix == ".gguf":
        # Without dequantize the model is marked as quantised, and can be neither trained nor saved.
        options |= {"gguf_file": place.name, "quantization_config": GgufConfig(dequantize=True)}
        name = str(place.parent)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # GGUF's progress bar has no switch
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that all is named at once
            loaded: object = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # broken files raise many kinds, safetensors' and pickle's among them
        raise InputError(f"the model {path} cannot be loaded: {type(error).__name__}: {error}") from error
    model, found = cast("tuple[CausalLM, dict[str, set[Any]]]", loaded)
    _check_weights(path, model, found)
    check_causal(model)
    if adapter is not None:
        model = _with_adapter(model, path, adapter)
    return model.eval()


def _check_weights(path: str, model: CausalLM, found: Mapping[str, set[Any]]) -> None:
    """Refuses a model whose files lack tensors, have others, or hold what is no number; `found` is what transformers
    says of the loading. It would initialise what is missing at random, and go on."""
    problems = [f"{name} is missing" for name in sorted(map(str, found["missing_keys"]))]
    problems += [f"{name} is not in the model" for name in sorted(map(str, found["unexpected_keys"]))]
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        problems.append(f"{name} has the shape {list(stored)}, and the configuration wants {list(wanted)}")
    if problems:
        what = f"tensors of {path} do not fit its config.json"
        raise InputError(problem_list(what, problems, "Restore the files, or config.json."))
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InputError(f"the model {path} has NaN or infinity in {name}: it has diverged, and cannot be used.")


def load_config(path: str) -> ModelConfig:
    """The configuration of the model at `path`."""
    from transformers import AutoConfig

    place = Path(path)
    options = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
    name = str(place.parent) if options else path
    try:
        return cast(ModelConfig, AutoConfig.from_pretrained(name, **options))
    except Exception as error:  # broken files raise many kinds
        raise InputError(f"the configuration of {path} cannot be loaded: {type(error).__name__}: {error}") from error


def empty_model(path: str) -> CausalLM:
    """The model's shapes without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return cast(CausalLM, AutoModelForCausalLM.from_config(load_config(path)))


def _with_adapter(model: CausalLM, path: str, adapter: str) -> CausalLM:
    from peft import PeftModel, get_peft_model_state_dict

    from ray_unlearn.models.adapters import read_adapter_directory, shapes_of

    checked = read_adapter_directory(adapter, path, shapes_of(model))
    try:
        adapted = PeftModel.from_pretrained(cast("Module", model), adapter)
        ignored = set(checked.names) - set(get_peft_model_state_dict(adapted))
        if ignored:
            raise InputError(f"PEFT has no place in {path} for {sorted(ignored)[:4]} of the adapter {adapter}.")
        return cast(CausalLM, adapted.merge_and_unload())
    except (RuntimeError, TypeError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the adapter {adapter} does not fit the model {path}: {error}") from error


def check_adapter(adapter: str, base: str) -> None:
    """Refuses, before any weights are loaded, an adapter directory that does not fit the model at `base`."""
    from ray_unlearn.models.adapters import read_adapter_directory, shapes_of

    check_model(base)
    read_adapter_directory(adapter, base, shapes_of(empty_model(base)))


def save_model(model: CausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes a plain Hugging Face directory whole or not at all: a temporary name beside it, then renamed."""
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    quiet()
    try:
        with room_for(directory, sum(one.numel() * one.element_size() for one in model.parameters())):
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        publish(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def layer_prefix(model: CausalLM) -> str:
    """The name of the list of decoder layers, `model.layers` in most families."""
    from torch.nn import ModuleList

    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == count:
            return name.removeprefix("base_model.model.")
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers; layers cannot be named in it.")


def check_layers(model: CausalLM, layers: Sequence[int], what: str) -> None:
    """Refuses a layer index that the model does not have."""
    count = model.config.num_hidden_layers
    beyond = [layer for layer in layers if not 0 <= layer < count]
    if beyond:
        raise InputError(
            f"{what} names layer {beyond[0]}, and the model has layers 0 to {count - 1}. A recipe for a larger model "
            "is adapted by --scale-to-model."
        )


def find_layer(model: CausalLM, layer: int | str) -> str:
    """The whole name of a decoder layer by its index, or of the one module that a regular expression matches."""
    if isinstance(layer, int):
        check_layers(model, [layer], "rmu_layer")
        return f"{layer_prefix(model)}.{layer}"
    names = [name.removeprefix("base_model.model.") for name, _ in model.named_modules()]
    found = [name for name in names if re.fullmatch(layer, name)]
    if len(found) != 1:
        what = f"matches {len(found)} modules, first {found[:2]}" if found else "matches no module"
        raise InputError(f"rmu_layer {layer!r} {what}; the decoder layers are {layer_prefix(model)}.0 and so on.")
    return found[0]
