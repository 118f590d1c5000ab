"""The four forms of the edit on the whole embedded model: one function, up to rounding that is accounted for."""

import pytest
import torch

from kernel_surgery import Subspace, adapted, baked, fused, hooked
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.numerics.bounds import rule_b_bounds, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle
from kernel_surgery.numerics.rounding import unit_roundoff
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.ops.library import project
from kernel_surgery.problems.generator import problems

MODES = {"hook": hooked, "baked": baked, "fused": fused, "lora": adapted}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture(scope="module")
def subspace():
    return Subspace.load(POLYGLOT.parent / "subspace.safetensors")


@pytest.fixture(scope="module")
def models():
    return {dtype: load_model("polyglot", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}


def prompts(per_category=2, languages=("en", "zh")):
    return [p.prompts[language] for p in problems("test", per_category) for language in languages]


def logits(model, tokenizer, texts):
    """[prompts][positions, vocabulary] float64, one unpadded prompt at a time."""
    with torch.no_grad():
        return [model(input_ids=tokenizer(t, return_tensors="pt").input_ids).logits[0].double() for t in texts]


def worst_difference(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def baked_in_float64(model, subspace):
    """The oracle: the float64 model with every edited weight computed in float64."""
    return {
        site.module: bake_oracle(site.module.weight.detach(), subspace.bases[layer])
        for layer, site in mlp_outputs(model, subspace.layers).items()
    }


@pytest.fixture(scope="module")
def oracle(models, tokenizer, subspace):
    model = models[torch.float64]
    kept = {module: module.weight.detach().clone() for module in baked_in_float64(model, subspace)}
    with torch.no_grad():
        for module, weight in baked_in_float64(model, subspace).items():
            module.weight.copy_(weight)
    out = logits(model, tokenizer, prompts())
    with torch.no_grad():
        for module, weight in kept.items():
            module.weight.copy_(weight)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_float32_logits_are_within_1e_4_of_float64(mode, models, tokenizer, subspace, oracle):
    model = models[torch.float32]
    before = logits(model, tokenizer, prompts())
    with MODES[mode](model, subspace) as edit:
        edited = logits(model, tokenizer, prompts())
    error = worst_difference(edited, oracle)
    print(f"{mode}: largest logit error {error:.1e}, error/bound {error / 1e-4:.3f} ({edit.provider})")
    assert error <= 1e-4
    # Teeth: the edit changes the logits by far more than that, so a mode that did nothing would fail; and it is undone.
    assert worst_difference(before, oracle) > 1e-2
    assert worst_difference(logits(model, tokenizer, prompts()), before) == 0


def test_a_skipped_layer_or_another_strength_shows_in_the_logits(models, tokenizer, subspace, oracle):
    model = models[torch.float32]
    for wrong in ({"layers": subspace.layers[:-1]}, {"strength": 0.99}):
        with hooked(model, subspace, **wrong):
            error = worst_difference(logits(model, tokenizer, prompts()), oracle)
        print(f"{wrong}: largest logit error {error:.1e}")
        assert error > 1e-4


def test_bf16_layers_meet_rule_b_on_real_activations(models, subspace):
    """Every edited layer, with the activations that enter its down_proj: hook and fused against baked."""
    model, tokenizer = models[torch.bfloat16], load_tokenizer("polyglot")
    entering = {}
    sites = mlp_outputs(model, subspace.layers)
    handles = [
        site.module.register_forward_pre_hook(
            lambda m, args, layer=layer: entering.setdefault(layer, []).append(args[0])
        )
        for layer, site in sites.items()
    ]
    logits(model, tokenizer, prompts())
    for handle in handles:
        handle.remove()
    u = unit_roundoff(torch.bfloat16)
    for layer, site in sites.items():
        h, weight, basis = (
            torch.cat([e[0] for e in entering[layer]]),
            site.module.weight.detach(),
            subspace.bases[layer],
        )
        each, row = rule_b_bounds(weight, h, basis)
        x = h @ weight.T
        ours = (h @ bake_weight(weight, basis).T).double()
        norm_x = (h.double() @ weight.double().T).norm(dim=-1)
        for name, y in (("hook", project_eager(x, basis, 1.0)), ("fused", project(x, basis))):
            difference = y.double() - ours
            ratios = worst_ratio(difference.abs(), each), worst_ratio(difference.norm(dim=-1), row)
            typical = float((difference.norm(dim=-1) / (0.88 * u * norm_x)).median())
            print(
                f"L{layer} {name}: error/bound {ratios[0]:.2f} {ratios[1]:.2f} (element, row), {typical:.2f} x expected"
            )
            assert max(ratios) <= 1
        # Teeth: the identity, and a projector rounded to bfloat16, break it.
        assert worst_ratio((x.double() - ours).norm(dim=-1), row) > 1


@pytest.mark.slow
def test_bf16_logits_of_every_mode_err_like_the_original_model_in_bf16(models, tokenizer, subspace, oracle):
    """What bfloat16 costs the edited model is what it costs the original: the yardstick is measured in the same run.

    Both runs make the same roundings but for one more per edited layer in the hook forms, of 8 layers with
    a dozen roundings each: a mode that errs by more than twice the original's error does something else.
    """
    exact = logits(models[torch.float64], tokenizer, prompts())
    low = models[torch.bfloat16]

    def rms(a, b):
        return float(torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)]).pow(2).mean().sqrt())

    yardstick = rms(logits(low, tokenizer, prompts()), exact)
    for mode, applier in MODES.items():
        with applier(low, subspace):
            error = rms(logits(low, tokenizer, prompts()), oracle)
        print(f"{mode}: rms logit error {error:.4f}, original's {yardstick:.4f}, ratio {error / yardstick:.2f}")
        assert error <= 2 * yardstick
    # Teeth: without the edit the logits are far from the edited oracle.
    assert rms(logits(low, tokenizer, prompts()), oracle) > 2 * yardstick


@pytest.mark.slow
def test_all_modes_write_the_same_texts_in_float32(models, tokenizer, subspace):
    """On the English and Chinese test set; two texts may part only where the two best logits are within 1e-4."""
    model, texts = models[torch.float32], prompts(10)
    written = {}
    for mode, applier in MODES.items():
        with applier(model, subspace):
            written[mode] = generate(model, tokenizer, texts, max_new_tokens=192, batch_size=100)
    for other in ("baked", "fused", "lora"):
        for prompt, a, b in zip(texts, written["hook"], written[other], strict=True):
            if a.ids == b.ids:
                continue
            at = next(t for t, (x, y) in enumerate(zip((*a.ids, -1), (*b.ids, -1), strict=False)) if x != y)
            ids = torch.tensor([tokenizer(prompt).input_ids + list(a.ids[:at])])
            with hooked(model, subspace), torch.no_grad():
                best = model(input_ids=ids).logits[0, -1].topk(2).values
            gap = float(best[0] - best[1])
            print(f"hook and {other} part at token {at} of {prompt!r}: gap of the two best logits {gap:.1e}")
            assert gap < 1e-4
    assert len({g.text for g in written["hook"]}) > 50
