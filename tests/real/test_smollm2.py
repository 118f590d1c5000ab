"""SmolLM2-135M-Instruct: a real model through the library. `make smollm2` fetches it; nothing of it is in the clone."""

import json

import pytest
import torch

from kernel_surgery.collect import run as collect
from kernel_surgery.common.errors import UserError
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.models.gguf import check_sha256
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
    return out


def test_it_is_what_it_says(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 30 and config["hidden_size"] == 576
    assert "quantization_config" not in config and resolve_model("smollm2") == str(folder)
    tokenizer = load_tokenizer("smollm2")
    model, ids = load_model("smollm2", torch.float32), tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(model(**ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"


@pytest.mark.parametrize("method", ["oblique", "leace"])
def test_every_mode_makes_a_fitted_edit(collected, method):
    """In float32: the modes differ by rounding, and the edit moves the logits by far more."""
    subspace = fit_subspace(load_activations(collected), method=method)
    model = load_model("smollm2", torch.float32)
    ids = load_tokenizer("smollm2")("What is 3 + 4?", return_tensors="pt")
    seen = {}
    with torch.no_grad():
        seen["original"] = model(**ids).logits
        for mode in APPLIERS if method == "oblique" else ("hook", "fused"):  # it has no biases for an offset
            with APPLIERS[mode](model, subspace, force=True):
                seen[mode] = model(**ids).logits
    moved = float((seen["hook"] - seen["original"]).abs().max())
    for mode, logits in seen.items():
        if mode not in ("original", "hook"):
            apart = float((logits - seen["hook"]).abs().max())
            print(f"{method} {mode}: {apart:.1e} from hook, which moves the logits by {moved:.1e}")
            assert apart < moved / 100


def test_the_certificate_holds_on_it(collected, tmp_path):
    fit_subspace(load_activations(collected), method="oblique").save(tmp_path / "subspace.safetensors")
    options = ["--prompts", "2", "--new-tokens", "2", "--dtype", "bfloat16"]
    status, out, err = call("verify", "--model", "smollm2", "--subspace", tmp_path / "subspace.safetensors", *options)
    assert status == 0, out + err
    assert "everything holds" in out


def test_another_package_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"something else")
    with pytest.raises(UserError, match="has SHA-256"):
        check_sha256(tmp_path / "x.whl")
