"""The edit as operators on tensors: PyTorch custom operators, and their ATen and plain forms."""

from kernel_surgery.ops.library import (
    MAX_RANK,
    UP_TO_FLOAT32,
    check_rank,
    packed,
    project,
    project_add,
    project_add_rmsnorm,
    provider,
    set_batch_invariant,
)

__all__ = [
    "MAX_RANK",
    "UP_TO_FLOAT32",
    "check_rank",
    "packed",
    "project",
    "project_add",
    "project_add_rmsnorm",
    "provider",
    "set_batch_invariant",
]
