"""The edit by everything that can make it, each on a model of its own that shares the others' weights.

    original, original again    no edit; twice, for the noise
    hook                         `kernel_surgery.hooked`: three operations in float32
    addmm hook                   a forward hook with one addmm in the model's dtype, as one would write it first
    fused output                `kernel_surgery.fused` with reach "output"
    fused                        the same with reach "norm" (the default): with the addition and the next norm
    lora                         `kernel_surgery.adapted`
    peft                         PEFT's own layers, holding the adapter that `kernel_surgery.lora` writes
    nnsight                      an intervention on `down_proj.output`, traced at every call
    baked                        the edit in the weights

A peer that is not installed is left out, and said so (`missing`).
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.shapes import twin
from bench.timing import NOISE

NAMES = ("original", NOISE, "hook", "addmm hook", "fused output", "fused", "lora", "peft", "nnsight", "baked")
PEERS = ("peft", "nnsight")


def missing() -> dict[str, str]:
    """{peer: why it is not there}."""
    return {
        name: "not installed: pip install -c constraints.txt -e '.[peers]'"
        for name in PEERS
        if importlib.util.find_spec(name) is None
    }


def addmm_hooks(model, bases: dict) -> None:
    """y - U (U^T y) after every `down_proj`, by addmm in the model's dtype; for as long as the model lives."""
    import torch

    from kernel_surgery.ops import packed
    from kernel_surgery.sites import mlp_outputs

    for layer, site in mlp_outputs(model, list(bases)).items():
        # N = 10 misaligns cuBLAS: the basis is padded with zero columns.
        u = packed(bases[layer]).to(site.module.weight.dtype)

        def hook(module, inputs, output, u=u):
            y = output.reshape(-1, output.shape[-1])
            return torch.addmm(y, y @ u, u.T, alpha=-1.0).reshape(output.shape)

        site.module.register_forward_hook(hook)


def peft_model(model, bases: dict):
    """`model` inside PEFT, with the exact adapter of the edit in its layers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from kernel_surgery.lora import adapter, padded_rank

    rank = padded_rank(next(iter(bases.values())).shape[1])
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["down_proj"], layers_to_transform=list(bases), layers_pattern="layers"
    )
    made = get_peft_model(model, config)
    for layer, basis in bases.items():
        module = made.base_model.model.model.layers[layer].mlp.down_proj
        a, b = adapter(module.weight, basis)
        missing = rank - basis.shape[1]
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.nn.functional.pad(a, (0, 0, 0, missing)))
            module.lora_B["default"].weight.copy_(torch.nn.functional.pad(b, (0, missing)))
    return made.eval()


def nnsight_call(model, bases: dict) -> Callable:
    """A call of `model` with nnsight's intervention at every edited layer."""
    from nnsight import NNsight

    from kernel_surgery.reference import project_eager

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
            own = twin(model, edited if name == "baked" else ())
            if name in ("original", NOISE):
                pass
            elif name == "addmm hook":
                addmm_hooks(own, bases)
            elif name == "peft":
                own = peft_model(own, bases)
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
