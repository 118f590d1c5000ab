"""The commands, one after the other, on models that are not Llama's: experts, a norm after the MLP, Conv1D, biases."""

import json

import pytest

from kernel_surgery.models.load import load_tokenizer
from tests.support.calls import call
from tests.support.picos import pico_of

KINDS = {
    "qwen3_moe": "2 layers edited (4 experts in 1 layer, 1 dense layer)",
    "gemma2": "2 layers edited (2 matrices)",
    "gpt2": "2 layers edited (2 matrices, 2 biases)",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_from_activations_to_an_evaluation(kind, tmp_path):
    tokenizer = load_tokenizer("polyglot")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = pico_of(kind, vocab_size=len(tokenizer), max_position_embeddings=512, **ends)
    folder, subspace = tmp_path / "model", tmp_path / "s.safetensors"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    biased, normed = kind == "gpt2", kind == "gemma2"
    given = ("--model", folder, "--subspace", subspace)

    def done(*words, status=0):
        found = call(*words)
        assert found[0] == status, found
        return found[1] + found[2]

    done("collect", "--model", folder, "--problems", 2, "--out", tmp_path / "a.safetensors")
    done("fit", "--activations", tmp_path / "a.safetensors", "--layers", "1-2", "--out", subspace)
    said = done("bake", *given, "--out", tmp_path / "baked", "--force")
    assert KINDS[kind] in said and ("a norm follows the edited output" in said) == normed
    said = done("verify", "--baked", tmp_path / "baked", "--model", folder, "--out", tmp_path / "c.json")
    assert "everything holds" in said
    options = ("--prompts", 2, "--new-tokens", 2, "--out", tmp_path / "modes.json")
    said = done("verify", *given, *options)
    assert "everything holds" in said
    left_out = json.loads((tmp_path / "modes.json").read_text())["model"]["left_out"]
    assert ("lora" in left_out) == biased
    said = done("lora", *given, "--out", tmp_path / "lora", "--force", status=2 if biased else 0)
    assert ("has a bias" in said) == biased
    words = ("eval", *given, "--mode", "fused", "--problems", 1, "--max-new-tokens", 4, "--out", tmp_path / "run")
    said = done(*words)
    assert ("a norm follows the edited output" in said) == normed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["model"]["architecture"] == kind
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("a norm follows the edited output" in page) == normed
    assert "model, s.safetensors: fused" in done("compare", *given, "2+2", "--max-new-tokens", 3)
    done("bake", "--undo", "--model", tmp_path / "baked", "--out", tmp_path / "restored")
    said = done("verify", "--restored", tmp_path / "restored", "--model", folder, "--out", tmp_path / "r.json")
    assert "everything holds" in said
