"""Real models' shapes with random weights, made offline: what is timed does not depend on the values."""

import copy

# Qwen/Qwen2.5-3B, config.json.
QWEN = {
    **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768},
}


def random_model(dtype, device, **changes):
    """A Qwen2 model of QWEN's shapes, changed as told, with random weights of a fixed seed, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN | changes), dtype=dtype)
    return model.eval().requires_grad_(False)


def random_bases(model, rank: int = 10, layers=None) -> dict:
    """{layer: orthonormal basis [d_model, rank] float32 on the model's device} of the middle half of the layers."""
    import torch

    from kernel_surgery.models.architectures import decoder_layers, default_layers

    d, found = model.config.hidden_size, {}
    chosen = default_layers(len(decoder_layers(model))) if layers is None else layers
    for layer in chosen:
        generator = torch.Generator().manual_seed(layer)
        basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))[0]
        found[layer] = basis.float().contiguous().to(model.device)
    return found


def twin(model, own=()):
    """Another model of the same modules that shares every parameter and buffer with `model`, but for `own`: parameters
    of `model` of which the twin gets copies. Hooks and edits of the one are not the other's."""
    kept = {id(t) for t in own}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in kept}
    return copy.deepcopy(model, shared)
