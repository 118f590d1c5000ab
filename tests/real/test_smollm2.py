"""SmolLM2-135M-Instruct: a real model through the library. `make smollm2` fetches it; nothing of it is in the clone."""

import json

import pytest
import torch

from kernel_surgery.certify.model import certify_model
from kernel_surgery.collect import run as collect
from kernel_surgery.models.load import SMOLLM2_FOLDER, load_model, load_tokenizer, resolve_model
from kernel_surgery.subspace.activations import load_activations
from kernel_surgery.subspace.fitting import fit_subspace
from tests.support.calls import call

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def folder():
    assert (SMOLLM2_FOLDER / "config.json").is_file(), "fetch the model first: make smollm2"
    return SMOLLM2_FOLDER


@pytest.fixture(scope="module")
def collected(folder, tmp_path_factory):
    """Activations of six problems in two languages at two layers."""
    out = tmp_path_factory.mktemp("real") / "activations.safetensors"
    words = ["--model", "smollm2", "--problems", "6", "--layers", "8-9", "--languages", "en,zh", "--out", str(out)]
    assert collect(words) in (0, None)
    return load_activations(out)


def test_it_is_what_it_says(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 30 and config["hidden_size"] == 576
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
