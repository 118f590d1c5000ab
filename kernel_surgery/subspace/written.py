"""A subspace whose edit was made before, and brings its numbers along."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kernel_surgery.subspace.artifact import Subspace


@dataclass(frozen=True, repr=False)  # a generated repr would print the tensors
class Written(Subspace):
    """An edit as a folder on disk holds it: a baked checkpoint or an adapter.

    The modes "baked" and "lora" take these numbers instead of computing their own, so that what runs is what was
    written, with its roundings.

    tensors: {name: tensor}. Of a baked checkpoint they are parameters, such as "model.layers.2.mlp.down_proj.weight".
    Of an adapter they are "{module}.lora_A" [r, d_ff] and "{module}.lora_B" [d_model, r].
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
