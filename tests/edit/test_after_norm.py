"""The site after the norm that follows the MLP block's output (Gemma 2, OLMo 2): hook and fused edit what is added, and
what is measured of the edit is read there."""

from types import SimpleNamespace

import pytest
import torch

from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.checkpoint.source import check_edit
from kernel_surgery.common.errors import KernelSurgeryError
from kernel_surgery.damage.measure import neutral_moments, random_edits
from kernel_surgery.damage.words import MATCHED
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.controls import draw, in_model
from kernel_surgery.evaluation.effects import last_states, leaks, reached
from kernel_surgery.models.architectures import decoder_layers, mlp_outputs, submodule
from kernel_surgery.models.chat import OFF
from kernel_surgery.models.table import ARCHITECTURES
from kernel_surgery.numerics.bounds import rule_a_bound, worst_ratio
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.subspace.reading import reading
from tests.support.models import basis
from tests.support.picos import LAYERS, WORDS, D, pico_of

NORMED = [kind for kind, layout in ARCHITECTURES.items() if layout.follows == "norm"]


def subspace_of(model, site):
    bases = {1: basis(D, 3, 1), 2: basis(D, 3, 2)}
    return Subspace(bases, site=site, n_layers=LAYERS, fingerprint=fingerprint(model))


def norm_of(model, layer):
    layout = ARCHITECTURES[model.config.model_type]
    return submodule(decoder_layers(model)[layer], layout.after)


@pytest.mark.parametrize("mode", ["hook", "fused"])
@pytest.mark.parametrize("kind", NORMED)
def test_what_is_added_to_the_residual_stream_is_edited(kind, mode):
    model, seen = pico_of(kind), {}
    subspace = subspace_of(model, "mlp_write")
    norm = norm_of(model, 1)
    handle = norm.register_forward_hook(lambda m, args, out: seen.update(before=out))
    with torch.no_grad(), applied(mode, model, subspace, 1.0) as (edit,):
        after = norm.register_forward_hook(lambda m, args, out: seen.update(after=out))
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
        assert edit.note is None and edit.calls == {1: 1, 2: 1}
    handle.remove()
    after.remove()
    x, y = seen["before"][0], seen["after"][0]
    u = subspace.bases[1]
    ratio = worst_ratio((y.double() - project_oracle(x, u, 1.0)).abs(), rule_a_bound(x, u, 1.0))
    assert ratio <= 1 and float((y @ u).norm()) < 1e-5 * float((x @ u).norm())


@pytest.mark.parametrize("kind", NORMED)
def test_the_edit_before_the_norm_says_what_it_is_not(kind, tmp_path):
    """With the edit of the block's output, what is added still lies in the subspace in part."""
    model, seen = pico_of(kind), {}
    subspace = subspace_of(model, "mlp_out")
    # A norm whose weight is not the same everywhere turns directions: so do those of trained models.
    norm_of(model, 1).weight.data.normal_()
    norm_of(model, 1).register_forward_hook(lambda m, args, out: seen.update(out=out[0]))
    with torch.no_grad(), applied("fused", model, subspace, 1.0) as (edit,):
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))
    assert "a norm follows the edited output" in edit.note and "mlp_write" in edit.note
    assert float((seen["out"] @ subspace.bases[1]).norm()) > 0.01 * float(seen["out"].norm())
    model.save_pretrained(tmp_path / "source")
    bake_checkpoint(tmp_path / "source", subspace, tmp_path / "baked", force=True)
    assert "a norm follows the edited output" in (tmp_path / "baked" / "README.md").read_text()


def test_no_weight_makes_what_a_norm_gives(tmp_path):
    model = pico_of("gemma2")
    subspace = subspace_of(model, "mlp_write")
    model.save_pretrained(tmp_path / "source")
    for mode in ("baked", "lora"):
        with pytest.raises(KernelSurgeryError, match=rf"mode {mode} cannot edit .*mlp_write, after a norm"):
            applied(mode, model, subspace, 1.0).__enter__()
        with pytest.raises(KernelSurgeryError, match=rf"mode {mode} cannot make this edit: .*after a norm"):
            check_edit(tmp_path / "source", subspace, [mode])
    check_edit(tmp_path / "source", subspace, ["hook", "fused"])
    for write in (bake_checkpoint, write_adapter):
        with pytest.raises(KernelSurgeryError, match=r"cannot make this edit: .*after a norm"):
            write(tmp_path / "source", subspace, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_model_without_such_a_norm_is_refused(tmp_path):
    model = pico_of("qwen3")
    with pytest.raises(KernelSurgeryError, match=r"'qwen3' model no norm follows .*gemma2.*Use site mlp_out"):
        mlp_outputs(model, [1], "mlp_write")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(KernelSurgeryError, match=r"a 'qwen3' model has no norm after the MLP block"):
        check_edit(tmp_path / "source", subspace_of(model, "mlp_write"), ["hook"])


# --- what is measured of it ---


class Words:
    """A tokenizer of its own: a token a character."""

    pad_token_id, eos_token_id, padding_side = 0, 0, "left"

    def __call__(self, text):
        return SimpleNamespace(input_ids=[1 + ord(c) % (WORDS - 1) for c in text])


ASKED = [
    SimpleNamespace(prompts={"en": "one and two", "zh": "yi he er"}),
    SimpleNamespace(prompts={"en": "3", "zh": "san"}),
]


def turning(kind):
    """A model whose norms turn directions, as those of trained models do: before and after it are two places."""
    model = pico_of(kind)
    for layer in (1, 2):
        norm_of(model, layer).weight.data.normal_()
    return model


@pytest.mark.parametrize("kind", NORMED)
def test_probes_and_leak_are_read_where_the_edit_is(kind):
    model = turning(kind)
    subspace = subspace_of(model, "mlp_write")
    about = model, Words(), ASKED, ("en", "zh")
    before = last_states(*about, site=subspace.edited_site)
    with applied("hook", model, subspace, 1.0):
        after, elsewhere = last_states(*about, site=subspace.edited_site), last_states(*about)
    leak = leaks(before, after, subspace.projections)
    assert max(leak["mlp_write"].values()) < 1e-5
    assert min(leaks({"mlp_out": before["mlp_write"]}, elsewhere, subspace.projections)["mlp_out"].values()) > 0.01
    found = {"leak": {"hook": leak}}
    by = dict.fromkeys(range(LAYERS), 0.5)
    assert list(reached(found, "hook", by, "mlp_write")) == [1, 2] == list(reached(found, "hook", by, "resid_post"))[:2]


@pytest.mark.parametrize("kind", NORMED)
def test_controls_and_random_edits_are_drawn_and_made_there(kind):
    model = turning(kind)
    subspace = subspace_of(model, "mlp_write")
    prompts = ["one and two", "three"]
    rows = {1: [], 2: []}

    def take(layer, states, mask):
        rows[layer].append(states[mask.bool()].double())

    with reading(model, Words(), [1, 2], "mlp_write", take) as read:
        read([Words()(prompt).input_ids for prompt in prompts])
    how = in_model(SimpleNamespace(model=model, tokenizer=Words(), chat=OFF), "hook", subspace)
    found = how["activations_of"](prompts)
    for layer, x in rows.items():
        torch.testing.assert_close(found[layer].mean_square, x[0].T @ x[0] / len(x[0]), rtol=1e-4, atol=1e-6)
    later = torch.cat([row[1:] for row in rows[1][0].split([len(prompt) for prompt in prompts])])
    (control,) = draw("energy", 1, subspace, 1.0, found, seed=3)
    with how["block_of"](control)():
        rows[1].clear()
        with reading(model, Words(), [1, 2], "mlp_write", take) as read:
            read([Words()(prompt).input_ids for prompt in prompts])
    u, y = control.bases[1].double(), rows[1][0]
    inside, before = y @ u, (1 - control.strengths[1]) * (found[1].energy(Projection(control.bases[1])) * len(y)) ** 0.5
    assert float(inside.norm()) == pytest.approx(abs(before), rel=1e-3)
    text = SimpleNamespace(model=model, tokenizer=Words(), encoded={"en": [Words()(p).input_ids for p in prompts]})
    torch.testing.assert_close(neutral_moments(text, subspace)[1].mean, later.mean(0), rtol=1e-4, atol=1e-6)
    assert random_edits(text, subspace, MATCHED).edited_site == "mlp_write"
