"""Every model type of the table is read where it is edited: the activations are those of hooks in the whole model."""

from contextlib import nullcontext

import pytest
import torch

from kernel_surgery import collect_moments, hooked
from kernel_surgery.models.architectures import layout_of, submodule
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.erasing import erasing_edit
from kernel_surgery.subspace.reading import reading
from kernel_surgery.subspace.sequential import fit_sequentially
from tests.subspace.test_collecting import Characters
from tests.support.marks import everyday
from tests.support.model_cells import store
from tests.support.picos import D, pico_of

KINDS = everyday(ARCHITECTURES, "qwen3", "bloom", "mpt", "gpt2", "gpt_oss", "llama4", "qwen2_5_vl", "lfm2", "falcon")
LAYERS = (0, 2)
LENGTHS = (7, 12, 9)
# Float32 sums in another order, in three layers. A padding that counted would be seen as a few percent.
ROUNDINGS = 256 * 2.0**-24


def texts(lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 64, (n,), generator=generator).tolist() for n in lengths]


def seen_by_hooks(model, ids, site):
    """{layer: [tokens, d_model]} of one text, without a mask, from hooks in the whole model."""
    layout, seen = layout_of(model), {}

    def catch(layer):
        def hook(module, inputs, output):
            # A copy: falcon adds attention to it in place.
            seen[layer] = (output[0] if isinstance(output, tuple) else output).reshape(-1, D).clone()

        return hook

    names = {i: layout.site_name(i) if site == "mlp_out" else layout.layer(i) for i in LAYERS}
    handles = [submodule(model, name).register_forward_hook(catch(layer)) for layer, name in names.items()]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def read(model, encoded, site, side):
    """{layer: (states [prompts, tokens, d_model], mask)} of one batch."""
    found = {}

    def take(layer, states, mask):
        assert states.shape[:2] == mask.shape and layer not in found
        found[layer] = states.clone(), mask.bool()

    with reading(model, Characters(side), LAYERS, site, take) as run:
        run(encoded)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_hooks_see_in_the_whole_model(kind):
    model = pico_of(kind)
    for site in ("mlp_out", "resid_post"):
        for side in ("left", "right"):
            found = read(model, texts(LENGTHS), site, side)
            for row, ids in enumerate(texts(LENGTHS)):
                for layer, want in seen_by_hooks(model, ids, site).items():
                    states, mask = found[layer]
                    got = states[row][mask[row]]
                    error = float((got - want).norm() / want.norm())
                    assert error <= ROUNDINGS, f"{site} padded on the {side}, layer {layer}, text {row}: {error:.2g}"
    store(kind, {"collect": "equal"})


# One of each way in which a layer is called and its weights are held.
FITTED = ("qwen3", "gemma2", "bloom", "falcon", "gpt2", "lfm2", "qwen3_next", "qwen2_5_vl")
FITTED += ("qwen3_moe", "gpt_oss", "llama4")


@pytest.mark.parametrize("kind", everyday(FITTED, "qwen3", "bloom", "gpt_oss"))
def test_edits_fitted_layer_by_layer_from_the_files_are_those_fitted_with_hooks_on_the_whole_model(kind, tmp_path):
    model, chosen, languages = pico_of(kind), problems("fit", 2), ("en", "es")
    model.save_pretrained(tmp_path)
    own = fit_sequentially(
        Layerwise(tmp_path, torch.float32), Characters("right"), chosen, languages, LAYERS, rank=1, shrinkage=0.5
    )
    edits = {}
    for layer in LAYERS:
        with hooked(model, edits) if edits else nullcontext():
            moments = collect_moments(model, Characters("right"), chosen, languages, str(layer)).by_layer[layer]
        edits[layer] = erasing_edit(moments, rank=1, shrinkage=0.5)[0]
        p, q = (e.basis.double() @ e.reads.double().T for e in (edits[layer], own.projections[layer]))
        # Batches with padding and without differ by float32 rounding, which the fit amplifies by norm(A) norm(B).
        bound = ROUNDINGS * float(edits[layer].basis.norm() * edits[layer].reads.norm())
        assert float((p - q).norm() / p.norm()) <= bound
        assert own.fit["sequential"][str(layer)] < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_a_padding_that_counts_would_be_seen(kind, monkeypatch):
    monkeypatch.setattr("kernel_surgery.subspace.reading.positions_of", lambda body, mask: {})
    model = pico_of(kind)
    states, mask = read(model, texts(LENGTHS), "resid_post", "left")[2]
    want = seen_by_hooks(model, texts(LENGTHS)[0], "resid_post")[2]
    error = float((states[0][mask[0]] - want).norm() / want.norm())
    print(f"{kind}: {error:.2g}")
    # Rotary angles count differences of positions, which a shift does not change; learned positions are moved.
    assert (error > 100 * ROUNDINGS) == (kind == "gpt2")
