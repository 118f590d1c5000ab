"""The edit inside the decoder layer: with the residual addition that follows it, and with the norm after that.

A hook on `down_proj` ends where the module ends. What follows is `residual + output`, in the layer, and then a norm
that belongs to the next layer (the last layer's: to the model). Here the layer's forward is replaced for as long as
the edit lasts, by one that computes the same from the same submodules but for its end: one operator, `project_add` or
`project_add_rmsnorm`. In the latter case the next norm finds its result waiting and passes it on.

One piece of code for every architecture of `architectures.ARCHITECTURES`. A layer that it does not know exactly it
leaves alone, and `reach_of` says why. Another hook on the MLP's output sees the output edited: in that layer the hook
on `down_proj` makes the edit at once, and the layer only adds.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from kernel_surgery import ops
from kernel_surgery.edit.plan import Edit, Plan
from kernel_surgery.models.architectures import decoder_layers, layout_of, next_norm, submodule


def _own_class(module: nn.Module | None, kind: str, ending: str) -> bool:
    """Whether a module is of the class that transformers defines for an architecture, and not one derived from it."""
    name = type(module).__name__
    return type(module).__module__ == f"transformers.models.{kind}.modeling_{kind}" and name.endswith(ending)


def _replaced(module: nn.Module) -> bool:
    """Whether someone else has replaced this module's forward (accelerate's hooks, kernels from the hub, we)."""
    return "forward" in vars(module)


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
    weight = submodule(block, layout_of(model).projection).weight
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


class EditedLayer:
    """One decoder layer in fused mode: its hook on `down_proj`, its own forward, and what it hands to the next norm.

    In a forward pass the edit is made in one of two places. The layer's forward decides before it runs the MLP:
    further on, together with the residual addition (`further_on` is True while the MLP runs, and the hook lets the
    output pass), or at once, by the hook. The hook counts the call in both.
    """

    def __init__(self, model: nn.Module, layer: int, plan: Plan, edit: Edit, buffer: str):
        self.layer, self.plan, self.edit, self.buffer = layer, plan, edit, buffer
        self.reach = edit.reach[layer]
        self.block, self.down = decoder_layers(model)[layer], plan.sites[layer].module
        self.norm, self.readers = next_norm(model, layer), _readers(model, layer)
        self.further_on = False
        # The norm of the tensor that the layer returned, valid only for that tensor object.
        self.returned: Tensor | None = None
        self.normed: Tensor | None = None

    def hook(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        """The forward hook on `down_proj`."""
        self.edit.count(self.layer)
        # A deep copy of the model has this hook too, and a `down_proj` of its own: there the hook edits.
        if self.further_on and module is self.down:
            return None
        return ops.project(output, getattr(module, self.buffer), self.plan.strength)

    def output_watched(self) -> bool:
        """Whether another hook than our own sees the MLP's output."""
        own = len(self.down._forward_hooks) == 1
        return not own or bool(self.block.mlp._forward_hooks) or bool(hooks_of_all._global_forward_hooks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside the block, the layer's forward, and with reach "norm" the next norm's, are ours."""
        if self.reach == "output":
            yield
            return
        replaced = [self.block]
        try:
            self.block.forward = self._layer_forward()
            if self.reach == "norm":
                replaced.append(self.norm)
                self.norm.forward = self._norm_forward()
            yield
        finally:
            for module in replaced:
                vars(module).pop("forward", None)

    def _layer_forward(self) -> Callable[..., Tensor]:
        parameters = list(inspect.signature(type(self.block).forward).parameters.values())[2:]
        names = [p.name for p in parameters]
        # The layer hands every parameter of its own on to attention, those that were left out too.
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        block = self.block

        def forward(module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
            # A deep copy has layers of its own. A checkpointed layer has its checkpoint in the class's forward, and is
            # run again from its input alone. In both the hook edits.
            if module is not block or (block.training and getattr(block, "gradient_checkpointing", False)):
                return type(module).forward(module, hidden_states, *args, **kwargs)
            kwargs = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
            return self._end(hidden_states + attended)

        return MethodType(forward, block)

    def _end(self, residual: Tensor) -> Tensor:
        """The layer from its MLP on: residual + the edited output, and with reach "norm" the norm of that."""
        at_once = self.output_watched() or residual.dtype not in ops.UP_TO_FLOAT32
        self.further_on = not at_once
        try:
            output = self.block.mlp(self.block.post_attention_layernorm(residual))
        finally:
            self.further_on = False
        if at_once:
            return residual + output
        basis, strength = getattr(self.down, self.buffer), self.plan.strength
        if output.dtype != residual.dtype:  # under autocast
            return residual + ops.project(output, basis, strength)
        if self.reach != "norm" or _watched(self.block, self.readers):
            return ops.project_add(output, residual, basis, strength)
        norm = self.norm
        h, n = ops.project_add_rmsnorm(output, residual, norm.weight, norm.variance_epsilon, basis, strength)
        self.returned, self.normed = h, n
        return h

    def _norm_forward(self) -> Callable[[Tensor], Tensor]:
        own = type(self.norm).forward

        def forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
            n = self.normed if self.returned is hidden_states else None
            self.returned = self.normed = None  # nothing is kept alive, and nothing is taken twice
            return own(module, hidden_states) if n is None else n

        return MethodType(forward, self.norm)
