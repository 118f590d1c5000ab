"""The edit of a model that transformers splits over two processes (tp_plan="auto" under torchrun, gloo).

One start of torchrun measures everything (tests/support/tensor_parallel.py); the tests here say what must hold.
"""

import json
import shutil

import pytest
import torch

from kernel_surgery import POLYGLOT_SUBSPACE, Subspace, fused
from kernel_surgery.common.errors import ModelError
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.models.shards import is_split, local, part_of, total, whole
from kernel_surgery.numerics.bounds import split_bound
from tests.support.models import basis, pico
from tests.support.ranks import ROOT, run, torchrun

MODELS = ["llama", "llama-bias", "llama-bias-bf16", "polyglot", "qwen2", "qwen3-bf16"]
FLOAT32 = [name for name in MODELS if not name.endswith("bf16")]
# The factor of a certificate: errors of the edited model, in those of the original (NUMERICS: whole model).
YARDSTICK = 2.0


def recipe():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    return page.split("<!-- tested: recipe -->\n```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{model: figures} and what the recipe printed."""
    folder = tmp_path_factory.mktemp("split")
    models = folder / "models"
    pico("llama").save_pretrained(models / "llama")
    pico("qwen2", intermediate_size=97).save_pretrained(models / "qwen2")  # parts of 49 and 48 columns
    pico("qwen3", dtype=torch.bfloat16).save_pretrained(models / "qwen3-bf16")
    for end, dtype in (("", torch.float32), ("-bf16", torch.bfloat16)):
        pico("llama", bias=True, mlp_bias=True, dtype=dtype).save_pretrained(models / f"llama-bias{end}")
    shutil.copytree(POLYGLOT, models / "polyglot")
    (folder / "split.py").write_text(recipe(), encoding="utf-8")
    words = ["-m", "tests.support.tensor_parallel", *map(str, (models, folder / "out.json", folder / "split.py"))]
    done = run(torchrun(*words), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text()), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_split_layer_is_within_the_bound_of_the_exact_edit(measured, name):
    found = measured[0][name]
    print(name, found["layers"])
    assert set(found["layers"]) >= {"hook", "fused", "baked"} and ("lora" in found["layers"]) == ("bias" not in name)
    assert 0 < max(found["layers"].values()) <= 1
    mine, all_columns = found["columns"]
    assert mine == -(-all_columns // 2)  # process 0 holds half of them, not all


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_planted_fault_breaks_the_bound(measured, name):
    found = measured[0][name]["faults"]
    print(name, found)
    own = "edit before the reduction, with an offset" if "bias" in name else "adapter's product not summed"
    assert set(found) == {"edit skipped on process 1", "baked on process 0 alone", own}
    assert min(found.values()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_differ_from_one_processs_as_the_originals_do(measured, name):
    """The whole model, fused with the norms where it is fused; without gradients, and with them (another code path)."""
    found = measured[0][name]
    edited = dict(found["logits"])
    own = edited.pop("original")
    for mode, errors in edited.items():
        ratios = [error / original for error, original in zip(errors, own, strict=True)]
        print(f"{name} {mode}: {ratios[0]:.2f} and {ratios[1]:.2f} of the original's own difference")
        assert max(ratios) <= YARDSTICK
    assert min(own) > 0 and found["reach"] == ["norm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT32)
def test_the_gradients_differ_as_the_originals_do(measured, name):
    found = dict(measured[0][name]["gradients"])
    own = found.pop("original")
    print(name, own, found)
    assert own > 0 and max(found.values()) <= YARDSTICK * own


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_processes_have_the_same_bits(measured, name):
    assert all(measured[0][name]["same_bits"].values()), measured[0][name]["same_bits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_baked_columns_are_one_rounding_from_exact_and_their_norms_are_of_the_whole(measured, name):
    found = measured[0][name]
    print(name, found["baked"], found["norms"])
    assert 0 < found["baked"] <= 1
    assert found["norms"] <= 3 * (384 * 128) ** 0.5 * 2**-24  # `accumulated` over the largest weight's elements


@pytest.mark.slow
def test_the_fingerprint_is_that_of_the_whole_model_and_sees_other_weights(measured):
    assert all(found["fingerprint"] for found in measured[0].values())
    assert measured[0]["polyglot"]["other weights"] == "refused"


@pytest.mark.slow
def test_what_cannot_be_split_is_refused_by_name(measured):
    refused = measured[0]["llama"]["refusals"]
    for how, why in {
        "rows": "its weight is a DTensor with S(0), and its plan is 'rowwise'",
        "hidden": "its weight is hidden in a plain tensor",
        "mine": "its weight is a DTensor, but transformers did not split it",
    }.items():
        for mode in ("hook", "fused", "baked", "lora"):
            assert f"model.layers.1.mlp.down_proj is split over processes in a way that is not known here: {why}" in (
                refused[f"{how}, {mode}"]
            )
    assert refused["offset, baked"].startswith("cannot bake model.layers.1.mlp.down_proj: the edit has an offset")
    assert refused["offset, lora"].startswith("an adapter cannot make an edit with an offset")
    assert refused["4-bit yardstick"].startswith("cannot round the weights in groups: model.embed_tokens.weight is s")
    assert refused["precision yardstick"].startswith("cannot run the model in another precision: model.embed_tokens")


@pytest.mark.slow
def test_a_refusal_on_one_process_is_one_on_all(measured):
    """Only process 1 holds the columns that overflow. Else process 0 would go on, and wait for it forever."""
    for message, untouched in measured[0]["llama"]["overflow"]:
        assert "some elements are beyond the largest number of torch.float32" in message and untouched
    assert "shares its weight with model.layers.1.mlp.down_proj" in measured[0]["llama"]["shared"]


@pytest.mark.slow
def test_the_recipe_of_the_docs_prints_one_processs_text_once(measured):
    model, tokenizer = load_model("polyglot", torch.bfloat16), load_tokenizer("polyglot")
    with fused(model, Subspace.load(POLYGLOT_SUBSPACE)):
        tokens = model.generate(**tokenizer("Work out 238 + 152.", return_tensors="pt"), max_new_tokens=80)
    assert measured[1].strip() == tokenizer.decode(tokens[0]).strip()


def test_a_plain_tensor_is_its_own_part_and_its_own_sum():
    t = torch.randn(3, 4)
    assert not is_split(t) and local(t) is t and whole(t) is t and part_of(t, t) is t and total(t, t) is t


def test_a_module_that_transformers_has_hooked_but_not_split_as_known_is_refused_in_one_process_too():
    model = pico("qwen2")
    model.model.layers[2].mlp.down_proj._is_hooked = True
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj is split over processes in a way"):
        fused(model, {2: basis(48, 3)}).__enter__()


def test_the_bound_of_a_split_sum_grows_with_the_parts_and_admits_no_more_than_their_roundings():
    parts = torch.tensor([[[3.0, -4.0]], [[-3.0, 4.0]]])
    u = 2.0**-8
    by_hand = 1.01 * u * 2 * torch.tensor([[6.0, 8.0]], dtype=torch.float64)
    found = split_bound("lora", parts, basis(2, 1), torch.bfloat16, 1.0, False)
    assert torch.allclose(found, by_hand, rtol=1e-6)
    biased = split_bound("lora", parts, basis(2, 1), torch.bfloat16, 1.0, True)
    assert torch.allclose(biased, by_hand * 1.5, rtol=1e-6)
    assert (split_bound("hook", parts, basis(2, 1), torch.bfloat16, 1.0, False) > found).all()
