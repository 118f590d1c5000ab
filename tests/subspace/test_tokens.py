"""Moments over all prompt tokens: the tokens that count and no others, summed as exactly as float64 sums."""

import json

import numpy as np
import pytest
import torch

from kernel_surgery import Subspace
from kernel_surgery.common.errors import SubspaceError
from kernel_surgery.models.padding import padded, token_batches
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.collecting import collect_moments
from kernel_surgery.subspace.moments import Moments, load_moments
from tests.subspace.test_collecting import Characters
from tests.support.calls import call, one_thread
from tests.support.models import pico

LANGUAGES, BUDGET, LAYERS = ("en", "zh", "sw"), 400, (1, 3)


@pytest.fixture(scope="module")
def model():
    return pico("qwen2")


@pytest.fixture(scope="module")
def chosen():
    return problems("fit", 1)


def kept_tokens(model, chosen, site, side):
    """{layer: ([tokens, d] float32 of every token, [tokens] languages, [tokens] first of its prompt)}, all kept.

    From the whole model, in the batches that `collect_moments` makes: another batch rounds otherwise.
    """
    prompts = [p.prompts[language] for language in LANGUAGES for p in chosen]
    encoded = [Characters(side).encode(prompt) for prompt in prompts]
    batches, found = token_batches([len(ids) for ids in encoded], BUDGET), {layer: [] for layer in LAYERS}
    assert len(batches) > 2
    labels, first, states = [], [], {}
    for batch in batches:
        ids, mask = padded([encoded[i] for i in batch], 0, side, "cpu")
        states.clear()
        modules = {layer: model.model.layers[layer] for layer in LAYERS}
        modules = {layer: m.mlp.down_proj if site == "mlp_out" else m for layer, m in modules.items()}
        handles = [
            m.register_forward_hook(lambda m, i, o, layer=layer: states.update({layer: o}))
            for layer, m in modules.items()
        ]
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
        for handle in handles:
            handle.remove()
        for row, index in enumerate(batch):
            n, width = len(encoded[index]), ids.shape[1]
            own = slice(width - n, width) if side == "left" else slice(0, n)
            for layer in LAYERS:
                found[layer].append(states[layer][row, own])
            labels += [index // len(chosen)] * n
            first += [True] + [False] * (n - 1)
    labels, first = torch.tensor(labels), torch.tensor(first)
    return {layer: (torch.cat(parts), labels, first) for layer, parts in found.items()}


def over_bound(moments: Moments, x, labels) -> float:
    """Largest error of sums and second moments over n u sum |x_i x_j|, with u = 2^-53, against 64-bit mantissas.

    n float64 products and additions in any order are off by at most n u / (1 - n u) times the sum of the terms' sizes.
    The reference's own error is 2^-11 of that.
    """
    assert np.finfo(np.longdouble).nmant >= 63
    n, wide = len(x), x.double().numpy().astype(np.longdouble)
    one_hot = torch.nn.functional.one_hot(labels, len(LANGUAGES)).numpy().astype(np.longdouble)
    assert torch.equal(moments.counts, torch.nn.functional.one_hot(labels, len(LANGUAGES)).sum(0).double())
    ratios = []
    for got, left in ((moments.second, wide), (moments.sums, one_hot)):
        error, room = abs(got.numpy() - left.T @ wide), 1.001 * n * 2.0**-53 * (abs(left).T @ abs(wide))
        ratios.append(float((error / room).max()))
    return max(ratios)


@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep_first", [False, True])
def test_they_are_the_sums_over_all_tokens_but_padding_and_the_first(model, chosen, site, side, keep_first):
    options = {"site": site, "keep_first": keep_first, "batch_tokens": BUDGET, "layers": "1,3"}
    got = collect_moments(model, Characters(side), chosen, LANGUAGES, **options)
    assert got.layers == LAYERS and got.languages == LANGUAGES
    for layer, (x, labels, first) in kept_tokens(model, chosen, site, side).items():
        counted = torch.ones_like(first) if keep_first else ~first
        worst = over_bound(got.by_layer[layer], x[counted], labels[counted])
        print(f"layer {layer}, {site}, {side}, keep_first={keep_first}: error/bound {worst:.3f}")
        assert worst <= 1
        # One token too many is seen: it is far above any rounding.
        more = Moments(*(t.clone() for t in vars(got.by_layer[layer]).values()))
        more.second += torch.outer(x[0], x[0]).double()
        assert over_bound(more, x[counted], labels[counted]) > 1e6
    counts = [got.provenance["tokens"][language] for language in LANGUAGES]
    assert counts == got.by_layer[1].counts.tolist()
    assert got.provenance["first_token"] == ("kept" if keep_first else "left out")
    assert got.provenance["pool"] == "tokens"


def test_equal_runs_give_equal_bits_and_padding_may_hold_anything(model, chosen):
    one, other = (collect_moments(model, Characters("left"), chosen, LANGUAGES, layers="1") for _ in range(2))
    assert torch.equal(one.by_layer[1].second, other.by_layer[1].second)
    # A NaN in the padding's own activations: of the embedding row that pads, and that no prompt uses.
    assert all(0 not in Characters("left").encode(p.prompts[lang]) for p in chosen for lang in LANGUAGES)
    poisoned = pico("qwen2")
    with torch.no_grad():
        poisoned.model.embed_tokens.weight[0] = 1e4  # its states are other ones; masked, they reach no token
    again = collect_moments(poisoned, Characters("right"), chosen, LANGUAGES, layers="1", batch_tokens=4000)
    clean = collect_moments(pico("qwen2"), Characters("right"), chosen, LANGUAGES, layers="1", batch_tokens=4000)
    assert torch.equal(again.by_layer[1].second, clean.by_layer[1].second)


def test_what_cannot_be_summed_is_refused(model, chosen):
    class Single(Characters):
        def encode(self, text):
            return [5]

    with pytest.raises(SubspaceError, match="the prompts in en have no token but the first, which is left out"):
        collect_moments(model, Single("left"), chosen, LANGUAGES)
    broken = pico("qwen2")
    with torch.no_grad():
        broken.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(SubspaceError, match=r"activations of layer 2 hold NaN or Inf\. Collect in float32"):
        collect_moments(broken, Characters("left"), chosen, LANGUAGES, layers="1-2")


def test_the_command_writes_what_fit_takes(tmp_path):
    acts = tmp_path / "moments.safetensors"
    common = ["--problems", 1, "--languages", "en,zh,sw", "--layers", "2-3", "--out"]
    with one_thread():
        status, out, err = call("collect", "--pool", "tokens", *common, acts)
        assert (status, err) == (0, ""), err
        tokens = load_moments(acts).provenance["tokens"]
        said = f"moments over {sum(tokens.values())} tokens (the first of each prompt left out)"
        assert said in out and set(tokens) == {"en", "zh", "sw"}
        status, out, _ = call("collect", "--pool", "tokens", "--keep-first", *common, tmp_path / "all")
        assert status == 0 and f"over {sum(tokens.values()) + 15} tokens (the first of each prompt kept)" in out
        for method, form in {"oblique": "oblique", "leace": "affine", "centroids": "orthogonal"}.items():
            words = ["--activations", acts, "--method", method, "--rank", 2, "--layers", "2-3", "--out"]
            status, out, err = call("fit", *words, tmp_path / method)
            assert status == 0 and form in out, err
            subspace = Subspace.load(tmp_path / method)
            assert (subspace.pool, subspace.site, subspace.model_id) == ("tokens", "mlp_out", "polyglot")
            assert subspace.fit["tokens"] == tokens and subspace.fit["first_token"] == "left out"
            assert subspace.fit["problems"] == 5 and json.dumps(subspace.fit)
        words[3] = "deviations"
        status, _, err = call("fit", *words, tmp_path / "no")
    assert status == 2 and "no pairs of prompts" in err
