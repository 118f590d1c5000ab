"""The fingerprint of a model: a few of its weights, by value."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.common.names import DTYPES
from kernel_surgery.models.architectures import layout_of, mlp_outputs
from kernel_surgery.models.shards import whole
from kernel_surgery.numerics.precision import STORED
from kernel_surgery.numerics.rounding import underflow, unit_roundoff

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 16  # weights per tensor in a fingerprint


def fingerprint(model: "PreTrainedModel") -> dict[str, Any]:
    """Return a few weights of the embedding and of what writes every MLP output.

    The form is {"dtype", "samples": {tensor name: values}}.

    They are values, not a hash, so that the same model in another dtype is recognised. Weights that are split over
    processes (`models.shards`) are gathered, one at a time, by all processes together. Of weights that are quantised in
    memory there are none: "quantised" is then True, and only what both fingerprints have is compared.
    """
    named = [(layout_of(model).embedding_name(), model.get_input_embeddings().weight)]
    sites = mlp_outputs(model).values()
    weights = (weight for site in sites for weight in site.weights if weight.matrix)
    made = sample_weights([*named, *(weight.sampled() for weight in weights)])
    return made | ({"quantised": True} if any(site.quantised for site in sites) else {})


def sample_places(elements: int) -> list[int]:
    """Return which elements of a tensor a fingerprint samples, in row-major order. elements: their number."""
    step = max(1, elements // SAMPLES)
    # 7 more than the stride: a stride that divides the row length would read a single column.
    return [(i * step + 7 * i) % elements for i in range(SAMPLES)]


def sample_weights(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """Return the fingerprint of named weights. The first one gives the dtype."""
    samples, dtype = {}, None
    for name, weight in named:
        flat = whole(weight.detach()).reshape(-1)
        dtype = dtype or str(flat.dtype).removeprefix("torch.")
        samples[name] = flat[sample_places(flat.numel())].double().tolist()
    return {"dtype": dtype, "samples": samples}


_KINDS: dict[str, type] = {
    **{"site": str, "pool": str, "model_id": str, "revision": str},
    **{"n_layers": int, "fit": dict, "fingerprint": dict},
}
_WORDS = {str: "a text", int: "a whole number", dict: "a JSON object"}


def check_provenance(provenance: object) -> None:
    """Check the types of what a file says about the model it was measured on. Every field may be None or missing.

    Raises SubspaceError, naming the field.
    """
    if not isinstance(provenance, dict):
        raise SubspaceError(f"its provenance is {provenance!r:.60}, not a JSON object.")
    for name, kind in _KINDS.items():
        value = provenance.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise SubspaceError(f"its provenance has {name} = {value!r:.60}; expected {_WORDS[kind]}.")
    if taken := provenance.get("fingerprint"):
        samples = taken.get("samples")
        values = list(samples.values()) if isinstance(samples, dict) else [None]
        if not isinstance(taken.get("dtype"), str) or not all(map(_numbers, values)):
            raise SubspaceError("its fingerprint is damaged: it needs a dtype, and numbers for every sampled tensor.")


def _numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _spacing(dtype: str) -> tuple[float, float]:
    """Return the largest error of rounding to a dtype: relative to a value, and absolute below the normal range."""
    if dtype not in DTYPES:
        return 0.0, 0.0
    kind = STORED[dtype].dtype
    return unit_roundoff(kind), underflow(kind)


def fingerprint_differences(fitted: dict[str, Any], loaded: dict[str, Any]) -> list[str]:
    """Return the names of the sampled tensors whose weights differ.

    In the same dtype every value must be equal. Otherwise a value may differ by one rounding to either dtype: u |value|
    in the normal range, half a subnormal spacing below it.
    """
    alone = set(fitted["samples"]) ^ set(loaded["samples"])
    both = set(fitted["samples"]) & set(loaded["samples"])
    if alone and (not both or not (fitted.get("quantised") or loaded.get("quantised"))):
        return sorted(alone)
    same = fitted["dtype"] == loaded["dtype"]
    pairs = [_spacing(kind["dtype"]) for kind in (fitted, loaded)]
    relative, absolute = (sum(values) for values in zip(*pairs, strict=True))
    differing = []
    for name, values in fitted["samples"].items():
        if name not in both:
            continue
        others = loaded["samples"][name]
        if len(values) != len(others):
            differing.append(name)
            continue
        for a, b in zip(values, others, strict=True):
            room = 0.0 if same else relative * max(abs(a), abs(b)) + absolute
            if not (math.isfinite(a) and math.isfinite(b)) or abs(a - b) > room:
                differing.append(name)
                break
    return differing
