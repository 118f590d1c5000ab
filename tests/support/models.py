"""Randomly initialised models of a few thousand parameters, one per known architecture, made offline."""

import torch

from kernel_surgery.numerics.projection import Projection

PLAIN = ("llama", "mistral", "qwen2", "qwen3")  # layers that the fused operators know whole
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def pico(kind: str, *, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0, **config):
    """A model of type `kind` (qwen2, qwen3, llama, mistral) in eval mode; bias=True gives every down_proj one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    # Larger weights than the default 0.02: at that size every output is nearly zero, and any edit passes any bound.
    made = AutoConfig.for_model(kind, **_COMMON | {"initializer_range": 0.2} | config)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype).eval()
    if bias:
        for layer in model.model.layers:
            down = layer.mlp.down_proj
            down.bias = torch.nn.Parameter(torch.randn(down.out_features, dtype=dtype))
    return model


def basis(d: int, k: int, seed: int = 0) -> torch.Tensor:
    """An orthonormal [d, k] float32 basis, row-major."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0].float().contiguous()


def oblique(d: int, k: int, seed: int = 0, *, offset: bool = False, spread: float = 30.0) -> Projection:
    """An oblique projection: B^T A = I, in a space whose directions differ in size by a factor of `spread`."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    sizes = torch.logspace(0, 1, d, base=spread, dtype=torch.float64) / spread**0.5
    q = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
    a, b = directions @ (sizes[:, None] * q), directions @ (q / sizes[:, None])
    c = torch.randn(k, generator=generator, dtype=torch.float64) if offset else None
    return Projection(a, b, c).map(lambda t: t.float().contiguous())
