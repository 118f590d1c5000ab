"""Linear modules whose weight is not a tensor of floats: quantised ones, of any library.

What they give is a float tensor, so hook and fused edit it like any other. Their weight, as they use it, is read by
giving them the unit vectors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.table import Form

COLUMNS = 256  # of a weight that are read at a time


@dataclass(frozen=True)
class Opaque:
    """A quantised linear module that writes into an MLP block's output. name: that its weight would have."""

    name: str
    owner: nn.Module
    form: Form
    rows: int
    columns: int

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        return type(self.owner).__name__

    def matrix(self, like: Tensor) -> Tensor:
        """Return the weight as the module uses it: [rows, columns] float32, on the device of `like`.

        like: a tensor with the dtype and the device of the module's inputs.

        Numerics: each column is the output for a unit vector, so it is the dequantised one, rounded to the dtype of the
        output. If the module quantises its inputs too, that error is in it.

        Raises ModelError for a module with a bias, and for one that does not take or give what a linear module does.
        """
        made = torch.empty(self.rows, self.columns, device=like.device)
        with torch.no_grad():
            for start in range(0, self.columns, COLUMNS):
                stop = min(start + COLUMNS, self.columns)
                # One row of zeros more, whose output is the bias.
                units = torch.zeros(stop - start + 1, self.columns, dtype=like.dtype, device=like.device)
                units[torch.arange(stop - start), torch.arange(start, stop)] = 1
                try:
                    output = self.owner.forward(units)  # not the hooks of others
                except (RuntimeError, TypeError, ValueError, AttributeError) as error:
                    raise ModelError(
                        f"the weight of {self.name} ({self.kind}) cannot be read: it does not take unit vectors "
                        f"({str(error).splitlines()[0]}). The model is unchanged. Use mode fused or hook. A model of "
                        "compressed-tensors decompresses itself at its first forward pass: run it once, or load it "
                        "with dequantize=True."
                    ) from error
                if output.shape != (len(units), self.rows) or not output.is_floating_point():
                    raise ModelError(
                        f"{self.name} ({self.kind}) gives {tuple(output.shape)} {output.dtype}, not {self.rows} floats "
                        "a row. The model is unchanged."
                    )
                if bool((output[-1] != 0).any()):
                    raise ModelError(
                        f"{self.name.removesuffix('.weight')} has a bias, which an adapter cannot edit. The model is "
                        "unchanged. Use mode fused or hook, which edit biases too."
                    )
                made[:, start:stop] = output[:-1].float().T
        return made


def opaque(name: str, owner: nn.Module | None, form: Form) -> Opaque | None:
    """Return a module as `Opaque`, or None unless it says that it is linear. owner: whose weight is no float tensor."""
    sizes = [getattr(owner, f"{side}_features", getattr(owner, f"{side}features", None)) for side in ("out", "in")]
    if owner is None or form.bias or form.stacked or not all(isinstance(size, int) for size in sizes):
        return None
    return Opaque(name, owner, form, *sizes)  # type: ignore[arg-type]  # they are whole numbers
