"""Every architecture of the table in vLLM, and faults that are planted in the plugin: all are caught, or refused."""

from dataclasses import replace

import pytest

from kernel_surgery.certify import engine as certifying
from kernel_surgery.certify.engine import verify_engine
from kernel_surgery.common.errors import UserError
from kernel_surgery.engines import layers, offline
from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.engines import EAGER
from tests.support.models import oblique, pico

pytestmark = [pytest.mark.engines, pytest.mark.usefixtures("vllm_environment")]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_architecture_of_the_table_is_edited(kind, tmp_path):
    """Each with an oblique edit and a schedule; llama with a bias and an offset too."""
    biased = {"mlp_bias": True} if kind == "llama" else {}
    model = pico(kind, hidden_size=128, num_attention_heads=4, head_dim=32, **biased)
    model.save_pretrained(tmp_path / "model")
    edits = {layer: oblique(128, 3, layer, offset=kind == "llama", spread=3.0) for layer in (1, 2)}
    known = {"fingerprint": fingerprint(model), "n_layers": 4, "site": "mlp_out", "strengths": {2: 0.5}}
    Subspace.of(edits, **known).save(tmp_path / "s.safetensors")
    given = {"model_id": kind, "dtype": "float32", "prompts": 2, "new_tokens": 2, "more": EAGER}
    edited = ["fused", "baked"] if kind == "llama" else ["fused"]
    found = verify_engine(tmp_path / "model", tmp_path / "s.safetensors", edited=edited, **given)
    print(kind, {mode: r["rms_of_original"] for mode, r in found["across_engines"]["modes"].items()})
    assert found["faults"] == [] and set(edited) < set(found["across_engines"]["modes"])
    assert found["across_engines"]["reports"]["fused"]["layers"] == [1, 2]


# --- planted faults ---


def certify(**given):
    given = {"model_id": "polyglot", "dtype": "float32", "prompts": 2, "new_tokens": 2, "edited": ["fused"]} | given
    return verify_engine(POLYGLOT, POLYGLOT_SUBSPACE, **{"more": EAGER} | given)


def test_an_edit_at_the_wrong_layer_is_caught(monkeypatch):
    swapped = {2: 3, 3: 2}
    layer_of = layers.Edits.layer_of

    def wrong(self, prefix):
        layer = layer_of(self, prefix)
        return swapped.get(layer, layer)

    monkeypatch.setattr(layers.Edits, "layer_of", wrong)
    (fault,) = certify()["faults"]
    assert fault.startswith("fused: its log probabilities are off by ") and "first at token" in fault


def test_a_strength_that_is_ignored_is_caught(monkeypatch):
    edits_of = layers.edits_of

    def ignoring(config):
        edits = edits_of(config)
        edits.strengths.fill_(1.0)
        return edits

    monkeypatch.setattr(layers, "edits_of", ignoring)
    assert certify(strength=1.0)["faults"] == []
    (fault,) = certify(strength=0.5)["faults"]
    assert fault.startswith("fused: its log probabilities are off by ")


def test_fewer_layers_than_asked_are_caught(monkeypatch):
    edits_of = layers.edits_of

    def fewer(config):
        edits = edits_of(config)
        edits.layers = edits.layers[:-1]
        return edits

    monkeypatch.setattr(layers, "edits_of", fewer)
    faults = certify()["faults"]
    assert faults[0] == "fused: vLLM edits layers [2, 3, 4], but [2, 3, 4, 5] was asked" and len(faults) == 2


def test_an_edit_that_rank_1_skips_is_caught(monkeypatch):
    def one_device(variant, options):
        """The original needs no two ranks to be the yardstick."""
        alone = variant.mode == "original"
        return started(variant, replace(options, tensor_parallel=1, more=EAGER) if alone else options)

    started = offline.started
    monkeypatch.setattr(certifying, "started", one_device)
    planted = EAGER | {"worker_extension_cls": "tests.support.planted.SkippedOnRank1"}
    (fault,) = certify(tensor_parallel=2, more=planted)["faults"]
    assert fault.startswith("fused: its log probabilities are off by ")


def test_an_edit_too_small_to_be_seen_is_not_certified():
    with pytest.raises(UserError, match="a missing edit could not be seen"):
        certify(strength=1e-7)
