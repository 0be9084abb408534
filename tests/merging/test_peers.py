"""Agreement with mergekit on full checkpoints and with PEFT on factors, over random numbers, in float32."""

from __future__ import annotations

import copy
import random
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ray_unlearn.merging import MERGES, MergeRecipe
from ray_unlearn.merging.resident import Merger

TOLERANCE = 1e-6
LAYERS = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of three layers with weights around 1e-3: what a delta keeps is then not decided by rounding."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("peers")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(std=1e-3)
    model.save_pretrained(folder / "base")
    return SimpleNamespace(model=model, folder=folder, path=folder / "base")


@pytest.fixture(scope="module")
def members(base):
    """Full checkpoints, all tensors of which differ from the base."""
    found = {}
    for seed in range(3):
        folder = base.folder / f"member-{seed}"
        generator = torch.Generator().manual_seed(seed + 1)
        model = copy.deepcopy(base.model)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder)
        found[f"member-{seed}"] = folder
    return found


def random_recipe(method, seed):
    rng = random.Random(f"{method} {seed}")
    row = MERGES[method]
    count = row.most or rng.randint(max(1, row.fewest), 3)

    def number(low, high):
        return (
            [rng.uniform(low, high) for _ in range(rng.choice([2, 3]))]
            if rng.random() < 0.3
            else rng.uniform(low, high)
        )

    options, own = {}, {"seed": seed} if row.random else {}
    if "normalize" in row.parameters:
        options["normalize"] = rng.choice([None, True, False])
    if "rescale" in row.parameters:
        options["rescale"] = rng.choice([None, True, False])
    if method == "breadcrumbs":
        own["gamma"] = rng.choice([0.0, 0.01, 0.1])
    weights = [number(0.1, 2) if row.uses_weights and method != "karcher" else 1.0 for _ in range(count)]
    if method == "slerp":  # mergekit's t is one number: a gradient of weights has no gradient of t with straight lines
        weights = [rng.uniform(0.1, 2) for _ in range(count)]
    return MergeRecipe(
        method=method,
        members=[f"member-{place}" for place in rng.sample(range(3), count)],
        weights=weights,
        densities=[number(0.2, 0.8) if row.uses_density else 1.0 for _ in range(count)],
        lambda_=number(0.5, 1.5)
        if "lambda" in row.parameters and row.consensus.__name__ in ("_sum", "_election")
        else 1.0,
        options=own,
        **options,
    )


def mergekit_config(recipe, base, members):
    """The same recipe as mergekit's configuration: the reading of its parameters that the table claims."""
    row = MERGES[recipe.method]
    models = []
    for name, weight, density in zip(recipe.members, recipe.weights, recipe.densities, strict=True):
        parameters = {"weight": weight} | ({"density": density} if row.uses_density else {})
        parameters |= {"gamma": recipe.options["gamma"]} if recipe.method == "breadcrumbs" else {}
        models.append({"model": str(members[name]), "parameters": parameters})
    parameters = {}
    if "normalize" in row.parameters:
        parameters = {"lambda": recipe.lambda_}
        parameters |= {} if recipe.normalize is None else {"normalize": recipe.normalize}
        parameters |= {} if recipe.rescale is None else {"rescale": recipe.rescale}
    method, donor = recipe.method, str(base)
    if method == "linear":  # mergekit's has no lambda: it is task arithmetic, normalised
        method, parameters = "task_arithmetic", {"normalize": True} | parameters
    elif method == "slerp":
        donor, parameters = models[0]["model"], {"t": recipe.weights[1] / sum(recipe.weights)}
    if method in ("slerp", "karcher", "model_stock"):
        models = [{"model": model["model"]} for model in models]
    return {
        "merge_method": method,
        **({"base_model": donor} if method != "karcher" else {}),
        "dtype": "float32",
        "models": models,
        "parameters": parameters,
    }


def mergekit_merge(config, out):
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, lazy_unpickle=True)
    try:
        mergekit.merge.run_merge(MergeConfiguration.model_validate(config), str(out), options)
    finally:
        LoaderCache().flush_all()
        LoaderCache.loaders.clear()  # a class-level dict: it would answer for these paths in the next test
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", [name for name, row in MERGES.items() if not row.random and not row.on_factors])
def test_a_merge_of_full_checkpoints_is_mergekits(base, members, tmp_path, method, seed):
    if not is_theirs(method):
        pytest.skip("mergekit has no such method")
    recipe = random_recipe(method, seed)
    theirs = mergekit_merge(mergekit_config(recipe, base.path, members), tmp_path / "out")
    merger = Merger(base.model, members, str(base.path))
    merger.merge(recipe)
    ours = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    merger.restore()
    assert set(theirs) == set(ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=TOLERANCE)
    assert max(float((ours[name] - base.model.get_parameter(name)).abs().max()) for name in ours) > 0.01


def is_theirs(method):
    from mergekit.merge_methods import registry

    try:
        return registry.get(method) is not None
    except RuntimeError:
        return False


def test_mergekit_has_the_methods_that_are_said_to_be_its():
    said = [name for row in MERGES.values() for name in re.findall(r"mergekit's `(\w+)`", row.source)]
    assert len(said) >= 8 and all(map(is_theirs, ["linear", "task_arithmetic", *said])) and not is_theirs("mine")


def test_mergekits_own_linear_is_ours_with_a_lambda_of_one(base, members, tmp_path):
    recipe = MergeRecipe(method="linear", members=list(members), weights=[0.3, 1.1, 0.6], densities=[1.0] * 3)
    models = [
        {"model": str(members[name]), "parameters": {"weight": weight}}
        for name, weight in zip(recipe.members, recipe.weights, strict=True)
    ]
    theirs = mergekit_merge({"merge_method": "linear", "dtype": "float32", "models": models}, tmp_path / "out")
    merger = Merger(base.model, members, str(base.path))
    merger.merge(recipe)
    for name, parameter in base.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=TOLERANCE)
    merger.restore()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("method", [name for name, row in MERGES.items() if row.random])
def test_given_the_same_masks_a_random_merge_is_mergekits(members, base, monkeypatch, method, seed):
    """mergekit's own functions, tensor by tensor, with the masks that the recipe's seed draws."""
    from mergekit.merge_methods import registry
    from mergekit.sparsify import RescaleNorm, sparsify

    recipe = random_recipe(method, seed)
    merger = Merger(base.model, members, str(base.path))
    names = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.weight", "model.norm.weight"]
    their_method = registry.get(method)
    draw = torch.bernoulli
    for name in names:
        settings = recipe.at(0.0 if name == "model.norm.weight" else int(re.search(r"\d", name)[0]) / (LAYERS - 1))
        weights = base.model.get_parameter(name)
        terms = []
        for member, density in zip(recipe.members, settings.densities, strict=True):
            generator = recipe.generator(merger.combiner.members[member].digest, name)
            shapes = []

            def masks(chances, generator=generator, shapes=shapes):
                shapes.append(chances.shape)
                return draw(chances, generator=generator)

            monkeypatch.setattr(torch, "bernoulli", masks)
            delta = load_file(members[member] / "model.safetensors")[name] - weights
            kept = sparsify(
                delta, density, their_method.sparsification_method, epsilon=recipe.options.get("epsilon", 0.15),
                rescale_norm=RescaleNorm.l1 if settings.rescale else None,
            )  # fmt: skip
            monkeypatch.undo()
            assert len(shapes) == 1 and (kept != delta).any()
            terms.append(kept)
        theirs = their_consensus(their_method, terms, settings)
        ours = merger.combiner.merged(recipe, name, weights)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def their_consensus(method, deltas, settings):
    """The rest of mergekit's GeneralizedTaskArithmeticMerge, of which only get_mask can be called alone."""
    from mergekit.merge_methods.generalized_task_arithmetic import get_mask

    weights = torch.tensor(settings.weights).view(-1, *[1] * deltas[0].dim())
    weighted = torch.stack(deltas) * weights
    mask = get_mask(weighted) if method.consensus_method else torch.ones_like(weighted)
    divisor = (weights * mask).sum(0)
    divisor[divisor.abs() < 1e-8] = 1
    return (weighted * mask).sum(0) / (divisor if settings.normalize else 1) * settings.lambda_


def test_mergekits_tiny_tensors_and_gamma_of_zero_do_not_drop_the_delta_here():
    delta = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    recipe = MergeRecipe(method="breadcrumbs", members=["a"], weights=[1.0], densities=[0.5])
    assert int((recipe.combine([delta]) != 0).sum()) == 32


# -- PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_ties_on_factors_is_pefts(base, tmp_path, seed):
    from peft import LoraConfig, PeftModel, get_peft_model

    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    count, density = rng.randint(2, 3), rng.uniform(0.2, 0.95)  # of one adapter PEFT trims nothing
    weights = [rng.choice([-1, 1, 1]) * rng.uniform(0.2, 2) for _ in range(count)]
    for place in range(count):
        # PEFT scales rsLoRA as it should in this combination, and lets some adapters touch fewer layers.
        config = LoraConfig(
            r=3, lora_alpha=rng.randint(1, 9), use_rslora=place > 0 and rng.random() < 0.5,
            target_modules=["q_proj", "down_proj"] if place else ["q_proj", "down_proj", "v_proj"],
        )  # fmt: skip
        torch.manual_seed(7)
        made = get_peft_model(copy.deepcopy(base.model), config)
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        made.save_pretrained(tmp_path / str(place))
    peft = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "0", adapter_name="0")
    for place in range(1, count):
        peft.load_adapter(tmp_path / str(place), adapter_name=str(place))
    names = [str(place) for place in range(count)]
    peft.add_weighted_adapter(names, weights, "merged", combination_type="ties", density=density)
    peft.set_adapter("merged")
    theirs = peft.merge_and_unload()
    merger = Merger(base.model, {name: tmp_path / name for name in names}, str(base.path))
    merger.merge(MergeRecipe(method="ties_factors", members=names, weights=weights, densities=[density] * count))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(base.model.get_parameter(name), parameter, rtol=0, atol=TOLERANCE)
    merger.restore()
