"""The methods that are compared: ways of making the edit, each on its own copy of a model with shared weights.

    original, original again    no edit. The second copies the edited weights; the difference between the two is noise
    hook                        `kernel_surgery.hooked`: the formula as written, in float32
    addmm hook                  a forward hook with one addmm in the model's dtype: the obvious first attempt
    fused output                `kernel_surgery.fused` with reach "output": the edit alone
    fused                       `kernel_surgery.fused` with reach "norm", the default: the edit, the addition, the norm
    lora                        `kernel_surgery.adapted`
    peft                        PEFT's own layers with the adapter that `kernel_surgery.lora` writes
    peft, 16-bit adapter        the same, but the adapter keeps the model's 16-bit dtype. PEFT widens it by default
    nnsight                     an intervention on `down_proj.output`, traced at every call
    baked                       the edit in the weights

The peers are PEFT and nnsight. A peer that is not installed is left out, and `missing` says why.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.shapes import twin
from bench.timing import NOISE

NARROW = "peft, 16-bit adapter"
NAMES = ("original", NOISE, "hook", "addmm hook", "fused output", "fused", "lora", "peft", NARROW, "nnsight", "baked")
# {method of a peer: its package}
PEERS = {"peft": "peft", NARROW: "peft", "nnsight": "nnsight"}


def missing(dtype=None) -> dict[str, str]:
    """{method: why it cannot run} for a model of `dtype`."""
    import torch

    reasons = {}
    for name, package in PEERS.items():
        try:
            importlib.import_module(package)
        except Exception as error:  # an installed package may fail on the version of another
            reasons[name] = f"{error}: pip install -c constraints.txt -e '.[peers]'"
    if dtype == torch.float32:
        reasons[NARROW] = "the model is float32, so its adapter is float32 too"
    return reasons


def addmm_hooks(model, bases: dict) -> None:
    """Make every `down_proj` return y - U (U^T y), by addmm in the model's dtype. The hooks stay on the model."""
    import torch

    from kernel_surgery.models.architectures import mlp_outputs
    from kernel_surgery.ops.library import packed

    for layer, site in mlp_outputs(model, list(bases)).items():
        # N = 10 misaligns cuBLAS, so on CUDA the basis is padded with zero columns.
        u = (packed(bases[layer]) if bases[layer].is_cuda else bases[layer]).to(site.module.weight.dtype)

        def hook(module, inputs, output, u=u):
            y = output.reshape(-1, output.shape[-1])
            return torch.addmm(y, y @ u, u.T, alpha=-1.0).reshape(output.shape)

        site.module.register_forward_hook(hook)


def peft_model(model, bases: dict, widen: bool = True):
    """`model` inside PEFT, with the exact adapter of the edit. widen: hold it in float32, PEFT's default."""
    import torch
    from peft import LoraConfig, get_peft_model

    from kernel_surgery.edit.lora import lora_pair, padded_rank

    rank = padded_rank(next(iter(bases.values())).shape[1])
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=["down_proj"], layers_to_transform=list(bases), layers_pattern="layers"
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=widen)
    for layer, basis in bases.items():
        module = wrapped.base_model.model.model.layers[layer].mlp.down_proj
        pair = lora_pair(module.weight, basis)
        padding = rank - basis.shape[1]
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.nn.functional.pad(pair.a, (0, 0, 0, padding)))
            module.lora_B["default"].weight.copy_(torch.nn.functional.pad(pair.b, (0, padding)))
    return wrapped.eval()


def nnsight_call(model, bases: dict) -> Callable:
    """A function that calls `model` with nnsight's intervention at every edited layer."""
    from nnsight import NNsight

    from kernel_surgery.ops.eager import project_eager

    wrapped = NNsight(model)

    def call(**inputs):
        with wrapped.trace(**inputs):
            for layer, basis in bases.items():
                site = wrapped.model.layers[layer].mlp.down_proj
                site.output = project_eager(site.output, basis, 1.0)
            logits = wrapped.output.logits.save()
        return logits

    return call


@contextmanager
def opened(model, bases: dict, names: Sequence[str] = NAMES) -> Iterator[dict[str, Callable]]:
    """{name: call}, where `call(**inputs)` returns the logits of a separate model, `call.model`.

    Hooks and edits are removed when the block ends. Raises KeyError for a name that is not in NAMES.
    """
    from kernel_surgery import adapted, baked, fused, hooked

    with ExitStack() as stack:
        calls = {}
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
                calls[name] = nnsight_call(own, bases)
            else:
                calls[name] = lambda own=own, **inputs: own(**inputs).logits
            calls[name].model = own
        yield calls
