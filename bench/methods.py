"""The edit by everything that can make it, each on a model of its own that shares the others' weights.

    original, original again    no edit; twice, for the noise, the second time with its own copies of the edited weights
    hook                         `kernel_surgery.hooked`: the formula as it is written, in float32
    addmm hook                   a forward hook with one addmm in the model's dtype, as one would write it first
    fused output                `kernel_surgery.fused` with reach "output"
    fused                        the same with reach "norm" (the default): with the addition and the next norm
    lora                         `kernel_surgery.adapted`
    peft                         PEFT's own layers, holding the adapter that `kernel_surgery.lora` writes
    peft, 16-bit adapter         the same without PEFT's widening of the adapter to float32; models of 16 bits only
    nnsight                      an intervention on `down_proj.output`, traced at every call
    baked                        the edit in the weights

A peer that is not installed is left out, and said so (`missing`).
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.shapes import twin
from bench.timing import NOISE

NARROW = "peft, 16-bit adapter"
NAMES = ("original", NOISE, "hook", "addmm hook", "fused output", "fused", "lora", "peft", NARROW, "nnsight", "baked")
# Which package a provider is.
PEERS = {"peft": "peft", NARROW: "peft", "nnsight": "nnsight"}


def missing(dtype=None) -> dict[str, str]:
    """{provider: why it is not there}, for a model of `dtype`."""
    import torch

    found = {}
    for name, package in PEERS.items():
        try:
            importlib.import_module(package)
        except Exception as error:  # an installed one may break on another's version
            found[name] = f"{error}: pip install -c constraints.txt -e '.[peers]'"
    if dtype == torch.float32:
        found[NARROW] = "the model is float32, and so is its adapter"
    return found


def addmm_hooks(model, bases: dict) -> None:
    """y - U (U^T y) after every `down_proj`, by addmm in the model's dtype; for as long as the model lives."""
    import torch

    from kernel_surgery.models.architectures import mlp_outputs
    from kernel_surgery.ops.library import packed

    for layer, site in mlp_outputs(model, list(bases)).items():
        # N = 10 misaligns cuBLAS: there the basis is padded with zero columns.
        u = (packed(bases[layer]) if bases[layer].is_cuda else bases[layer]).to(site.module.weight.dtype)

        def hook(module, inputs, output, u=u):
            y = output.reshape(-1, output.shape[-1])
            return torch.addmm(y, y @ u, u.T, alpha=-1.0).reshape(output.shape)

        site.module.register_forward_hook(hook)


def peft_model(model, bases: dict, widen: bool = True):
    """`model` inside PEFT, with the exact adapter of the edit in its layers. widen: in float32, as PEFT does it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from kernel_surgery.edit.lora import lora_pair, padded_rank

    rank = padded_rank(next(iter(bases.values())).shape[1])
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["down_proj"], layers_to_transform=list(bases), layers_pattern="layers"
    )
    made = get_peft_model(model, config, autocast_adapter_dtype=widen)
    for layer, basis in bases.items():
        module = made.base_model.model.model.layers[layer].mlp.down_proj
        pair = lora_pair(module.weight, basis)
        missing = rank - basis.shape[1]
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.nn.functional.pad(pair.a, (0, 0, 0, missing)))
            module.lora_B["default"].weight.copy_(torch.nn.functional.pad(pair.b, (0, missing)))
    return made.eval()


def nnsight_call(model, bases: dict) -> Callable:
    """A call of `model` with nnsight's intervention at every edited layer."""
    from nnsight import NNsight

    from kernel_surgery.ops.eager import project_eager

    wrapped = NNsight(model)

    def call(**inputs):
        with wrapped.trace(**inputs):
            for layer, basis in bases.items():
                site = wrapped.model.layers[layer].mlp.down_proj
                site.output = project_eager(site.output, basis, 1.0)
            found = wrapped.output.logits.save()
        return found

    return call


@contextmanager
def opened(model, bases: dict, names: Sequence[str] = NAMES) -> Iterator[dict[str, Callable]]:
    """{name: call}, each `call(**inputs) -> logits` of a model of its own; hooks and edits go when the block ends.

    call.model is that model. Raises KeyError for a name that is not in NAMES.
    """
    from kernel_surgery import adapted, baked, fused, hooked

    with ExitStack() as stack:
        found = {}
        for name in names:
            edited = [model.model.layers[layer].mlp.down_proj.weight for layer in bases]
            own = twin(model, edited if name in ("baked", NOISE) else ())
            if name in ("original", NOISE):
                pass
            elif name == "addmm hook":
                addmm_hooks(own, bases)
            elif name in ("peft", NARROW):
                own = peft_model(own, bases, widen=name == "peft")
            elif name != "nnsight":
                applier, more = {
                    **{"hook": (hooked, {}), "lora": (adapted, {}), "baked": (baked, {})},
                    **{"fused": (fused, {}), "fused output": (fused, {"reach": "output"})},
                }[name]
                stack.enter_context(applier(own, bases, **more))
            if name == "nnsight":
                found[name] = nnsight_call(own, bases)
            else:
                found[name] = lambda own=own, **inputs: own(**inputs).logits
            found[name].model = own
        yield found
