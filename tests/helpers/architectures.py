"""A model of each causal architecture of the installed transformers, small enough to be decoded in a test."""

from __future__ import annotations

import re

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, CONTEXT, WINDOW, PAD, EOS = 61, 128, 8, 0, 2

SIZES = {
    VOCABULARY: """vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size""",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions",
    32: """hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size input_embedding_size
        output_embedding_size attention_hidden_size backbone_hidden_size lru_width pronunciation_embed_dim
        shape_embed_dim intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner dff
        dim_ff ffn_hidden_size shared_expert_intermediate_size shared_experts_intermediate_size intermediate_size_mlp
        dense_intermediate_size expert_ffn_hidden_size feed_forward_size moe_shared_expert_intermediate_size
        shared_intermediate_size""",
    8: """head_dim swa_head_dim dim_head d_head kv_channels attention_head_size linear_head_dim v_head_dim
        qk_nope_head_dim qk_rope_head_dim index_head_dim linear_key_head_dim linear_value_head_dim rotary_dim
        q_lora_rank kv_lora_rank o_lora_rank adapter_rank laurel_rank hidden_size_per_layer_input mamba_d_state
        mamba_d_head mamba_n_heads state_size ssm_state_size chunk_size mamba_chunk_size""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads
        linear_num_heads num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num
        index_n_heads""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_layers_per_stack num_blocks num_key_value_heads num_kv_heads kv_n_heads
        swa_num_key_value_heads linear_num_key_heads linear_num_value_heads num_experts_per_tok moe_topk moe_top_k moe_k
        num_experts_per_token top_k n_groups mamba_n_groups""",
    1: "n_group topk_group num_expert_group num_dense_layers first_k_dense_replace",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS, "decoder_start_token_id": 1, "eod_token_id": EOS}
BOUNDED = re.compile(r"window|local|chunk|sliding")
"""Names of numbers that may limit how far back a layer looks."""

LINEAR, FULL, SLIDING, INDEXED = "linear_attention", "full_attention", "sliding_attention", "indexed_attention"
ROPE = {"rope_type": "default", "rope_theta": 1e4}
LATENT = {"num_key_value_heads": 4}
"""Latent attention has as many key heads as query heads."""
DOTS = {**LATENT, "head_dim": 16, "per_layer_config": {}, "layer_types": [INDEXED] * 2}
QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
QSA |= {"indexer_compress_ratio": 2}
ZAMBA = {"n_mamba_heads": 2, "attention_head_dim": 16, "attention_hidden_size": 64, "mamba_d_state": 8}
OVERRIDES = {
    **dict.fromkeys("axk1 axk2 bailing_hybrid deepseek_v3 deepseek_v32 glm4_moe_lite".split(), LATENT),
    **dict.fromkeys("glm_moe_dsa kimi_linear longcat_flash minicpm3 youtu".split(), LATENT),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {FULL: ROPE, SLIDING: ROPE}, "layer_types": [SLIDING, FULL]},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS},
    "dots3_note_text": DOTS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL] * 2}
    | {"intermediate_size": 32, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "hrm_text": {"num_hidden_layers": 16},  # a cache for each layer of each cycle
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QSA},
    "qwen4_exp_text": QSA,
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its states' sizes are multiples of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "layers_block_type": [LINEAR, "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {**ZAMBA, "layers_block_type": [LINEAR, "hybrid"], "n_mamba_heads": 8},
}
"""What a small configuration needs beside small numbers."""
SLIDES = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}


def small_model(name, narrow=False, **settings):
    """The architecture with random weights, a layer of each kind; `narrow` ones look WINDOW tokens back at most."""
    torch.manual_seed(0)
    config = small_config(name, narrow, **settings)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms start at exactly 1 and logits near uniform; make both distinct
        parameter.add_((0.25 if parameter.dim() > 1 else 0.1) * torch.randn(parameter.shape))
    return model


def small_config(name, narrow=False, **more):
    """The default configuration with small numbers under its own names."""
    default = CONFIG_MAPPING[name]()
    settings = _merged(_small(default.to_dict(), narrow), OVERRIDES.get(name, {}))
    if hasattr(default, "is_decoder"):
        settings["is_decoder"] = True
    return CONFIG_MAPPING[name](**settings | more)


def has_window(name):
    """Whether a configuration names a number that may be a window."""
    settings = CONFIG_MAPPING[name]().to_dict()
    return _small(settings, narrow=True) != _small(settings, narrow=False)


def _small(settings, narrow):
    made = {}
    kinds, layers = settings.get("layer_types") or [], settings.get("num_hidden_layers") or 0
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)]  # a layer of each kind
    kept = kept if len(kept) > 1 else [0, layers - 1]
    for name, value in settings.items():
        number = type(value) is int and value > 0
        if isinstance(value, dict) and name.endswith("config"):
            made[name] = _small(value, narrow)
        elif name in TOKENS:
            made[name] = TOKENS[name]
        elif isinstance(value, list) and len(value) == layers > 2:
            made[name] = [value[layer] for layer in kept]
        elif name == "num_hidden_layers" and number:
            made[name] = len(kept)
        elif name in SMALL and number:
            made[name] = min(value, SMALL[name])
        elif narrow and number and BOUNDED.search(name):
            made[name] = min(value, WINDOW)
    if narrow and "use_sliding_window" in settings:
        made |= SLIDES | ({"layer_types": [FULL, SLIDING]} if kinds else {})
    return made


def _merged(settings, more):
    return settings | {
        name: _merged(settings[name], value) if isinstance(value, dict) and name in settings else value
        for name, value in more.items()
    }
