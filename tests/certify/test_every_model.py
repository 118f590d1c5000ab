"""The certificate of a model of every type: it holds for the edit in memory and in files, and names what is wrong."""

from contextlib import contextmanager

import pytest
import torch

from kernel_surgery import Subspace, adapted, hooked
from kernel_surgery.certify.blocks import check_block
from kernel_surgery.certify.model import certify_model
from kernel_surgery.certify.render import shown
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.models.architectures import mlp_outputs
from kernel_surgery.models.stored import layout_in, layouts, parts
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.marks import everyday
from tests.support.model_cells import store
from tests.support.models import basis
from tests.support.picos import D, pico_of

LAYERS = (1, 2)
MIXTURES = ("qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4", "granitemoe")
DAILY = ("qwen3", "gemma2", "gpt2", "cohere", "bloom", "qwen2_moe", "gpt_oss", "llama4")
KINDS = everyday(ARCHITECTURES, *DAILY)


def made(kind, folder, dtype=torch.float32, layers=LAYERS):
    """A pico's checkpoint and its baked one, and the subspace."""
    model = pico_of(kind, dtype=dtype)
    model.save_pretrained(folder / "source")
    subspace = Subspace({i: basis(D, 3, i) for i in layers}, fingerprint=fingerprint(model), site="mlp_out")
    bake_checkpoint(folder / "source", subspace, folder / "baked")
    return model, subspace


def certified(folder, subspace, dtype=torch.float32, baked=False, **more):
    given = {"prompts": 2, "new_tokens": 2, "made": folder / "baked" if baked else None} | more
    return certify_model(folder / "source", subspace, dtype=dtype, **given)


@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_of_every_model_holds(kind, tmp_path):
    model, subspace = made(kind, tmp_path)
    weights = [weight for site in mlp_outputs(model, LAYERS).values() for weight in site.weights]
    expected = [name for weight in weights for name, _ in weight.parts()]
    biased = any(weight.form.bias for weight in weights)
    # Each type with its own baked files; those of every day also with the edit in memory alone.
    for baked in (False, True) if kind in DAILY else (True,):
        found = certified(tmp_path, subspace, baked=baked)
        assert found["faults"] == []
        assert sorted(row["tensor"] for row in found["tensors"]) == sorted(expected)
        assert found["modes"] == ["hook", "fused", "baked", *([] if biased else ["lora"])]
        assert ["has a bias" in why for why in found["left_out"].values()] == [True] * biased
        assert found["providers"]["baked"] == ("weights on disk" if baked else "weights")
        assert (found["routing"] is None) == (not any(weight.form.stacked for weight in weights))
        assert {row["layer"] for row in found["layers"]} == set(LAYERS)
        # The checks are near what is there: no bound is a thousand times too wide.
        worst = max(row["error_over_bound"] for row in found["layers"])
        assert 0.01 < worst <= 1
    store(kind, {"streamed certificate": f"{worst:.2f}"})


NORMED = [kind for kind, row in ARCHITECTURES.items() if row.after]


@pytest.mark.parametrize("kind", everyday(NORMED, "gemma2", "glm4"))
@pytest.mark.parametrize("dtype", everyday([torch.float32, torch.bfloat16], torch.float32))
def test_the_certificate_of_an_edit_after_a_norm_holds_for_the_modes_that_can_make_it(kind, dtype, tmp_path):
    model = pico_of(kind, dtype=dtype)
    model.save_pretrained(tmp_path / "source")
    subspace = Subspace({i: basis(D, 3, i) for i in LAYERS}, fingerprint=fingerprint(model), site="mlp_write")
    found = certified(tmp_path, subspace, dtype)
    assert found["faults"] == [] and found["modes"] == ["hook", "fused"] and found["tensors"] == []
    assert all("no weight makes what a norm gives" in found["left_out"][mode] for mode in ("baked", "lora"))
    assert found["logits"]["hook"]["decoded"]["of_original"] <= 2
    # It is another edit than that of the MLP block's output.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel_surgery.certify.model.applied_at", lambda where, *given: _elsewhere(*given))
        faults = certified(tmp_path, subspace, dtype, whole=False)["faults"]
    assert any(f.startswith("layer 1: hook: ") for f in faults)


def _elsewhere(mode, model, edits, strength):
    return APPLIERS[mode](model, edits, strength)


@pytest.mark.parametrize("kind", everyday(MIXTURES, "deepseek_v3"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_the_certificate_of_a_mixture_holds_in_16_bits_though_its_routing_would_differ(kind, dtype, tmp_path):
    _, subspace = made(kind, tmp_path, dtype)
    found = certified(tmp_path, subspace, dtype, baked=True, prompts=4)
    assert found["faults"] == []
    routing = found["routing"]
    assert routing["taken"] == "the oracle's" and set(routing["decoded"]) == {"original", *found["modes"]}
    assert set(routing["differ"]) == {"original", "ideal", *found["modes"]}
    most, said = max(routing["differ"].values()), shown({"tensors": [], "faults": [], "model": found})
    assert f"other experts in at most {most} of {routing['decisions']} decisions." in said
    assert all(count < 0.05 * routing["decisions"] for count in routing["differ"].values())
    assert kind != "deepseek_v3" or dtype != torch.bfloat16 or min(routing["differ"].values()) > 0


def test_without_the_oracles_routing_a_certificate_sees_other_experts(tmp_path, monkeypatch):
    """The guard of the test above: the same model, with every stream routed by itself."""
    _, subspace = made("deepseek_v3", tmp_path, torch.bfloat16)
    right = certified(tmp_path, subspace, torch.bfloat16, prompts=4, whole=False)["logits"]["original"]["relative"]

    @contextmanager
    def by_itself(router, given):
        yield []

    monkeypatch.setattr("kernel_surgery.certify.model.routing_given", by_itself)
    own = certified(tmp_path, subspace, torch.bfloat16, prompts=4, whole=False)["logits"]["original"]["relative"]
    print(f"relative error of the original's logits: {right:.2g}, routed by itself {own:.2g}")
    assert own > 1.5 * right


@pytest.mark.parametrize("kind", everyday(("gpt_oss", "deepseek_v3", "gpt2", "llama4"), "gpt_oss", "deepseek_v3"))
def test_a_part_that_was_forgotten_in_the_files_is_named(kind, tmp_path):
    """An expert, a shared expert, a dense matrix between, a bias: each put back to what it was, and named."""
    layers = (0, 1)  # a dense one and a mixture, where a model has both
    _, subspace = made(kind, tmp_path, layers=layers)
    before = parts(layout_in(tmp_path / "source"), layouts(tmp_path / "source"), layers)
    after = parts(layout_in(tmp_path / "baked"), layouts(tmp_path / "baked"), layers)
    chosen = {(old.form.role, old.form.bias): (old, new) for old, new in zip(before, after, strict=True)}
    assert len(chosen) == {"gpt_oss": 2, "deepseek_v3": 3, "gpt2": 2, "llama4": 3}[kind]
    for old, new in chosen.values():
        assert old.name == new.name
        baked = new.path.read_bytes()
        original = old.path.read_bytes()[old.entry.begin : old.entry.end]
        new.path.write_bytes(baked[: new.entry.begin] + original + baked[new.entry.end :])
        faults = certified(tmp_path, subspace, baked=True, whole=False)["faults"]
        new.path.write_bytes(baked)
        start = f"layer {old.layer}: baked "
        named = {fault.removeprefix(start).partition(":")[0] for fault in faults if fault.startswith(start)}
        # By its name, and no other part.
        (part,) = {name for name in named if not name.startswith("and ")}
        assert old.name.endswith(part), (old.name, faults)
        # And by what the block gives.
        assert any(f.startswith(f"layer {old.layer}: baked: the error against the exact edit is") for f in faults)
        assert all("baked" in fault for fault in faults)


def wrong_at(layer, right, wrong):
    @contextmanager
    def applier(model, edits, strength, **more):
        with (wrong if layer in edits else right)(model, edits, strength, **more) as edit:
            yield edit

    return applier


@pytest.mark.parametrize("kind", everyday(("qwen2_moe", "llama4"), "qwen2_moe"))
@pytest.mark.parametrize("mode, right", [("hook", hooked), ("lora", adapted)])
def test_a_fault_in_a_mixture_is_found_and_its_layer_and_mode_named(kind, mode, right, tmp_path, monkeypatch):
    model = pico_of(kind)
    model.save_pretrained(tmp_path / "source")
    subspace = Subspace({i: basis(D, 3, i) for i in LAYERS}, fingerprint=fingerprint(model), site="mlp_out")
    layer = 1 if kind == "llama4" else 2  # one with experts
    wrong = wrong_at(layer, right, lambda m, e, a, **more: right(m, e, 0.999 * a, **more))
    monkeypatch.setitem(APPLIERS, mode, wrong)
    faults = certified(tmp_path, subspace, whole=False)["faults"]
    print("\n".join(faults))
    assert f"layer {layer}: {mode}: the error against the exact edit is" in "\n".join(faults)
    assert all(f.startswith((f"layer {layer}: ", f"{mode}: ")) and mode in f for f in faults)


@pytest.mark.parametrize("mode", ["hook", "baked"])
def test_a_single_expert_that_is_edited_otherwise_is_found_by_what_its_block_gives(mode, tmp_path, monkeypatch):
    """The check of the block alone, where the weights are not looked at: one expert at 0.99 of the strength."""
    model = pico_of("mixtral")
    model.save_pretrained(tmp_path / "source")
    subspace = Subspace({i: basis(D, 3, i) for i in LAYERS}, fingerprint=fingerprint(model), site="mlp_out")

    @contextmanager
    def applier(model, edits, strength, **more):
        (layer,) = edits
        with APPLIERS[f"right {mode}"](model, edits, strength, **more) as edit:
            down, u = mlp_outputs(model, [layer])[layer].first, edits[layer].basis
            kept = down[2].detach().clone()
            down.data[2] += 0.01 * u @ (u.T @ originals[layer]) if mode == "baked" else 0.01 * kept
            yield edit
            down.data[2] = kept

    originals = {i: mlp_outputs(model, [i])[i].first[2].detach().clone() for i in LAYERS}
    monkeypatch.setitem(APPLIERS, f"right {mode}", APPLIERS[mode])
    monkeypatch.setitem(APPLIERS, mode, applier)
    monkeypatch.setattr("kernel_surgery.certify.model.broken", lambda row: [])
    # Nor at the modes of another name.
    monkeypatch.setattr("kernel_surgery.certify.model._Certifier.__init__", limited(mode))
    faults = certified(tmp_path, subspace, whole=False)["faults"]
    print("\n".join(faults))
    assert any(f.startswith(f"layer 1: {mode}: the error against the exact edit is") for f in faults)


def test_a_token_of_a_thousand_times_the_size_hides_no_other():
    """Of 64 rows one is huge, and only that one is edited: the check is of each row, not of their sum."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, D, generator=generator)
    exact[0] *= 1000
    rounded, u = exact.bfloat16(), basis(D, 3, 0)
    edited = project_oracle(rounded, u, 1.0).to(rounded.dtype)
    lacking = torch.cat([edited[:1], rounded[1:]])
    rows, _ = check_block({"baked": edited, "lora": lacking}, {}, rounded, exact, u, 1.0, 2.0)
    assert rows["baked"]["error_over_bound"] <= 1 < 10 < rows["lora"]["error_over_bound"]


def limited(*modes):
    """The certifier's own start, with some modes only."""
    from kernel_surgery.certify.model import _Certifier

    real = _Certifier.__init__

    def start(self, *given):
        real(self, *given)
        self.modes = [mode for mode in self.modes if mode in modes]

    return start
