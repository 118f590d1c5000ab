"""What the plugin refuses, by name: every setting under which an edit would silently not be made, or be made twice."""

import inspect
from typing import Any

import torch

from kernel_surgery.common.errors import KernelSurgeryError, ModelError
from kernel_surgery.common.names import WRITE
from kernel_surgery.engines.settings import PluginSettings, read_settings
from kernel_surgery.models.architectures import layout_named
from kernel_surgery.models.table import ARCHITECTURES, Layout
from kernel_surgery.ops.library import check_rank
from kernel_surgery.subspace.artifact import Subspace

LAYER = "RowParallelLinear"  # vLLM's class of a projection whose input is split over the ranks
_REPLICATED = "ReplicatedLinear"
_UNCHANGED = "The engine was not started."


def refuse_config(config: Any) -> tuple[PluginSettings, Subspace]:
    """Check the configuration of an engine in which the plugin is configured. Return its settings and its subspace.

    config: a `vllm.config.VllmConfig`.

    Raises KernelSurgeryError for settings that cannot be used, for LoRA, and for a vLLM whose layer is not the one that
    `engines.layers` edits. Raises ModelError for an architecture that is not in our table, and MismatchError if the
    subspace has another shape than the model.
    """
    settings = read_settings(config.additional_config)
    assert settings is not None  # the caller has looked
    refuse_engine()
    refuse_lora(config.lora_config)
    refuse_shared_cache(config.kv_transfer_config)
    text = config.model_config.hf_text_config
    layout_for(config.model_config)
    subspace = settings.load()
    if subspace.site == WRITE:
        raise KernelSurgeryError(
            f"the kernel_surgery plugin edits the MLP block's output, not what a norm makes of it (site {WRITE}). "
            f"{_UNCHANGED} Fit at site mlp_out."
        )
    subspace.check_shape(text.hidden_size, text.num_hidden_layers, str(config.model_config.model))
    check_rank(next(iter(subspace.bases.values())))
    return settings, subspace


def layout_for(model_config: Any) -> Layout:
    """Return the layout of an engine's model: of the whole model if it is in our table, else of its language model.

    model_config: a `vllm.config.ModelConfig`. Raises ModelError for an architecture that is not in our table.
    """
    kinds = [getattr(held, "model_type", None) for held in (model_config.hf_config, model_config.hf_text_config)]
    return layout_named(str(next((kind for kind in kinds if kind in ARCHITECTURES), kinds[-1])))


def refuse_lora(lora_config: Any) -> None:
    """Raise KernelSurgeryError if LoRA is enabled: vLLM's LoRA layer computes the product without calling our layer."""
    if lora_config is not None:
        raise KernelSurgeryError(
            "the kernel_surgery plugin and LoRA cannot be combined: with LoRA enabled, vLLM's layer does not call the "
            f"edited one, and the edit would silently not be made. {_UNCHANGED} Leave out --enable-lora, or serve the "
            "edit as an adapter (python -m kernel_surgery.lora) and leave out the plugin."
        )


def refuse_engine() -> None:
    """Raise KernelSurgeryError if this vLLM's row-parallel layer is not the one that the plugin knows."""
    import vllm

    found = f"vLLM {vllm.__version__}"
    try:
        from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
        from vllm.model_executor.layers import linear

        layer = getattr(linear, LAYER)
        given = list(inspect.signature(layer.forward).parameters)
        if not issubclass(layer, PluggableLayer) or not isinstance(op_registry_oot, dict):
            raise ImportError(f"{LAYER} cannot be replaced")
        if given != ["self", "input_"]:
            raise ImportError(f"{LAYER}.forward takes {', '.join(given[1:])}, not input_")
    except (ImportError, AttributeError) as error:
        raise KernelSurgeryError(
            f"the kernel_surgery plugin does not know the layers of {found}: {error}. {_UNCHANGED} Use a version that "
            "docs/engines.md names, or serve a baked checkpoint (python -m kernel_surgery.bake)."
        ) from error


def refuse_unknown(reason: str | None) -> None:
    """Raise KernelSurgeryError if a vLLM lacks what the plugin wraps. reason: what is missing, or None."""
    if reason:
        raise KernelSurgeryError(
            f"the kernel_surgery plugin does not know this vLLM ({reason}). {_UNCHANGED} Use a version that "
            "docs/engines.md names, or serve a baked checkpoint (python -m kernel_surgery.bake)."
        )


def refuse_shared_cache(kv_transfer_config: Any) -> None:
    """Raise KernelSurgeryError if KV leaves the engine: its keys do not say what was edited."""
    if kv_transfer_config is not None:
        raise KernelSurgeryError(
            f"the kernel_surgery plugin and a KV connector cannot be combined: the keys of its cache do not say what "
            f"was edited, so an engine would read KV of another edit. {_UNCHANGED} Serve a baked checkpoint "
            "(python -m kernel_surgery.bake)."
        )


def refuse_layer(name: str, layer: Any) -> None:
    """Raise ModelError for a row-parallel layer whose output is not the MLP's: parts of it are added later.

    layer: a `RowParallelLinear`.
    """
    reason = None
    if layer.skip_bias_add and layer.bias is not None:
        reason = "its bias is added elsewhere"
    elif not layer.reduce_results and layer.tp_size > 1:
        reason = "its output is summed over the ranks elsewhere"
    if reason:
        raise ModelError(
            f"cannot edit {name} in vLLM: {reason}. {_UNCHANGED} Serve a baked checkpoint "
            "(python -m kernel_surgery.bake)."
        )


def is_replicated(layer: Any) -> bool:
    """Return whether a module is vLLM's linear layer that every rank holds whole."""
    return any(base.__name__ == _REPLICATED for base in type(layer).__mro__)


def refuse_block(name: str, block: Any, *, offset: bool) -> None:
    """Raise ModelError for an MLP block whose output is not whole, or is one part of a step's tokens.

    block: the block of a decoder layer, with one runner of experts, or none if it is dense; or a linear layer that
    every rank holds whole. offset: the edit has one.
    """
    reason = None
    if is_replicated(block) and block.skip_bias_add and block.bias is not None:
        reason = "its bias is added elsewhere"
    for module in block.modules():
        experts = getattr(module, "moe_config", None)
        if getattr(experts, "skip_final_all_reduce", False):
            reason = "the sum of its experts is reduced over the ranks elsewhere"
        elif getattr(experts, "is_sequence_parallel", False):
            reason = "each rank computes other tokens (sequence parallel)"
        elif offset and getattr(experts, "in_dtype", None) == torch.float16:
            reason = "in float16 vLLM may scale its output, so an offset has another size. Use bfloat16"
    dense = not any(hasattr(module, "moe_config") for module in block.modules())
    for layer in (module for module in block.modules() if dense and type(module).__name__.endswith(LAYER)):
        refuse_layer(name, layer)
    if reason:
        raise ModelError(
            f"cannot edit {name} in vLLM: {reason}. {_UNCHANGED} Serve a baked checkpoint "
            "(python -m kernel_surgery.bake)."
        )
