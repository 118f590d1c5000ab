"""The edit inside the decoder layer: with the residual addition that follows it, and with the norm after that.

A hook on `down_proj` ends where the module ends. What follows is `residual + output`, in the layer, and then a norm
that belongs to the next layer (the last layer's: to the model). Here the layer's forward is replaced for as long as
the edit lasts, by one that computes the same from the same submodules but for its end: one operator, `project_add` or
`project_add_rmsnorm`. In the latter case the next norm finds its result waiting and passes it on.

One piece of code for every architecture of `sites.ARCHITECTURES`. What it cannot be sure of it leaves alone, and says
why: `reach_of`. And whoever hooks the MLP's output while the edit lasts sees it edited: there the edit is made at once,
by the hook on `down_proj`, and the layer only adds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from kernel_surgery import ops
from kernel_surgery.edit import Edit, Plan
from kernel_surgery.sites import decoder_layers

REACHES = ("output", "add", "norm")


def next_norm(model: nn.Module, layer: int) -> nn.Module | None:
    """The norm that reads what a layer returns: the next layer's first, or the model's last."""
    blocks = decoder_layers(model)
    return getattr(blocks[layer + 1], "input_layernorm", None) if layer + 1 < len(blocks) else model.model.norm


def _own_class(module: nn.Module | None, kind: str, ending: str) -> bool:
    """Whether a module is of the class that transformers defines for an architecture, and not one derived from it."""
    name = type(module).__name__
    return type(module).__module__ == f"transformers.models.{kind}.modeling_{kind}" and name.endswith(ending)


def _replaced(module: nn.Module) -> bool:
    """Whether someone else has replaced this module's forward (accelerate's hooks, kernels from the hub, we)."""
    return "forward" in vars(module)


def _output_watched(block: nn.Module) -> bool:
    """Whether another hook than the edit's own sees the MLP's output."""
    own = len(block.mlp.down_proj._forward_hooks) == 1
    return not own or bool(block.mlp._forward_hooks) or bool(hooks_of_all._global_forward_hooks)


def _readers(model: nn.Module, layer: int) -> list[nn.Module]:
    """The modules that are given what a layer returns."""
    blocks = decoder_layers(model)
    return [next_norm(model, layer), *blocks[layer + 1 : layer + 2]]


def _watched(block: nn.Module, readers: list[nn.Module]) -> bool:
    """Whether a hook sees the tensor between a layer and its `_readers`: it may change it in place.

    Those with which transformers records hidden states stay in place after the first time they were asked for; they
    change nothing.
    """
    recorder = "transformers.utils.output_capturing"
    hooks = [*block._forward_hooks.values(), *(hook for m in readers for hook in m._forward_pre_hooks.values())]
    return any(getattr(hook, "__module__", "") != recorder for hook in hooks)


def reach_of(model: nn.Module, layer: int, asked: str) -> tuple[str, str | None]:
    """How far the edit of a layer can reach, at most `asked` ("output", "add" or "norm"), and why no further.

    "output": an operator after `down_proj`. "add": it takes in the residual addition. "norm": and the norm that
    follows. Looks at the model as it is now; changes nothing.
    """
    kind, block = model.config.model_type, decoder_layers(model)[layer]
    weight = block.mlp.down_proj.weight
    if asked == "output":
        return "output", None
    if weight.dtype not in ops.UP_TO_FLOAT32:
        return "output", f"{weight.dtype} has no fused addition"
    if not _own_class(block, kind, "DecoderLayer"):
        return "output", f"{type(block).__name__} is not the layer that transformers defines for {kind}"
    if not _own_class(block.mlp, kind, "MLP"):
        return "output", f"{type(block.mlp).__name__} is not the MLP that transformers defines for {kind}"
    if _replaced(block) or _replaced(block.mlp):
        return "output", "the layer's forward is already replaced"
    if asked == "add":
        return "add", None
    norm = next_norm(model, layer)
    if not _own_class(norm, kind, "RMSNorm"):
        return "add", f"the next norm is a {type(norm).__name__}, not the one that transformers defines for {kind}"
    if _replaced(norm):
        return "add", "the next norm's forward is already replaced"
    if (norm.weight.dtype, norm.weight.device) != (weight.dtype, weight.device):
        return "add", (
            f"the next norm is {norm.weight.dtype} on {norm.weight.device}, the layer {weight.dtype} on {weight.device}"
        )
    if _watched(block, _readers(model, layer)):
        return "add", "a hook looks between the layer and the next norm"
    return "norm", None


class _Handover:
    """What one layer leaves for the next norm: the norm of a tensor, good for that very tensor."""

    def __init__(self):
        self.h = self.n = None

    def put(self, h: Tensor, n: Tensor) -> None:
        self.h, self.n = h, n

    def take(self, h: Tensor) -> Tensor | None:
        n = self.n if self.h is h else None
        self.h = self.n = None  # nothing is kept alive, and nothing is taken twice
        return n


def _layer_forward(
    model: nn.Module,
    layer: int,
    buffer: str,
    plan: Plan,
    elsewhere: dict[int, nn.Module | None],
    handover: _Handover | None,
) -> Callable[..., Tensor]:
    """The forward of one edited layer."""
    block, norm, readers = decoder_layers(model)[layer], next_norm(model, layer), _readers(model, layer)
    parameters = list(inspect.signature(type(block).forward).parameters.values())[2:]
    names = [p.name for p in parameters]
    # The layer hands every parameter of its own on to attention, those that were left out too.
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}

    def forward(self: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        # A deep copy has layers of its own. A checkpointed layer has its checkpoint in the class's forward, and is run
        # again from its input alone. In both the hook edits.
        if self is not block or (block.training and getattr(block, "gradient_checkpointing", False)):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        kwargs = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
        attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
        residual = hidden_states + attended
        down = block.mlp.down_proj
        at_once = _output_watched(block) or residual.dtype not in ops.UP_TO_FLOAT32
        elsewhere[layer] = None if at_once else down
        try:
            output = block.mlp(block.post_attention_layernorm(residual))
        finally:
            elsewhere[layer] = None
        if at_once:
            return residual + output
        basis = getattr(down, buffer)
        if output.dtype != residual.dtype:  # under autocast
            return residual + ops.project(output, basis, plan.strength)
        if handover is None or _watched(block, readers):
            return ops.project_add(output, residual, basis, plan.strength)
        eps = norm.variance_epsilon
        h, n = ops.project_add_rmsnorm(output, residual, norm.weight, eps, basis, plan.strength)
        handover.put(h, n)
        return h

    return MethodType(forward, block)


def _norm_forward(norm: nn.Module, handover: _Handover) -> Callable[[Tensor], Tensor]:
    """The forward of the norm that follows: what is waiting for this very tensor, else its own."""
    own = type(norm).forward

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        n = handover.take(hidden_states)
        return own(self, hidden_states) if n is None else n

    return MethodType(forward, norm)


@contextmanager
def edited_layers(
    model: nn.Module, plan: Plan, edit: Edit, buffer: str, elsewhere: dict[int, nn.Module | None]
) -> Iterator[None]:
    """Replace the forward of every layer whose `edit.reach` is "add" or "norm" (and of the norms after the latter),
    until the block ends. buffer, elsewhere: what `edit.output_hooks` is given."""
    replaced, blocks = [], decoder_layers(model)
    try:
        for layer, reach in edit.reach.items():
            if reach == "output":
                continue
            handover = _Handover() if reach == "norm" else None
            blocks[layer].forward = _layer_forward(model, layer, buffer, plan, elsewhere, handover)
            replaced.append(blocks[layer])
            if handover is not None:
                norm = next_norm(model, layer)
                norm.forward = _norm_forward(norm, handover)
                replaced.append(norm)
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)
