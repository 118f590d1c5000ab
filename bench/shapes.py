"""Models with the shapes of real ones and random weights, made offline. The times do not depend on the values."""

import copy

# Qwen/Qwen2.5-3B, config.json.
QWEN = {
    **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    **{"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768},
}


def random_model(dtype, device, **changes):
    """A Qwen2 model in eval mode with random weights from a fixed seed. Its shapes are QWEN, updated with `changes`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN | changes), dtype=dtype)
    return model.eval().requires_grad_(False)


def random_bases(model, rank: int = 10, layers=None) -> dict:
    """{layer: orthonormal float32 basis [d_model, rank] on the model's device}, by default of the middle half."""
    import torch

    from kernel_surgery.models.architectures import decoder_layers, default_layers

    d, bases = model.config.hidden_size, {}
    chosen = default_layers(len(decoder_layers(model))) if layers is None else layers
    for layer in chosen:
        generator = torch.Generator().manual_seed(layer)
        basis = torch.linalg.qr(torch.randn(d, rank, generator=generator, dtype=torch.float64))[0]
        bases[layer] = basis.float().contiguous().to(model.device)
    return bases


def twin(model, own=()):
    """A second model with the same modules that shares every parameter and buffer with `model`.

    own: parameters of `model` that the twin copies instead of sharing. Hooks and edits of one model do not affect the
    other.
    """
    copied = {id(t) for t in own}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in copied}
    return copy.deepcopy(model, shared)
