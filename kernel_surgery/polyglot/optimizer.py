"""The optimizer polyglot is trained with: Muon for the hidden matrices, AdamW for embedding, biases and norms.

Muon (K. Jordan and others, 2024) replaces each matrix's momentum by its nearest orthogonal matrix before the step.
`torch.optim.Muon` does the same but iterates in bfloat16, which a CPU without bfloat16 instructions runs sixteen
times slower than float32 (1.43 s against 0.09 s a step for this model); here the iteration is in float32.
"""

import torch

from kernel_surgery.common.errors import KernelSurgeryError

# Quintic Newton-Schulz coefficients of the published method: steep at zero, singular values end in about [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Roughly U V^T of matrix = U S V^T. matrix [rows, columns] float32; returns a new tensor of that shape."""
    x = matrix / matrix.norm().clamp(min=1e-7)
    wide = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), wide, beta=_A)
    return wide.T if x.shape[0] > x.shape[1] else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; decoupled weight decay. For 2-D parameters only (ValueError otherwise)."""

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise KernelSurgeryError(f"Muon steps matrices only, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None):
        """One step; parameters without a gradient are left alone."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalize(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # Equal size of the change per output, whatever the shape.
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
