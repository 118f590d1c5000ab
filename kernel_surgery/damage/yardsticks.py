"""Known changes of a model, to measure an edit's damage against: rounding, and random edits.

A model's weights are changed while a module runs, one module at a time, and restored after it. So a change needs the
memory of one weight, and the model is whole again when the block ends.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kernel_surgery.models.architectures import decoder_layers, layout_of, submodule
from kernel_surgery.models.shards import refuse_split
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.erasing import SHRINKAGE, shrunk
from kernel_surgery.subspace.moments import Moments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Change = Callable[[Tensor], Tensor]  # of a parameter's data, to what it is while its module runs
GROUP = 32  # weights that share one scale


def rounded_to_bits(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Round a weight [out, in] to the nearest of 2^bits - 1 values per group of `group` inputs.

    Symmetric: each group's scale is its largest magnitude over 2^(bits - 1) - 1. The last group of a row may be
    shorter. Returns the weight's dtype.

    Numerics: float32.
    """
    most = 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    x = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    scale = x.abs().amax(-1, keepdim=True) / most
    x = torch.where(scale > 0, (x / scale).round(), 0.0) * scale
    return x.view(rows, -1)[:, :columns].to(weight.dtype)


@contextmanager
def _while_running(changes: Mapping[nn.Module, Change]) -> Iterator[None]:
    """Change the parameters of each module while that module runs. changes: {module: how}."""
    whole: dict[nn.Parameter, Tensor] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for parameter in module.parameters(recurse=False):
            whole[parameter] = parameter.data
            parameter.data = changes[module](parameter.data)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = whole.pop(parameter)

    handles = [
        handle
        for module in changes
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, data in whole.items():  # of a module that did not finish
            parameter.data = data


@contextmanager
def rounded_weights(model: "PreTrainedModel", bits: int) -> Iterator[None]:
    """Round the weights of all linear layers in the decoder to `bits` while the block runs (`rounded_to_bits`).

    Experts that are one tensor are rounded one by one. The embeddings, the norms, the biases and the
    routers stay, as in most quantised checkpoints. Raises ModelError for weights that are split over processes.
    """
    refuse_split(model, "round the weights in groups")

    def rows(data: Tensor) -> Tensor:
        return rounded_to_bits(data, bits) if data.ndim == 2 else data

    def columns(data: Tensor) -> Tensor:
        return rounded_to_bits(data.T, bits).T if data.ndim == 2 else data

    def each(change: Change, data: Tensor) -> Tensor:
        if data.ndim != 3:  # the experts' biases are a matrix
            return data
        made = torch.empty_like(data)
        for expert, matrix in zip(made, data, strict=True):  # so that no second stack in float32 is needed
            expert.copy_(change(matrix))
        return made

    changes: dict[nn.Module, Change] = {}
    stacks = [form for form in layout_of(model).writes if form.stacked and not form.bias]
    for layer in decoder_layers(model):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                changes[module] = rows
            elif isinstance(module, Conv1D):
                changes[module] = columns
        for form in stacks:
            path, _, name = form.path.rpartition(".")
            if (experts := submodule(layer, path)) is None:
                continue  # a dense layer
            changes[experts] = partial(each, columns if form.transposed else rows)
            block = layer.get_submodule(path.rpartition(".")[0])
            for module in block.modules():  # a router, and the gate of a shared expert
                if isinstance(module, nn.Linear) and module.out_features in (1, len(getattr(experts, name))):
                    changes.pop(module)
    with _while_running(changes):
        yield


def other_precision(model: "PreTrainedModel") -> str:
    """Return the dtype that `in_other_precision` compares with: bfloat16, or float32 for a model in 16 bits."""
    return "bfloat16" if model.dtype == torch.float32 else "float32"


@contextmanager
def in_other_precision(model: "PreTrainedModel") -> Iterator[None]:
    """Run a float32 model as if in bfloat16, or a 16-bit model in float32, while the block runs.

    A float32 model keeps its dtype, but every weight, and what every module takes in and gives out, is rounded to
    bfloat16. That is faster than bfloat16 on a CPU without such instructions. A 16-bit model computes in float32
    altogether: its weights are widened one module at a time, and the embedding's output carries the dtype on. Raises
    ModelError for weights that are split over processes.
    """
    refuse_split(model, "run the model in another precision")
    low = model.dtype == torch.float32

    def change(data: Tensor) -> Tensor:
        return data.bfloat16().float() if low else data.float()

    own = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    handles = []
    if low:

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(_rounded(x) for x in inputs)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            return tuple(_rounded(x) for x in output) if isinstance(output, tuple) else _rounded(output)

        for module in own:
            handles.append(module.register_forward_pre_hook(before))
        for module in [*own, *decoder_layers(model)]:
            handles.append(module.register_forward_hook(after))
    try:
        with _while_running(dict.fromkeys(own, change)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(x: Any) -> Any:
    return x.bfloat16().float() if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def haar_basis(d: int, k: int, generator: torch.Generator) -> Tensor:
    """Return a basis [d, k] of a uniformly (Haar) distributed k-dimensional subspace, float64.

    It is the Q of the QR decomposition of a Gaussian matrix. QR leaves the signs of the columns to convention, but they
    do not change the subspace.
    """
    return torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]


def haar_edits(
    edits: Mapping[int, Projection], seed: int = 0, moments: Mapping[int, Moments] | None = None
) -> dict[int, Projection]:
    """Return an orthogonal edit onto a Haar-random subspace for each layer, of the same rank.

    moments: of the activations, needed if the edits have offsets. The random edit then keeps the mean too: c = U^T E x.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for layer, edit in edits.items():
        d, k = edit.basis.shape
        random = Projection(haar_basis(d, k, generator))
        if edit.offset is not None:
            assert moments is not None
            random = random.keeping(moments[layer].mean.cpu())
        drawn[layer] = random.map(_stored)
    return drawn


def _stored(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def matched_edits(
    edits: Mapping[int, Projection], moments: Mapping[int, Moments], seed: int = 0
) -> dict[int, Projection]:
    """Return a random edit for each layer, of the same rank and form, with the activations' covariance in it.

    With S the covariance (E x x^T for an edit without an offset), shrunk as in `fit`, and Q a Haar-random basis: an
    oblique edit has A = S^(1/2) Q and B = S^(-1/2) Q, an affine one also c = B^T E x. An orthogonal edit has an
    orthonormal basis of the span of S^(1/2) Q: directions in which the activations vary as much as they do in the mean.

    Numerics: float64; the edits are float32.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for layer, edit in edits.items():
        found, (d, k) = moments[layer], edit.basis.shape
        second = found.mean_square if edit.offset is None else found.covariance
        values, vectors = torch.linalg.eigh(shrunk(second.cpu(), SHRINKAGE))
        roots, q = values.clamp_min(0).sqrt()[:, None], haar_basis(d, k, generator)
        written = vectors @ (roots * (vectors.T @ q))
        if edit.dual is None:
            random = Projection(torch.linalg.qr(written)[0])
        else:
            random = Projection(written, vectors @ ((vectors.T @ q) / roots))
        if edit.offset is not None:
            random = random.keeping(found.mean.cpu())
        drawn[layer] = random.map(_stored)
    return drawn
