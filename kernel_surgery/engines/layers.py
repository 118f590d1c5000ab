"""The edit inside vLLM: what ends an MLP block returns y - a A (B^T y - c).

In a dense model that is a row-parallel layer, which is replaced by an edited one while the model is built. The block of
a mixture of experts adds up its experts, the routed and the shared ones, after the all-reduce. So there the whole block
is edited, once the model is built: its class is replaced by an edited subclass. So is that of a linear layer that every
rank holds whole.

The edit is made **after** the all-reduce, on the whole output. Then it is the arithmetic of the fused mode
(`numerics.bounds.rule_a_bound`), it is right for quantised weights and for a bias, and an offset counts once. Before
the all-reduce there would be one rounding more, and every rank would subtract the offset. The price is vLLM's fusion of
the all-reduce with the next RMSNorm: it does not apply to an edited layer.

The strength is a tensor with one value per token, which the operator reads at every call. So it can be changed while
the engine runs, also in captured CUDA graphs.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernel_surgery import ops
from kernel_surgery.common.errors import KernelSurgeryError, MismatchError, ModelError
from kernel_surgery.common.names import LARGEST_STRENGTH
from kernel_surgery.engines.per_request import Strengths, stated
from kernel_surgery.engines.refusing import LAYER, is_replicated, layout_for, refuse_block, refuse_config, refuse_layer
from kernel_surgery.engines.settings import KEY, PluginSettings
from kernel_surgery.models.architectures import submodule
from kernel_surgery.models.table import Layout
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint_differences, sample_places, sample_weights

_OURS = "kernel_surgery_edits"  # marks a module's own `forward` that edits
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REPORT, SET_STRENGTH = "kernel_surgery_report", "kernel_surgery_set_strength"  # calls for `LLM.collective_rpc`


@dataclass
class Edits:
    """The edits of one worker's model.

    layers: the layers that this worker must edit; with pipeline parallelism, those of its part of the model.
    strengths: [tokens] float32, the strength of every token of a step. edited: {layer: the module that was built}.
    sampled: {tensor name: its fingerprint}, of the weights as they were loaded. per_request: under model runner V2.
    sha256: of the file as it was read. strength: the engine's, for requests without one of their own.
    """

    settings: PluginSettings
    subspace: Subspace
    layout: Layout
    layers: tuple[int, ...]
    strengths: Tensor
    edited: dict[int, nn.Module] = field(default_factory=dict)
    sampled: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_request: Strengths | None = None
    sha256: str = ""
    strength: float = 1.0

    def layer_of(self, prefix: str) -> int | None:
        """Return the layer that a module's path names, if it is to be edited; else None."""
        return next((layer for layer in self.layers if prefix == self.layout.vllm_site(layer)), None)

    def name_of(self, prefix: str) -> str:
        """Return the name in transformers of a site that vLLM has at a path."""
        names = {self.layout.vllm_site(layer): self.layout.site_name(layer) for layer in self.layers}
        return names.get(prefix, prefix)

    def take(self, prefix: str, module: nn.Module) -> int | None:
        """Note a module that was built. Return its layer if it is to be edited. Raises ModelError for a second one."""
        layer = self.layer_of(prefix)
        if layer is None:
            return None
        if layer in self.edited:
            raise ModelError(
                f"{prefix} was built twice, such as by a draft model of the same names. The engine was not started. "
                "Leave out speculative decoding."
            )
        refuse_layer(prefix, module)
        self.edited[layer] = module
        return layer

    def edit_blocks(self, model: nn.Module) -> None:
        """Edit what is not a row-parallel layer in a model that was built: whole blocks, and linear layers that every
        rank holds whole.

        Raises ModelError for one whose output is not whole.
        """
        for layer in (layer for layer in self.layers if layer not in self.edited):
            name = self.layout.vllm_site(layer)
            block = submodule(model, name)
            if block is None or (self.layout.linear and not is_replicated(block)):
                continue
            refuse_block(name, block, offset=self.subspace.projections[layer].offset is not None)
            edit_forward(block)
            prepare(block, self, layer)
            self.edited[layer] = block

    def sample(self, name: str, loaded: Tensor) -> None:
        """Take the fingerprint of a whole weight as it is loaded, before it is split over the ranks."""
        if loaded.ndim == 2 and loaded.dtype in _FLOATS:
            self.sampled[name] = sample_weights([(name, loaded)])

    def check(self, model: nn.Module, where: str) -> str:
        """Check the model that was loaded. Return what was found of its fingerprint, in words.

        where: the worker, for messages. Raises ModelError for an asked layer that is not edited, and MismatchError for
        other weights than those that the subspace was measured on, unless forced.
        """
        modules = {id(module) for module in model.modules()}
        called = [layer for layer, module in self.edited.items() if id(module) in modules]
        if missing := sorted(set(self.layers) - set(called)):
            kind = LAYER if self.layout.linear else "block"
            raise ModelError(
                f"{len(called)} of {len(self.layers)} layers are edited on {where}: there is no {kind} named "
                f"{self.layout.vllm_site(missing[0])} in this {type(model).__name__}. The engine was not started. "
                "Serve a baked checkpoint (python -m kernel_surgery.bake)."
            )
        for layer, module in self.edited.items():
            if _overtaken(module, model):
                raise ModelError(
                    f"{self.layout.vllm_site(layer)} is wrapped by another layer on {where}, which may not call it. "
                    "The engine was not started. Leave out LoRA, or serve a baked checkpoint."
                )
        return self.compare(model)

    def compare(self, model: nn.Module) -> str:
        """Compare the sampled weights, and the embedding, with the subspace's fingerprint. Return the result in words.

        Quantised weights have no floating-point numbers to compare; the embedding beside them mostly has. Raises
        MismatchError if they differ, or if there is nothing to compare, unless forced.
        """
        known = self.subspace.fingerprint
        if self.settings.force or known is None:
            return "fingerprint not compared (force)"
        embedding = submodule(model, f"{self.layout.vllm_body}.{self.layout.embedding}")
        dtype, held = embedding_samples(embedding)
        if not self.sampled and not held:
            if embedding is None or not hasattr(embedding, "weight"):
                return "fingerprint not compared: this part of the model has no embedding and quantised weights"
            raise MismatchError(
                "the weights cannot be compared with those that the subspace was measured on: none was loaded as "
                'floating-point numbers.\nThe engine was not started. Set "force": true if they belong together.'
            )
        differing = []
        name = self.layout.embedding_name()
        if held and name in known["samples"]:
            fitted = {"dtype": known["dtype"], "samples": {name: [known["samples"][name][i] for i in held]}}
            differing += fingerprint_differences(fitted, {"dtype": dtype, "samples": {name: list(held.values())}})
        for name, found in self.sampled.items():
            own = known["samples"].get(name)
            fitted = {"dtype": known["dtype"], "samples": {} if own is None else {name: own}}
            differing += fingerprint_differences(fitted, found)
        if differing:
            raise MismatchError(
                f"the subspace was measured on other weights: {differing[0]} differs.\n"
                f"  subspace: {self.settings.subspace.name}, fitted on {self.subspace.model_id or 'an unnamed model'}\n"
                "The engine was not started. Fit a subspace on this model, load the one it was fitted on, or set "
                '"force": true.'
            )
        if not self.sampled:
            return "fingerprint agrees (the embedding alone: no other weight could be compared)"
        return f"fingerprint agrees ({len(self.sampled) + bool(held)} tensors)"

    def set_strength(self, strength: float) -> None:
        """Set the strength of every request from the next step on. Raises KernelSurgeryError for one that is unusable.

        Requests that are running keep what they have written: see `engines.per_request`.
        """
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) <= LARGEST_STRENGTH:
            raise KernelSurgeryError(f"strength must be a finite number, got {strength!r}. It is unchanged.")
        self.strengths.fill_(float(strength))
        self.strength = float(strength)
        if self.per_request is not None:
            self.per_request.engine = float(strength)

    def report(self) -> dict[str, Any]:
        """Return what is edited, as JSON."""
        return {
            "layers": list(self.edited),
            "rank": self.subspace.rank,
            "strength": self.strength,
            "provider": ops.provider(self.strengths.device),
            "sha256": self.sha256,
        }


def embedding_samples(embedding: Any) -> tuple[str, dict[int, float]]:
    """Return (dtype, {number of the sample: value}) of the fingerprint's samples of the embedding that this rank holds.

    embedding: vLLM's, whose rows are split over the ranks. There are none if it is not of floating-point numbers.
    """
    weight, shard = getattr(embedding, "weight", None), getattr(embedding, "shard_indices", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.dtype not in _FLOATS or shard is None:
        return "", {}
    width, first, end = weight.shape[1], shard.org_vocab_start_index, shard.org_vocab_end_index
    places = [divmod(at, width) for at in sample_places(embedding.org_vocab_size * width)]
    held = {i: float(weight[row - first, column]) for i, (row, column) in enumerate(places) if first <= row < end}
    return str(weight.dtype).removeprefix("torch."), held


def _digest(settings: PluginSettings) -> str:
    return hashlib.sha256(settings.subspace.read_bytes()).hexdigest()


def _overtaken(module: nn.Module, model: nn.Module) -> bool:
    """Return whether a module lies inside a LoRA layer, which computes its product itself, or has another `forward`."""
    own = vars(module).get("forward")
    if own is not None and not hasattr(own, _OURS):
        return True
    return any(getattr(outer, "base_layer", None) is module for outer in model.modules())


def prepare(module: nn.Module, edits: Edits, layer: int) -> None:
    """Give a module what it needs to edit its output: buffers with the edit of a layer, and the strengths."""
    projection, on = edits.subspace.projections[layer], edits.strengths.device
    if ops.provider(on) == "triton/cuda":
        projection = projection.map(ops.packed)
    for name in ("basis", "dual", "offset"):
        value = getattr(projection, name)
        value = None if value is None else value.float().contiguous().to(on)
        module.register_buffer(f"kernel_surgery_{name}", value, persistent=False)
    module.register_buffer("kernel_surgery_strengths", edits.strengths, persistent=False)
    held: Any = module  # further attributes, which nn.Module does not declare
    held.kernel_surgery_factor = edits.subspace.strength_at(layer, 1.0)
    held.kernel_surgery_layer = layer


def edited_output(module: Any, output: Any) -> Any:
    """Return the output of a module that `prepare` prepared, edited. Of a tuple, the first element is edited."""
    if isinstance(output, tuple):  # of a linear: (output, bias that is added elsewhere); the bias is None here
        return edited_output(module, output[0]), *output[1:]
    rows = output.reshape(-1, output.shape[-1])
    strength = module.kernel_surgery_strengths[: rows.shape[0]]
    if module.kernel_surgery_factor != 1:
        strength = strength * module.kernel_surgery_factor
    edit = {"dual": module.kernel_surgery_dual, "offset": module.kernel_surgery_offset}
    return ops.project(rows, module.kernel_surgery_basis, strength, **edit).reshape(output.shape)


def edited_block(base: type) -> type:
    """Return a subclass of one of vLLM's MLP blocks that edits what the block returns."""

    class EditedBlock(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return edited_output(self, super().forward(*args, **kwargs))

    return EditedBlock


def edit_forward(block: Any) -> None:
    """Make a module that was built edit what it returns, once `prepare` has prepared it.

    vLLM's Transformers backend gives some modules a `forward` of their own, which goes before that of their class.
    """
    own = vars(block).get("forward")
    if own is None:
        block.__class__ = edited_block(type(block))
        return

    def forward(*args: Any, **kwargs: Any) -> Any:
        return edited_output(block, own(*args, **kwargs))

    setattr(forward, _OURS, True)
    block.forward = forward


def edited_class(base: type, edits: Edits) -> type:
    """Return a subclass of vLLM's row-parallel layer that edits the layers of `edits`, and is `base` in all others."""

    class EditedRowParallelLinear(base):  # a class of vLLM
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.kernel_surgery_layer: int | None = None
            super().__init__(*args, **kwargs)
            layer = edits.take(self.prefix, self)
            if layer is not None:
                prepare(self, edits, layer)

        def weight_loader(self, param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.kernel_surgery_sample(param, loaded_weight)
            return super().weight_loader(param, loaded_weight, *args, **kwargs)

        def weight_loader_v2(self, param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.kernel_surgery_sample(param, loaded_weight)
            return super().weight_loader_v2(param, loaded_weight, *args, **kwargs)

        def kernel_surgery_sample(self, param: Any, loaded: Tensor) -> None:
            if self.kernel_surgery_layer is not None and param is getattr(self, "weight", None):
                edits.sample(f"{edits.name_of(self.prefix)}.weight", loaded)

        def forward(self, input_: Tensor) -> Any:
            output = super().forward(input_)
            return output if self.kernel_surgery_layer is None else edited_output(self, output)

    return EditedRowParallelLinear


@contextmanager
def replaced(edits: Edits) -> Iterator[None]:
    """Make vLLM build edited layers while the block runs. A class that another plugin put there is the base of ours."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers import linear

    before = op_registry_oot.get(LAYER)
    op_registry_oot[LAYER] = edited_class(before or getattr(linear, LAYER), edits)
    try:
        yield
    finally:
        if before is None:
            del op_registry_oot[LAYER]
        else:
            op_registry_oot[LAYER] = before


def prepare_worker(worker: Any) -> None:
    """Make a vLLM worker edit its model when it loads it, and add two calls for `LLM.collective_rpc`.

    worker: a `WorkerBase` of an engine in which the plugin is configured. The calls are "kernel_surgery_report", which
    returns `Edits.report`, and "kernel_surgery_set_strength" with a number.
    """
    load_model = worker.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        edits = edits_of(worker.vllm_config)
        with replaced(edits), stated(edits):
            result = load_model(*args, **kwargs)
        model = worker.model_runner.get_model()
        edits.edit_blocks(model)
        found = edits.check(model, f"rank {worker.rank}")
        setattr(worker, REPORT, edits.report)
        setattr(worker, SET_STRENGTH, edits.set_strength)
        _say(edits, found)
        return result

    worker.load_model = load


def edits_of(config: Any) -> Edits:
    """Return the edits of a worker, none made yet. config: its `VllmConfig`. Raises what `refuse_config` raises.

    The file's SHA-256 enters `additional_config`, and so the key of vLLM's cache of compiled graphs.
    """
    from vllm.distributed import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    settings, subspace = refuse_config(config)
    sha256 = _digest(settings)
    config.additional_config[KEY] = settings.record()
    config.additional_config[f"{KEY}_sha256"] = sha256
    text, pipeline = config.model_config.hf_text_config, get_pp_group()
    first, end = get_pp_indices(text.num_hidden_layers, pipeline.rank_in_group, pipeline.world_size)
    layers = tuple(layer for layer in subspace.layers if first <= layer < end)
    captured = config.compilation_config.max_cudagraph_capture_size or 0
    tokens = max(config.scheduler_config.max_num_batched_tokens, captured)
    strengths = torch.full((tokens,), settings.strength, dtype=torch.float32, device=config.device_config.device)
    about = (settings, subspace, layout_for(config.model_config), layers, strengths)
    return Edits(*about, sha256=sha256, strength=settings.strength)


def _say(edits: Edits, fingerprint: str) -> None:
    from vllm.logger import init_logger

    layers, subspace = sorted(edits.edited), edits.subspace
    note = subspace.note_on(edits.layout)
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "none of the layers of this part of the model"
    init_logger("vllm.kernel_surgery").info(
        "Kernel Surgery edits the MLP output of %s (%d of %d asked here), rank %d, strength %g, by %s; %s%s",
        *(where, len(layers), len(edits.layers), subspace.rank, edits.settings.strength),
        *(ops.provider(edits.strengths.device), fingerprint, f"; {note}" if note else ""),
    )
