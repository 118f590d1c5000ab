"""SmolLM2-135M-Instruct: a real model through the library. `make smollm2` fetches it; nothing of it is in the clone."""

import json

import pytest
import torch
from huggingface_hub.repocard import metadata_load

from kernel_surgery import Subspace, hooked
from kernel_surgery.certify.model import certify_model
from kernel_surgery.collect import run as collect
from kernel_surgery.damage.measure import yardstick_readings
from kernel_surgery.damage.neutral import NeutralText
from kernel_surgery.damage.words import judged
from kernel_surgery.models.gguf import SMOLLM2_HUB
from kernel_surgery.models.load import SMOLLM2_FOLDER, load_model, load_tokenizer, resolve_model
from kernel_surgery.models.padding import padded, padding_id
from kernel_surgery.subspace.activations import load_activations
from kernel_surgery.subspace.collecting import pool_states, prompt_states
from kernel_surgery.subspace.fitting import fit_subspace
from kernel_surgery.subspace.moments import load_moments
from tests.support.calls import call
from tests.support.neutral import fewer_sentences

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder():
    assert (SMOLLM2_FOLDER / "config.json").is_file(), "fetch the model first: make smollm2"
    return SMOLLM2_FOLDER


@pytest.fixture(scope="module")
def collected(folder, tmp_path_factory):
    """Activations of six problems in two languages at two layers."""
    out = tmp_path_factory.mktemp("real") / "activations.safetensors"
    words = ["--model", "smollm2", "--problems", "6", "--layers", "8-9", "--languages", "en,zh", "--pool", "last"]
    assert collect([*words, "--out", str(out)]) in (0, None)
    return load_activations(out)


def test_it_is_what_it_says(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 30 and config["hidden_size"] == 576
    card = metadata_load(folder / "README.md")
    assert (card["base_model"], card["license"]) == (SMOLLM2_HUB, "apache-2.0")
    said = (folder / "README.md").read_text(encoding="utf-8")
    assert "# SmolLM2-135M-Instruct.Q4_1, read from a GGUF file" in said and "210 of Q4_1, 61 of F32, 1 of Q8_0" in said
    assert "quantization_config" not in config and resolve_model("smollm2") == str(folder)
    tokenizer = load_tokenizer("smollm2")
    model, ids = load_model("smollm2", torch.float32), tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(model(**ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"


def test_the_command_certifies_an_oblique_edit_in_every_mode(collected, tmp_path):
    fit_subspace(collected, method="oblique").save(tmp_path / "subspace.safetensors")
    options = ["--prompts", "2", "--new-tokens", "2", "--dtype", "bfloat16"]
    status, out, err = call("verify", "--model", "smollm2", "--subspace", tmp_path / "subspace.safetensors", *options)
    assert status == 0, out + err
    assert "everything holds" in out


@pytest.mark.parametrize(
    "method, dtype, modes",
    [
        ("oblique", torch.float16, ["hook", "fused", "baked", "lora"]),
        ("oblique", torch.float32, ["hook", "fused", "baked", "lora"]),
        ("leace", torch.bfloat16, ["hook", "fused"]),  # it has no biases for an offset
    ],
)
def test_the_certificate_holds(collected, folder, method, dtype, modes):
    subspace = fit_subspace(collected, method=method)
    found = certify_model(folder, subspace, dtype=dtype, prompts=2, new_tokens=1, whole=False)
    worst = max(row["error_over_bound"] for row in found["layers"])
    print(f"{method} {dtype}: largest error/bound {worst:.3f}")
    assert found["faults"] == [] and found["modes"] == modes and worst > 0


def test_the_default_edit_leaves_the_model_whole_and_that_of_the_first_script_breaks_it(folder, tmp_path, monkeypatch):
    """The commands' defaults against `--method deviations --rank 10`, in the words that users read."""
    model, tokenizer = load_model("smollm2", torch.float32), load_tokenizer("smollm2")
    fewer_sentences(monkeypatch, 6)
    text = NeutralText(model, tokenizer, ("en", "zh"))
    yardsticks, found = yardstick_readings(text), {}
    for name, collected, more in (
        ("default", ["--problems", "2"], []),
        ("deviations", ["--problems", "1", "--pool", "last"], ["--method", "deviations", "--rank", "10"]),
    ):
        acts, out = tmp_path / f"{name}-acts", tmp_path / name
        given = ["--model", "smollm2", "--layers", "8-21", *collected, "--out", acts]
        assert call("collect", *given)[0] == 0
        assert call("fit", "--activations", acts, *more, "--out", out)[0] == 0
        subspace = Subspace.load(out)
        assert subspace.layers == tuple(range(8, 22))
        with hooked(model, subspace):
            readings = text.read()
        found[name] = judged(readings, yardsticks)["word"], readings
        for language, r in readings.items():
            print(f"{name} {language}: KL {r.kl_mean:.3f}, perplexity x{r.perplexity / r.original_perplexity:.3f}")
    word, readings = found["default"]
    assert word == "like 4-bit"
    assert all(r.kl_mean <= 0.25 and r.perplexity <= 1.25 * r.original_perplexity for r in readings.values())
    word, readings = found["deviations"]
    assert word == "broken" and all(r.kl_mean >= 3 for r in readings.values())


def test_moments_leave_out_the_first_token_of_a_prompt_which_is_larger_than_the_others(folder, tmp_path):
    """After layer 8. After layer 9 it is not: there, other tokens are as large."""
    words = ["--model", "smollm2", "--problems", 1, "--languages", "en,zh", "--layers", "8-9", "--pool", "tokens"]
    words += ["--site", "resid_post", "--chat", "off"]
    energies = {}
    for name, more in (("left out", []), ("kept", ["--keep-first"])):
        status, out, err = call("collect", *words, *more, "--out", tmp_path / name)
        assert status == 0 and f"the first of each prompt {name}" in out, err
        moments = load_moments(tmp_path / name)
        energies[name] = {layer: float(m.second.trace()) for layer, m in moments.by_layer.items()}
        tokens = sum(moments.provenance["tokens"].values())
        energies[name]["tokens"] = tokens
    assert energies["kept"]["tokens"] - energies["left out"]["tokens"] == 10
    for layer in (8, 9):
        first = (energies["kept"][layer] - energies["left out"][layer]) / 10
        other = energies["left out"][layer] / energies["left out"]["tokens"]
        print(f"layer {layer}: a first token has {first / other:.1f} times the squared norm of another")
        assert layer == 9 or first / other > 5
    out = tmp_path / "subspace"
    fitted = ["--activations", tmp_path / "left out", "--method", "oblique", "--layers", "8-9", "--out", out]
    assert call("fit", *fitted)[0] == 0
    assert Subspace.load(out).fit["first_token"] == "left out"


@pytest.mark.parametrize("site", ["mlp_out", "resid_post"])
def test_collect_gives_the_bits_of_the_whole_model(folder, site):
    model, tokenizer = load_model("smollm2", torch.float32), load_tokenizer("smollm2")
    prompts = ["The capital of France is", "2 + 2 =", "Seven times eight is fifty-six, and one more is"]
    got = prompt_states(model, tokenizer, prompts, [3, 12], site=site)
    order = sorted(range(3), key=lambda i: -len(tokenizer(prompts[i]).input_ids))
    encoded = [tokenizer(prompts[i]).input_ids for i in order]
    ids, mask = padded(encoded, padding_id(model, tokenizer), tokenizer.padding_side, "cpu")
    for layer in (3, 12):
        seen = {}
        block = model.model.layers[layer]
        module = block.mlp.down_proj if site == "mlp_out" else block
        handle = module.register_forward_hook(lambda m, i, o, seen=seen: seen.update(out=o))
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
        handle.remove()
        assert torch.equal(got[layer][order], pool_states(seen["out"], mask, "last"))
