"""One vector a prompt, from the position that is meant, whatever the padding."""

import pytest
import torch

from kernel_surgery import fit_subspace, hooked
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.collecting import collect_activations, collect_languages, pool_states, prompt_states
from tests.support.models import pico


class Characters:
    """The least a tokenizer can be: one id a character, padding on a chosen side."""

    pad_token_id, eos_token_id = 0, 1

    def __init__(self, side):
        self.padding_side = side

    def encode(self, text):
        return [3 + ord(c) % 50 for c in text]

    def __call__(self, texts):
        from transformers import BatchEncoding

        return BatchEncoding({"input_ids": self.encode(texts)})


PROMPTS = ["short", "a much longer prompt, this one", "middle one", "x"]


@pytest.fixture(scope="module")
def model():
    return pico("qwen2")


def by_hand(model, prompt, layer, site, pool):
    ids = torch.tensor([Characters("left").encode(prompt)])
    seen = {}
    block = model.model.layers[layer]
    module = block.mlp.down_proj if site == "mlp_out" else block
    handle = module.register_forward_hook(
        lambda m, i, o: seen.update(out=(o[0] if isinstance(o, tuple) else o).detach())
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    states = seen["out"].reshape(len(ids[0]), -1)
    return states[-1] if pool == "last" else states.mean(0)


@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_padding_and_batch_gives_what_one_unpadded_prompt_gives(model, site, pool, side):
    layers = [1, 2]
    for batch_tokens in (1, 64, 4096):
        got = prompt_states(model, Characters(side), PROMPTS, layers, site=site, pool=pool, batch_tokens=batch_tokens)
        assert set(got) == set(layers)
        for layer in layers:
            want = torch.stack([by_hand(model, p, layer, site, pool) for p in PROMPTS])
            assert got[layer].shape == want.shape and got[layer].dtype == torch.float32
            torch.testing.assert_close(got[layer], want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_pooling_reads_no_padding_even_if_it_holds_nan():
    states = torch.arange(24.0).reshape(2, 3, 4)
    for mask in (torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])):
        poisoned = states.clone()
        poisoned[mask == 0] = float("nan")
        last = pool_states(poisoned, mask, "last")
        mean = pool_states(poisoned, mask, "mean")
        kept = [states[i][mask[i] == 1] for i in range(2)]
        assert torch.equal(last, torch.stack([k[-1] for k in kept]))
        assert torch.equal(mean, torch.stack([k.mean(0) for k in kept]))


def test_rows_line_up_across_languages(model):
    chosen = problems("fit", 2)
    got = collect_languages(model, Characters("left"), chosen, ("en", "sw"), [2], batch_tokens=300)
    for language in ("en", "sw"):
        for row in (0, 4, 9):
            want = by_hand(model, chosen[row].prompts[language], 2, "mlp_out", "last")
            torch.testing.assert_close(got[language][2][row], want, rtol=0, atol=1e-5 * float(want.abs().max()))


def test_the_model_is_left_as_it_was_also_on_an_exception(model):
    def interrupted(module, inputs):
        raise KeyboardInterrupt

    prompt_states(model, Characters("left"), PROMPTS, [1])
    handle = model.model.layers[1].register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        prompt_states(model, Characters("left"), PROMPTS, [1])
    handle.remove()
    assert not any(m._forward_hooks for m in model.modules())


def test_unknown_words_are_refused(model):
    with pytest.raises(ValueError, match="unknown site 'attn'; known: mlp_out, resid_post"):
        prompt_states(model, Characters("left"), PROMPTS, [1], site="attn")
    with pytest.raises(ValueError, match="unknown pooling 'max'; known: last, mean"):
        prompt_states(model, Characters("left"), PROMPTS, [1], pool="max")
    with pytest.raises(ValueError, match="99"):
        prompt_states(model, Characters("left"), PROMPTS, [99])


def test_what_is_collected_is_what_fit_takes(model):
    """The steps of the public API, without the command line between them."""
    options = {"languages": ("en", "sw"), "layers": "1-2", "batch_tokens": 300}
    activations = collect_activations(model, Characters("left"), problems("fit", 2), **options)
    assert activations.languages == ("en", "sw") and activations.layers == (1, 2)
    record = activations.provenance
    assert (record["site"], record["pool"], record["problems"], record["d_model"]) == ("mlp_out", "last", 10, 48)
    assert repr(activations) == "Activations(10 problems, en, sw; 2 layers; d_model=48)"
    subspace = fit_subspace(activations, rank=3, method="deviations")
    said = "layers=1-2, rank=3, d_model=48, site='mlp_out', form='orthogonal', model_id=None"
    assert repr(subspace) == f"Subspace({said})"
    with hooked(model, subspace):
        pass  # it belongs to the model
    with pytest.raises(SubspaceError, match="at least two languages, got en"):
        collect_activations(model, Characters("left"), problems("fit", 1), ("en",))


def test_without_problems_the_fit_split_is_collected(model):
    activations = collect_activations(model, Characters("left"), languages=("en", "sw"), layers="1")
    record = activations.provenance
    assert (record["split"], record["seed"], record["problems"]) == ("fit", 0, 200)
