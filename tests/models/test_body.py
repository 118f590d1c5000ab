"""The body alone gives what the whole model gives, bit for bit, and the model has all its layers again afterwards."""

import contextlib
from functools import partial

import pytest
import torch

from kernel_surgery import baked, fused, hooked
from kernel_surgery.common.names import REACHES
from kernel_surgery.models.body import body_up_to
from kernel_surgery.models.padding import padded, token_batches
from kernel_surgery.subspace.collecting import pool_states, prompt_states
from tests.subspace.test_collecting import PROMPTS, Characters
from tests.support.models import PLAIN, basis, pico

BUDGET = 64  # of the prompts' 4 lengths, this makes two batches, the second with padding


def by_the_whole_model(model, prompts, layers, site, pool, side):
    """{layer: [prompts, d]} of `model(...)`, with the product with the vocabulary, and hooks on all that is asked."""
    encoded = [Characters(side).encode(prompt) for prompt in prompts]
    batches = token_batches([len(ids) for ids in encoded], BUDGET)
    assert len(batches) == 2 and any(len({len(encoded[i]) for i in batch}) > 1 for batch in batches)
    rows = {layer: torch.empty(len(prompts), model.config.hidden_size) for layer in layers}
    mask = None

    def catch(layer, batch):
        def hook(module, inputs, output):
            rows[layer][batch] = pool_states(output[0] if isinstance(output, tuple) else output, mask, pool)

        return hook

    for batch in batches:
        ids, mask = padded([encoded[i] for i in batch], 0, side, "cpu")
        blocks = {layer: model.model.layers[layer] for layer in layers}
        modules = {layer: block.mlp.down_proj if site == "mlp_out" else block for layer, block in blocks.items()}
        handles = [module.register_forward_hook(catch(layer, batch)) for layer, module in modules.items()]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
        for handle in handles:
            handle.remove()
    return rows


def assert_equal(model, layers, site, pool, side):
    got = prompt_states(model, Characters(side), PROMPTS, layers, site=site, pool=pool, batch_tokens=BUDGET)
    want = by_the_whole_model(model, PROMPTS, layers, site, pool, side)
    assert list(got) == sorted(layers)
    for layer in layers:
        assert torch.equal(got[layer], want[layer]), f"layer {layer}"


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_it_gives_the_bits_of_the_whole_model(kind, site, pool, side):
    model = pico(kind)
    for layers in ([0], [2, 1], [0, 1, 2, 3]):
        assert_equal(model, layers, site, pool, side)


EDITS = {
    **{"hook": hooked, "baked": baked},
    **{f"fused {reach}": partial(fused, reach=reach) for reach in REACHES},
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
def test_an_edit_in_force_is_read_as_in_the_whole_model(edit, site):
    """Also where the last layer that runs is edited: the norm that then follows it is not its own."""
    model, edits = pico("qwen2"), {layer: basis(48, 4, seed=layer) for layer in (1, 2)}
    plain = prompt_states(model, Characters("left"), PROMPTS, [2], site=site, batch_tokens=BUDGET)
    with EDITS[edit](model, edits, 1.0):
        for layers in ([1], [2], [1, 2], [3], [0, 1, 2, 3]):
            assert_equal(model, layers, site, "last", "left")
        edited = prompt_states(model, Characters("left"), PROMPTS, [2], site=site, batch_tokens=BUDGET)
    if site == "mlp_out":
        inside = (edited[2] @ edits[2]).norm() / (plain[2] @ edits[2]).norm()
        assert inside < 1e-5 < (plain[2] @ edits[2]).norm() / plain[2].norm()
    assert not torch.equal(edited[2], plain[2])


def test_no_later_layer_and_no_product_with_the_vocabulary_runs():
    model, ran = pico("llama"), set()
    parts = {"head": model.lm_head, **{i: block for i, block in enumerate(model.model.layers)}}
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    prompt_states(model, Characters("left"), PROMPTS, [1])
    assert ran == {0, 1}
    by_the_whole_model(model, PROMPTS, [1], "mlp_out", "last", "left")
    assert ran == {0, 1, 2, 3, "head"}  # the check can fail


def test_the_model_has_its_own_list_of_layers_again():
    model = pico("qwen3")
    own, names = model.model.layers, [name for name, _ in model.named_modules()]
    with body_up_to(model, 1):
        assert len(model.model.layers) == 2 and model.model.layers[1] is own[1]
    assert model.model.layers is own and [name for name, _ in model.named_modules()] == names
    with contextlib.suppress(KeyboardInterrupt), body_up_to(model, 1):
        raise KeyboardInterrupt
    assert model.model.layers is own and len(own) == 4
