"""The edit inside a decoder layer, fused with the residual addition and the norm that follow it.

A hook on the MLP's last projection cannot go beyond that module. Two steps follow it. The layer computes
`residual + output`. Then the next layer's first norm reads the sum; after the last layer it is the model's final norm.

While the edit lasts, this module replaces the layer's forward. The replacement calls the same submodules, but its end
is one operator: `project_add`, or `project_add_rmsnorm`. In the second case the next norm's forward is replaced too. It
returns the result that the operator has already computed.

The same code serves every architecture whose layer is plain (`models.table.Layout`). If it does not recognise a layer
exactly, it fuses less, and `reach_of` says why. If another hook reads the MLP's output, that hook must see the edited
output. In that layer the hook makes the edit, and the layer only adds.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from kernel_surgery import ops
from kernel_surgery.edit.plan import Edit, Plan, stored
from kernel_surgery.models.architectures import decoder_layers, layout_of, mlp_outputs, model_type, next_norm


def _own_class(module: nn.Module, kinds: Iterable[str], ending: str) -> bool:
    """Return whether a module has exactly the class that transformers defines for an architecture.

    A subclass does not count. kinds: the model types, as `_kinds` has them. ending: of the class name, such as "MLP".
    """
    files = [f"transformers.models.{kind}.modeling_{kind}" for kind in kinds]
    return type(module).__module__ in files and type(module).__name__.endswith(ending)


def _kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the model type, and that of the language model inside a model of several modalities."""
    text = cast(Any, model.config).get_text_config().model_type
    return tuple(dict.fromkeys((model_type(model), text)))


def _replaced(module: nn.Module) -> bool:
    """Return whether this module's forward was replaced: by accelerate, by hub kernels, or by us."""
    return "forward" in vars(module)


def _readers(model: nn.Module, layer: int) -> list[nn.Module]:
    """Return the modules that read a layer's output: the next norm, and the next layer if there is one."""
    blocks = decoder_layers(model)
    return [next_norm(model, layer), *blocks[layer + 1 : layer + 2]]


def _watched(block: nn.Module, readers: list[nn.Module]) -> bool:
    """Return whether a hook sees the tensor between a layer and its `_readers`. Such a hook may change it in place.

    The hooks that transformers uses to record hidden states do not count. They stay installed after their first use,
    but they change nothing.
    """
    recorder = "transformers.utils.output_capturing"
    hooks = [*block._forward_hooks.values(), *(hook for m in readers for hook in m._forward_pre_hooks.values())]
    return any(getattr(hook, "__module__", "") != recorder for hook in hooks)


def reach_of(model: nn.Module, layer: int, asked: str) -> tuple[str, str | None]:
    """Return how much of a layer can be fused with the edit, and the reason if it is less than asked.

    asked: "output", "add" or "norm", as in `edit.fused.fused`. The result is at most that:
        "output": an operator after the MLP block.
        "add": the operator includes the residual addition.
        "norm": it also includes the norm that follows.

    Looks at the model as it is now, and changes nothing.
    """
    kinds, block = _kinds(model), decoder_layers(model)[layer]
    kind = kinds[0]
    if asked == "output":
        return "output", None
    if not layout_of(model).plain:
        return "output", f"a {kind} layer does more with the output than to add it to its input"
    site = mlp_outputs(model, [layer])[layer]
    weight = site.first
    if site.quantised is not None:
        return "output", f"{site.quantised} is quantised, so the dtype of its output is not known before"
    if weight.dtype not in ops.UP_TO_FLOAT32:
        return "output", f"{weight.dtype} has no fused addition"
    if not _own_class(block, kinds, "DecoderLayer"):
        return "output", f"{type(block).__name__} is not the layer that transformers defines for {kind}"
    if not _own_class(block.mlp, kinds, "MLP"):
        return "output", f"{type(block.mlp).__name__} is not the MLP that transformers defines for {kind}"
    if _replaced(block) or _replaced(block.mlp):
        return "output", "the layer's forward is already replaced"
    if asked == "add":
        return "add", None
    norm = next_norm(model, layer)
    if not _own_class(norm, kinds, "RMSNorm"):
        return "add", f"the next norm is a {type(norm).__name__}, not the one that transformers defines for {kind}"
    if _replaced(norm):
        return "add", "the next norm's forward is already replaced"
    if (norm.weight.dtype, norm.weight.device) != (weight.dtype, weight.device):
        return "add", (
            f"the next norm is {norm.weight.dtype} on {norm.weight.device}, the layer {weight.dtype} on {weight.device}"
        )
    if _watched(block, _readers(model, layer)):
        return "add", "a hook reads the tensor between the layer and the next norm"
    return "norm", None


class EditedLayer:
    """Edit one decoder layer in fused mode.

    It owns the hook on the edited module, the layer's forward, and the result that it passes to the next norm.

    Each forward pass makes the edit in one of two places. The layer's forward chooses before it runs the MLP. Either
    the hook makes the edit at once, or the edit comes later, together with the residual addition. In the second case
    `further_on` is True while the MLP runs, and the hook lets the output pass unchanged. The hook counts the call in
    both cases.
    """

    def __init__(self, model: nn.Module, layer: int, plan: Plan, edit: Edit, names: Sequence[str | None]):
        self.layer, self.plan, self.edit, self.names = layer, plan, edit, names
        self.reach = edit.reach[layer]
        self.block, self.down = decoder_layers(model)[layer], plan.sites[layer].module
        if self.reach != "output":
            self.norm, self.readers = next_norm(model, layer), _readers(model, layer)
        self.further_on = False
        # The tensor that the layer returned last, and its norm. The norm is valid only for that tensor object.
        self.returned: Tensor | None = None
        self.normed: Tensor | None = None

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Edit the module's output, unless the layer's forward will do it later."""
        self.edit.count(self.layer)
        # A deep copy of the model shares this hook but has its own modules. There the hook makes the edit.
        if self.further_on and module is self.down:
            return None
        basis, edit = self.tensors(module)
        return ops.project(output, basis, **edit)

    def tensors(self, module: nn.Module) -> tuple[Tensor, dict[str, Any]]:
        """Return the basis that is stored in the edited module, and the operators' other arguments of the edit."""
        basis, dual, offset = stored(module, self.names)
        assert basis is not None  # `edit.plan.parts`
        return basis, {"strength": self.plan.strength_at(self.layer), "dual": dual, "offset": offset}

    def output_watched(self) -> bool:
        """Return whether a hook other than ours sees the MLP's output."""
        own = len(self.down._forward_hooks) == 1
        return not own or bool(self.block.mlp._forward_hooks) or bool(hooks_of_all._global_forward_hooks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Replace the layer's forward while the block runs; at reach "norm" the next norm's too."""
        if self.reach == "output":
            yield
            return
        replaced: list[nn.Module] = [self.block]
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
        # The layer passes all its parameters on to attention, including those the caller left at their defaults.
        defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        block = self.block

        def forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            # Two cases go to the class's own forward, where the hook makes the edit. A deep copy has its own layers.
            # With gradient checkpointing, that forward runs the layer again from its input alone.
            if module is not block or (block.training and getattr(block, "gradient_checkpointing", False)):
                return type(module).forward(module, hidden_states, *args, **kwargs)
            kwargs = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
            attended = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)[0]
            return self._end(hidden_states + attended)

        return MethodType(forward, block)

    def _end(self, residual: Tensor) -> Tensor:
        """Run the layer from its MLP on: residual + edited output.

        At reach "norm" the next norm is computed as well, and kept for it.
        """
        at_once = self.output_watched() or residual.dtype not in ops.UP_TO_FLOAT32
        self.further_on = not at_once
        try:
            output = self.block.mlp(self.block.post_attention_layernorm(residual))
        finally:
            self.further_on = False
        if at_once:
            return residual + output
        basis, edit = self.tensors(self.down)
        if output.dtype != residual.dtype:  # under autocast
            return residual + ops.project(output, basis, **edit)
        if self.reach != "norm" or _watched(self.block, self.readers):
            return ops.project_add(output, residual, basis, **edit)
        norm = self.norm
        h, n = ops.project_add_rmsnorm(output, residual, norm.weight, norm.variance_epsilon, basis, **edit)
        self.returned, self.normed = h, n
        return h

    def _norm_forward(self) -> Callable[[Tensor], Tensor]:
        own = type(self.norm).forward

        def forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
            n = self.normed if self.returned is hidden_states else None
            self.returned = self.normed = None  # frees the tensors, and no result is used twice
            return own(module, hidden_states) if n is None else n

        return MethodType(forward, self.norm)
