"""Randomly initialised models of a few thousand parameters, one per known architecture, made offline.

Each is made from the real configuration class of transformers, with the switches that its checkpoints have: shared
experts, dense layers between, biases. Every bias is random, for one that is zero would hide that it was forgotten.
"""

from typing import Any

import torch

D, LAYERS, EXPERTS, WORDS = 48, 4, 4, 64
# Larger weights than the default 0.02: at that size every output is nearly zero, and any edit passes any bound.
_COMMON: dict[str, Any] = {
    **{"vocab_size": WORDS, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256},
    **{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2},
}
_EXPERTS: dict[str, Any] = {
    **{"num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS},
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 2, "moe_k": 2},
}
_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
_QWEN_VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "depth": 3, "num_heads": 2}
_QWEN_VISION |= {"out_hidden_size": D, "deepstack_visual_indexes": [0]}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
# {model type of several modalities: (what its language model has besides, the configuration of its vision model)}.
_INSIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": ({}, _VISION | {"image_size": 28, "patch_size": 14}),
    "mistral3": ({"model_type": "mistral"}, _VISION | {"model_type": "pixtral", "head_dim": 8}),
    "llama4": (
        {"model_type": "llama4_text"},
        _VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "qwen2_vl": (_SECTIONS, _QWEN_VISION | {"hidden_size": D, "embed_dim": 16}),
    "qwen2_5_vl": (_SECTIONS, _QWEN_VISION),
    "qwen3_vl": (_SECTIONS, _QWEN_VISION),
    "qwen3_5": ({}, _QWEN_VISION),
    "qwen3_5_moe": ({"model_type": "qwen3_5_moe_text"}, _QWEN_VISION),
}
_DENSE_FIRST = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
# Attention whose keys and values are compressed.
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 12}
_LATENT |= {"num_key_value_heads": 4, "head_dim": 4}
# {model type: what its configuration has besides}. None leaves a field out.
_OWN: dict[str, dict[str, Any]] = {
    "falcon": {"head_dim": None},
    "stablelm": {"head_dim": None, "partial_rotary_factor": 0.5},
    "gpt2": {"head_dim": None, "n_inner": 96},
    "mpt": {"d_model": D, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 256, "expansion_ratio": 2},
    "qwen3_moe": _EXPERTS | {"mlp_only_layers": [1]},
    "qwen2_moe": _EXPERTS | {"mlp_only_layers": [1]},
    "qwen3_next": _EXPERTS | {"mlp_only_layers": [1]},
    "qwen3_5_moe_text": _EXPERTS,
    "olmoe": _EXPERTS,
    "flex_olmo": _EXPERTS,
    "phimoe": _EXPERTS,
    "solar_open": _EXPERTS | _DENSE_FIRST,
    "glm4_moe_lite": _EXPERTS | _DENSE_FIRST | _LATENT,
    "deepseek_v2": _EXPERTS | _DENSE_FIRST | _LATENT,
    "afmoe": _EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1},
    "gptj": {"head_dim": None, "rotary_dim": 4, "n_inner": 96},
    "gpt_bigcode": {"head_dim": None, "n_inner": 96},
    "persimmon": {"head_dim": None},
    "mixtral": _EXPERTS,
    "minimax_m2": _EXPERTS,
    "granitemoe": _EXPERTS,
    "gpt_oss": _EXPERTS,
    "hunyuan_v1_moe": _EXPERTS | {"moe_topk": 2},
    "ernie4_5_moe": _EXPERTS | {"moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "glm4_moe": _EXPERTS | _DENSE_FIRST,
    "deepseek_v3": _EXPERTS | _DENSE_FIRST | _LATENT,
    "llama4_text": _EXPERTS | {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
}


def fields(kind: str) -> dict[str, Any]:
    """Return the fields of a pico model's configuration that are not left as they are."""
    return _COMMON | _OWN.get(kind, {})


def configuration(kind: str, **config: Any) -> Any:
    """Return the configuration of a pico model. config: fields of the language model to change; None leaves one out."""
    import transformers

    fields = {k: v for k, v in (_COMMON | _OWN.get(kind, {}) | config).items() if v is not None or k == "bos_token_id"}
    if kind not in _INSIDE:
        return transformers.AutoConfig.for_model(kind, **fields)
    text, vision = _INSIDE[kind]
    fields = _COMMON | _OWN.get(text.get("model_type", ""), {}) | text | config
    return transformers.AutoConfig.for_model(kind, text_config=fields, vision_config=vision)


def pico_of(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """Return a model of a type in eval mode. config: as in `configuration`."""
    from kernel_surgery.models.load import model_class

    torch.manual_seed(seed)
    made = configuration(kind, **config)
    model = model_class(made).from_config(made, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model
