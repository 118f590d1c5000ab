"""The certificate of a model: it passes where everything is right, and names the layer where something is not."""

import functools
import html
import json
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import Subspace, adapted, baked, fused, hooked, ops
from kernel_surgery.certify import model as certifying
from kernel_surgery.certify.checks import LogitComparison, check_span, span_rows
from kernel_surgery.certify.model import LIMITS, _Certifier, certify_model
from kernel_surgery.certify.running import greedy, prompt_ids
from kernel_surgery.checkpoint.baking import bake_checkpoint
from kernel_surgery.common.errors import UserError
from kernel_surgery.edit.baked import bake_weight
from kernel_surgery.edit.modes import APPLIERS
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.numerics.oracle import project_oracle
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.ops.eager import project_eager
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.verify import run
from tests.support.marks import everyday
from tests.support.models import basis, pico

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHIPPED = POLYGLOT.parent / "subspace.safetensors"
WRONG_LAYER = 3


@functools.cache
def polyglots_prompts(count, seed, vocabulary):
    return prompt_ids(load_tokenizer("polyglot"), count, seed, vocabulary)


def certified(dtype, source=POLYGLOT, subspace=None, **options):
    """A certificate. The embedded model's prompts are chosen once: that takes 1400 of them through the tokenizer."""
    subspace = Subspace.load(SHIPPED) if subspace is None else subspace
    with pytest.MonkeyPatch.context() as patch:
        if source == POLYGLOT:
            patch.setattr(certifying, "prompt_ids", lambda tokenizer, *words: polyglots_prompts(*words))
        return certify_model(source, subspace, dtype=dtype, **{"prompts": 4, "new_tokens": 4} | options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, *(pytest.param(a, marks=pytest.mark.slow) for a in (0.5, 2.0))])
def test_polyglots_certificate_passes(dtype, strength):
    found = certified(dtype, strength=strength)
    assert found["faults"] == [] and found["modes"] == ["hook", "fused", "baked", "lora"]
    assert [r["layer"] for r in found["layers"]] == [layer for layer in (2, 3, 4, 5) for _ in range(4)]
    assert len(found["pairs"]) == 4 * 6 and [r["layer"] for r in found["hidden"]] == list(range(8))
    assert found["providers"] == {"hook": "torch/eager", "fused": "aten/cpu", "baked": "weights", "lora": "torch/eager"}
    for mode in found["modes"]:
        r = found["logits"][mode]
        print(f"{dtype} a={strength} {mode}: {r['of_original']:.3f} of the original's error, KL {r['kl_mean']:.1e}")
        assert 0.5 < r["of_original"] <= 2 and r["top1"] > 0.9
    assert found["oracle"] == ("float64" if dtype == torch.float32 else "float32")
    assert found["sampled"]["text"].startswith("test problems of 13 tokens (zh, en, es, ar, ja, ko, sw)")
    assert found["sampled"]["positions"] == 4 * 17


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, rank, strength",
    [
        *((torch.float32, 1, 1.0), (torch.float32, 2, 1.0), (torch.float32, 10, 0.0), (torch.float16, 1, 1.0)),
        *((torch.float16, 10, 0.01), (torch.bfloat16, 1, 0.1), (torch.bfloat16, 10, -3.0)),
    ],
)
def test_a_correct_edit_is_never_called_broken(dtype, rank, strength):
    """Where the edit is small, what is left in a bound is the accumulation of the sums, and underflow."""
    found = certified(dtype, subspace=Subspace.load(SHIPPED).truncate(rank), strength=strength, prompts=8)
    worst = max(row["error_over_bound"] for row in found["layers"])
    print(f"{dtype} k={rank} a={strength}: largest error/bound {worst:.3f}")
    assert found["faults"] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_architectures_certificate_passes_and_biases_leave_lora_out(tmp_path, kind, dtype):
    """Weights in bfloat16 on disk whatever the dtype that is certified; no tokenizer, so random ids."""
    options = {"mlp_bias": True} if kind == "llama" else {}
    model = pico(kind, dtype=torch.bfloat16, num_hidden_layers=5, hidden_size=64, head_dim=16, **options)
    for block in model.model.layers:
        if kind == "llama":
            block.mlp.down_proj.bias.data.normal_()
    model.save_pretrained(tmp_path)
    # The last layer too: there the norm that follows is the model's own.
    subspace = Subspace({i: basis(64, 6, i) for i in (1, 2, 4)}, fingerprint=fingerprint(model))
    found = certified(dtype, tmp_path, subspace)
    assert found["faults"] == [] and found["sampled"]["text"] == "random ids, seed 0"
    assert ("lora" in found["modes"]) == (kind != "llama")
    assert list(found["left_out"]) == (["lora"] if kind == "llama" else [])
    reached = [r["norm"] for r in found["layers"] if r["mode"] == "fused"]
    assert len(reached) == 3 and all(0 < ratio <= 1 for ratio in reached)


def test_the_oracle_text_and_the_logits_are_the_models_own():
    """Against transformers' own generate and forward: what is compared is what users run."""
    model, subspace = load_model("polyglot", torch.float32), Subspace.load(SHIPPED)
    oracle = Layerwise(POLYGLOT, torch.float64, exact=True)
    ids, _ = prompt_ids(load_tokenizer("polyglot"), 3, 0, 2048)
    with torch.no_grad():
        text = greedy(oracle, ids, subspace.projections, {}, 6, lambda: None)
        with hooked(model, subspace):
            theirs = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(text, theirs)
    found = certified(torch.float32, prompts=3, new_tokens=6)
    with torch.no_grad():
        exact = load_model("polyglot", torch.float64)
        plain = model(input_ids=text).logits.double() - exact(input_ids=text).logits
    # transformers' float64 has float32 norms, so they agree to a few parts in ten.
    ratio = float(plain.square().mean().sqrt()) / found["logits"]["original"]["rms"]
    print(f"the original's float32 logit error, measured both ways: ratio {ratio:.2f}")
    assert 0.5 < ratio < 2


# --- faults planted in an applier: each is right everywhere but at one layer ---


def at_one_layer(right, wrong):
    """An applier that is `right`, and `wrong` where the layer is WRONG_LAYER."""

    @contextmanager
    def applier(model, bases, strength):
        others = {layer: u for layer, u in bases.items() if layer != WRONG_LAYER}
        with ExitStack() as stack:
            edit = stack.enter_context(right(model, others, strength)) if others else None
            if WRONG_LAYER in bases:
                edit = stack.enter_context(wrong(model, {WRONG_LAYER: bases[WRONG_LAYER]}, strength))
            yield edit

    return applier


def with_output(function):
    """hooked, but for what it computes."""

    @contextmanager
    def applier(model, bases, strength):
        (layer, u), down = next(iter(bases.items())), model.model.layers[next(iter(bases))].mlp.down_proj
        handle = down.register_forward_hook(lambda m, args, out: function(out, u, strength))
        try:
            yield planted(layer)
        finally:
            handle.remove()

    return applier


def planted(layer):
    from kernel_surgery.edit.plan import Edit

    return Edit("hook", (layer,), 1.0, "planted")


def with_weights(function):
    """baked, but for what stands in the weight (and, where it gives one, in the bias)."""

    @contextmanager
    def applier(model, bases, strength):
        (layer,) = bases
        down, u = model.model.layers[layer].mlp.down_proj, bases[layer]
        kept = [p.detach().clone() for p in down.parameters()]
        for p, new in zip(down.parameters(), function(*kept, u, strength), strict=False):
            p.data.copy_(new)
        try:
            yield planted(layer)
        finally:
            for p, old in zip(down.parameters(), kept, strict=True):
                p.data.copy_(old)

    return applier


def dense(x, u, strength):
    u = u.basis
    p = (torch.eye(len(u)) - strength * u @ u.T).to(torch.bfloat16)
    return (x.float() @ p.float().T).to(x.dtype)


def rounded_z(x, u, strength):
    z = (x.float() @ u.basis).bfloat16().float()
    return (x.float() - strength * z @ u.basis.T).to(x.dtype)


def flipped(weight, u, strength):
    new = bake_weight(weight, u, strength)
    new[7, 9] *= -1
    return [new]


OTHER = basis(128, 10, 99)
HOOK_FAULTS = {
    "P in bfloat16": with_output(dense),
    "z in bfloat16": with_output(rounded_z),
    "skipped": with_output(lambda x, u, a: None),
    "U of another layer": with_output(lambda x, u, a: project_eager(x, OTHER, a)),
    "strength off by a percent": with_output(lambda x, u, a: project_eager(x, u, 0.99 * a)),
    "a percent off in three dimensions": with_output(
        lambda x, u, a: project_eager(x, u, a * (1 - 0.01 * (x.ndim == 3)))
    ),
}
FAULTS = {("hook", name): wrong for name, wrong in HOOK_FAULTS.items()}
FAULTS |= {("fused", name): wrong for name, wrong in HOOK_FAULTS.items()}
FAULTS |= {
    ("baked", "skipped"): with_weights(lambda w, u, a: [w]),
    ("baked", "one weight flipped"): with_weights(flipped),
    ("baked", "P in bfloat16"): with_weights(lambda w, u, a: [dense(w.T, u, a).T]),
    ("baked", "strength off by a percent"): lambda m, b, a: baked(m, b, 0.99 * a),
    ("baked", "U of another layer"): lambda m, b, a: baked(m, dict.fromkeys(b, OTHER), a),
    ("lora", "strength off by a percent"): lambda m, b, a: adapted(m, b, 0.97 * a),
    ("lora", "U of another layer"): lambda m, b, a: adapted(m, dict.fromkeys(b, OTHER), a),
}
RIGHT = {"hook": hooked, "fused": fused, "baked": baked, "lora": adapted}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, name, dtype",
    # Bfloat16, whose bounds leave a fault the most room; one in float32, where the oracle computes in float64.
    [*((*fault, torch.bfloat16) for fault in FAULTS), ("baked", "P in bfloat16", torch.float32)],
)
def test_a_fault_in_an_applier_is_found_and_its_layer_and_mode_named(mode, name, dtype, monkeypatch):
    monkeypatch.setitem(APPLIERS, mode, at_one_layer(RIGHT[mode], FAULTS[mode, name]))
    faults = certified(dtype)["faults"]
    print("\n".join(faults))
    assert faults and any(f.startswith(f"layer {WRONG_LAYER}: ") and mode in f for f in faults)
    # No other layer is held to blame, and no other mode but for the pairs that the faulty one is in.
    assert all(f.startswith((f"layer {WRONG_LAYER}: ", f"{mode}: ")) and mode in f for f in faults)


@contextmanager
def only_prompts(model, bases, strength):
    """hooked, but not where a single token is fed: absent from everything that is generated."""
    prompts_only = with_output(lambda x, u, a: project_eager(x, u, a) if x.shape[-2] > 1 else x)
    with ExitStack() as stack:
        edits = [stack.enter_context(prompts_only(model, {layer: u}, strength)) for layer, u in bases.items()]
        yield edits[0]


def first_basis_everywhere(model, bases, strength):
    """fused, but with the first layer's basis in every layer: right as long as one layer is edited at a time."""
    return fused(model, dict.fromkeys(bases, next(iter(bases.values()))), strength)


@pytest.mark.slow
@pytest.mark.parametrize("mode, wrong", [("hook", only_prompts), ("fused", first_basis_everywhere)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fault_that_only_shows_with_all_layers_or_in_decoding_is_found_there(mode, wrong, dtype, monkeypatch):
    monkeypatch.setitem(APPLIERS, mode, wrong)
    (fault,) = certified(dtype)["faults"]
    assert fault.startswith(f"{mode}: the error of the logits, decoded with all layers edited at once, is ")
    # A model that is too large to be loaded whole has no such figure, and the certificate says so.
    found = certified(dtype, whole=False)
    assert found["faults"] == [] and found["logits"][mode]["decoded"] is None
    assert found["sampled"]["decoded_whole"] is False


def broken_in(monkeypatch, name, change):
    """The faults of a certificate in which `change` was made to what certify.`name` returns at layer 3.

    Little is measured, as it does not matter what.
    """
    real, calls = getattr(certifying, name), []

    def wrong(*args):
        found = real(*args)
        calls.append(found)
        return change(found) if len(calls) == 2 else found

    monkeypatch.setattr(certifying, name, wrong)
    return certified(torch.bfloat16, prompts=2, new_tokens=1)["faults"]


def worse(rows, mode, key):
    rows[mode][key] = 1.5
    return rows


@pytest.mark.parametrize(
    "name, change, sentence",
    [
        (
            "check_outputs",
            lambda f: (worse(f[0], "lora", "error_over_bound"), f[1]),
            "layer 3: lora: the error against the exact edit is 1.5 times its bound",
        ),
        (
            "check_outputs",
            lambda f: (worse(f[0], "fused", "rule_a"), f[1]),
            "layer 3: fused: the error of the edit on the rounded output is 1.5 times its bound",
        ),
        (
            "check_outputs",
            lambda f: (f[0], [p | ({"error_over_bound": 1.5} if p["pair"] == ["hook", "lora"] else {}) for p in f[1]]),
            "layer 3: hook and lora: they differ by 1.5 times their bound",
        ),
        (
            "check_outputs",
            lambda f: (f[0], [p | ({"row_over_bound": 1.5} if p["pair"] == ["hook", "baked"] else {}) for p in f[1]]),
            "layer 3: hook and baked: they differ by 1.5 times their bound",
        ),
        (
            "check_tensor",
            lambda f: f | {"leak_over_floor": 1.5},
            "layer 3: baked weight: its leak is 1.5 times the floor (allowed: 1.1)",
        ),
        (
            "check_tensor",
            lambda f: f | {"error_over_bound": 1.5},
            "layer 3: baked weight: an element differs from the exact edit by 1.5 times its bound",
        ),
        ("check_tensor", lambda f: f | {"finite": False}, "layer 3: baked weight: it holds NaN or Inf"),
    ],
)
def test_each_figure_alone_breaks_the_certificate(name, change, sentence, monkeypatch):
    assert broken_in(monkeypatch, name, change) == [sentence]


@pytest.mark.parametrize(
    "key, what",
    [
        ("span_rule_a", "the error of the edit on rows inside the subspace"),
        ("span_leak", "the part of rows inside the subspace that the edit left"),
    ],
)
def test_each_figure_inside_the_subspace_alone_breaks_the_certificate(key, what, monkeypatch):
    real, calls = check_span, []

    def wrong(*args):
        calls.append(None)  # hook and fused, layer by layer: the fourth is fused at layer 3
        return real(*args) | ({key: 1.5} if len(calls) == 4 else {})

    monkeypatch.setattr(certifying, "check_span", wrong)
    faults = certified(torch.bfloat16, prompts=2, new_tokens=1)["faults"]
    assert faults == [f"layer 3: fused: {what} is 1.5 times its bound"]


@pytest.mark.parametrize("key", ["add", "norm"])
def test_each_figure_of_the_fused_layer_alone_breaks_the_certificate(key, monkeypatch):
    real = _Certifier.check_fused
    monkeypatch.setattr(_Certifier, "check_fused", lambda *args: real(*args) | {key: 1.5})
    faults = certified(torch.bfloat16)["faults"]
    assert faults == [f"layer {i}: fused: {LIMITS[key]} is 1.5 times its bound" for i in (2, 3, 4, 5)]


def test_hidden_states_logits_and_decoding_are_each_held_to_the_originals_error(monkeypatch):
    """With half the original's own error allowed, everything that is compared with it must complain, once a mode."""
    monkeypatch.setattr("kernel_surgery.certify.comparing.BESIDE_ORIGINAL", 0.5)
    faults = certified(torch.bfloat16)["faults"]
    for mode in ("hook", "fused", "baked", "lora"):
        hidden = [f for f in faults if f": {mode}: the error of the hidden states is " in f]
        assert len(hidden) == 1 and hidden[0].endswith(" times the original's")
        for words in ("the error of the logits is ", "the error of the logits, decoded "):
            assert sum(f.startswith(f"{mode}: {words}") for f in faults) == 1
    assert len(faults) == 12


def test_an_edit_that_takes_most_away_is_not_blamed_for_the_rounding_of_what_was_there(tmp_path):
    """W mostly inside span(U): the edited activations are a thousandth of those that were rounded."""
    model, bases = pico("llama", hidden_size=64, head_dim=16), {i: basis(64, 6, i) for i in (1, 2)}
    for i, u in bases.items():
        weight = model.model.layers[i].mlp.down_proj.weight.data
        weight.add_(999 * u @ (u.T @ weight))
    model.save_pretrained(tmp_path)
    subspace = Subspace(bases, fingerprint=fingerprint(model))
    for dtype in DTYPES[:2]:
        assert certified(dtype, tmp_path, subspace)["faults"] == []


def test_an_edit_that_never_runs_is_named(monkeypatch):
    @contextmanager
    def idle(model, bases, strength):
        (layer,) = bases
        yield replace(planted(layer), calls={layer: 0})

    monkeypatch.setitem(APPLIERS, "fused", at_one_layer(fused, idle))
    faults = certified(torch.bfloat16)["faults"]
    assert f"layer {WRONG_LAYER}: fused: the edit did not run" in faults


def test_a_fused_layer_that_hands_a_wrong_norm_on_is_named(monkeypatch):
    """The operator alone is right: only what the layer makes of it is not."""

    real = ops.project_add_rmsnorm

    def wrong(*given, **edit):
        h, n = real(*given, **edit)
        return h, n * 1.02

    monkeypatch.setattr(ops, "project_add_rmsnorm", wrong)
    faults = certified(torch.bfloat16)["faults"]
    assert any("layer 2: fused: the error of the norm that follows is" in f for f in faults)
    monkeypatch.setattr(ops, "project_add_rmsnorm", lambda o, r, *rest, **edit: real(o, 1.01 * r, *rest, **edit))
    faults = certified(torch.bfloat16)["faults"]
    assert any("layer 2: fused: the error of the edit with the residual addition is" in f for f in faults)


@pytest.mark.parametrize("mode", ["baked", "hook"])
def test_a_forgotten_bias_is_named(tmp_path, monkeypatch, mode):
    model = pico("llama", mlp_bias=True)
    for block in model.model.layers:
        block.mlp.down_proj.bias.data.normal_()
    model.save_pretrained(tmp_path)
    subspace = Subspace({i: basis(48, 5, i) for i in (2, 3)}, fingerprint=fingerprint(model))

    def forgets(model, bases, strength):
        (layer,) = bases
        down, u = model.model.layers[layer].mlp.down_proj, bases[layer]
        bias = down.bias.detach().clone()
        if mode == "hook":
            return with_output(lambda x, u, a: project_eager(x - bias, u, a) + bias)(model, bases, strength)
        assert not torch.equal(bake_weight(bias, u), bias)
        return with_weights(lambda w, b, u, a: [bake_weight(w, u, a), b])(model, bases, strength)

    monkeypatch.setitem(APPLIERS, mode, at_one_layer(RIGHT[mode], forgets))
    faults = certified(torch.float32, tmp_path, subspace)["faults"]
    assert faults and all(f.startswith((f"layer {WRONG_LAYER}: ", f"{mode}: ")) for f in faults), faults
    assert mode == "hook" or any("baked bias" in f for f in faults)


# --- faults planted in a baked checkpoint's files, hashes rewritten to match ---

DOWN = f"model.layers.{WRONG_LAYER}.mlp.down_proj.weight"
ON_DISK = {
    "P in bfloat16": lambda w, old, u: dense(old.float().T, Projection(u), 1.0).T,
    "skipped": lambda w, old, u: old,
    "U of another layer": lambda w, old, u: bake_weight(old, OTHER),
    "strength off by a percent": lambda w, old, u: bake_weight(old, u, 0.99),
    "one weight flipped": lambda w, old, u: torch.where(torch.arange(w.numel()).reshape(w.shape) == 999, -w, w),
}


@pytest.fixture(scope="module", params=everyday(DTYPES, torch.bfloat16), ids=lambda d: str(d).removeprefix("torch."))
def polyglot_baked(request, tmp_path_factory):
    """polyglot stored in a dtype, and baked."""
    folder = tmp_path_factory.mktemp("polyglot")
    load_model("polyglot", request.param).save_pretrained(folder / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "source" / name).write_bytes((POLYGLOT / name).read_bytes())
    bake_checkpoint(folder / "source", Subspace.load(SHIPPED), folder / "baked")
    return folder


def words(folder, *more):
    given = ("--model", folder / "source", "--baked", folder / "baked", "--subspace", SHIPPED, *more)
    return [str(w) for w in (*given, "--prompts", 4, "--new-tokens", 4)]


def test_the_certificate_of_a_checkpoint_is_written_with_its_plot(polyglot_baked, tmp_path, capsys):
    assert run(words(polyglot_baked, "--out", tmp_path / "c.json")) == 0
    said = capsys.readouterr().out
    certificate = json.loads((tmp_path / "c.json").read_text())
    assert certificate["faults"] == [] and len(certificate["tensors"]) == 4 and certificate["strength"] == 1
    model = certificate["model"]
    assert model["providers"]["baked"] == "weights on disk" and model["dtype"] in str(certificate["command"]) + said
    assert (
        "4 edited layers (2, 3, 4, 5), rank 10, strength 1: everything holds" in said
        and said.count("\n2 ") == 2
        and "Prompts: 4, test problems" in said
    )
    picture = (tmp_path / "c.svg").read_text()
    assert "<svg" in picture and "error / bound" in picture and 'href="http' not in picture
    page = (tmp_path / "c.html").read_text()
    assert "The edit was made exactly: every check holds." in page and "Largest error over its bound" in page
    assert "By layer" in page and page.count("<svg xmlns") == 3 and certificate["command"] in html.unescape(page)


@pytest.mark.slow
@pytest.mark.parametrize(
    "polyglot_baked, name", [(DTYPES[i % 3], name) for i, name in enumerate(ON_DISK)], indirect=["polyglot_baked"]
)
def test_a_fault_on_disk_is_found_and_its_layer_named_though_the_hashes_match(polyglot_baked, name, tmp_path, capsys):
    (file,) = (polyglot_baked / "baked").glob("*.safetensors")
    record = polyglot_baked / "baked" / "provenance.json"
    kept = file.read_bytes(), record.read_bytes()
    tensors, old = load_file(file), load_file(polyglot_baked / "source" / file.name)
    u = Subspace.load(SHIPPED).bases[WRONG_LAYER]
    changed = ON_DISK[name](tensors[DOWN], old[DOWN], u).to(old[DOWN].dtype).contiguous()
    try:
        save_file(tensors | {DOWN: changed}, file, metadata={"format": "pt"})
        rewritten = json.loads(record.read_text())
        rewritten["sha256"][file.name] = sha256(file)
        record.write_text(json.dumps(rewritten))
        assert run(words(polyglot_baked, "--out", tmp_path / "c.json")) == 1
    finally:
        file.write_bytes(kept[0])
        record.write_bytes(kept[1])
    faults = json.loads((tmp_path / "c.json").read_text())["faults"]
    print("\n".join(faults))
    assert f"fault: {faults[0]}" in capsys.readouterr().out
    assert all(f.startswith((f"layer {WRONG_LAYER}: ", "baked: ")) for f in faults)
    # Found twice: in the files, and by running them.
    assert any(DOWN in f for f in faults) and any("baked weight" in f for f in faults)


# --- what is sampled, what is refused ---


def test_prompts_are_of_one_length_in_many_languages():
    tokenizer = load_tokenizer("polyglot")
    ids, about = prompt_ids(tokenizer, 14, 0, 2048)
    assert ids.shape[0] == 14 and len({tuple(row) for row in ids.tolist()}) == 14
    assert about == f"test problems of {ids.shape[1]} tokens (zh, en, es, ar, ja, ko, sw), seed 0"
    assert torch.equal(prompt_ids(tokenizer, 14, 0, 2048)[0], ids)
    assert not torch.equal(prompt_ids(tokenizer, 14, 1, 2048)[0], ids)
    with pytest.raises(UserError, match=r"the tokenizer gives id \d+, but the model has only 64 tokens"):
        prompt_ids(tokenizer, 14, 0, 64)
    random, about = prompt_ids(None, 3, 5, 64)
    assert random.shape == (3, 32) and int(random.max()) < 64 and about == "random ids, seed 5"


def test_a_model_that_overflows_is_not_certified(tmp_path):
    model = pico("qwen2")
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e6)
    model.save_pretrained(tmp_path)
    subspace = Subspace({2: basis(48, 5)}, fingerprint=fingerprint(model))
    with pytest.raises(UserError, match=r"NaN or Inf in torch\.float16 from layer 1 on"):
        certified(torch.float16, tmp_path, subspace)


@pytest.mark.parametrize(
    "given, message",
    [
        ((), "give --model, --baked, --adapter or --restored"),
        (("--model", "polyglot", "--prompts", "0"), "--prompts must be at least 1"),
        (("--model", "polyglot", "--strength", "nan"), "--strength must be a finite number"),
        (("--model", str(POLYGLOT)), r"needs --subspace \(from kernel_surgery.fit\), or --baked"),
        (("--baked", ".", "--adapter", "."), "--baked and --adapter cannot be combined"),
        (("--adapter", "nowhere"), "no folder at 'nowhere'"),
        (("--model", "polyglot", "--new-tokens", "600"), "longer than the model's"),
    ],
)
def test_what_cannot_be_verified_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        run(list(given))


def test_a_configuration_does_not_change_what_runs_without_saying_so(tmp_path):
    """With eager attention and no mask a model would see the future; without a head it would be tied in silence."""
    model = pico("qwen2", tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    subspace = Subspace({2: basis(48, 5)}, fingerprint=fingerprint(model))
    plain = certified(torch.float32, tmp_path, subspace)["logits"]["original"]["rms"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    assert certified(torch.float32, tmp_path, subspace)["logits"]["original"]["rms"] == plain
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete: lm_head\.weight is missing"):
        certified(torch.float32, tmp_path, subspace)


@pytest.mark.parametrize("config", ["{nope", "[]", '{"model_type": "qwen2"}', None])
def test_a_configuration_that_cannot_be_used_is_one_clear_error(tmp_path, config):
    pico("qwen2").save_pretrained(tmp_path)
    if config is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json in .* cannot be used|has no config\.json"):
        run(["--model", str(tmp_path), "--subspace", str(SHIPPED)])


def test_a_checkpoint_is_certified_as_it_was_made(polyglot_baked, tmp_path):
    stored = json.loads((polyglot_baked / "source" / "config.json").read_text())["dtype"]
    other = "float16" if stored != "float16" else "bfloat16"
    with pytest.raises(UserError, match=f"certified in its own dtype, {stored}, not {other}"):
        run(words(polyglot_baked, "--dtype", other))
    with pytest.raises(UserError, match=r"was made at strength 1, not 0\.5"):
        run(words(polyglot_baked, "--strength", "0.5"))
    pico("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the subspace has d_model=128, but the model has 48"):
        run(["--model", str(tmp_path), "--subspace", str(SHIPPED)])


# --- the pieces ---


def test_logits_compared_block_by_block_are_those_compared_at_once():
    torch.manual_seed(0)
    p = torch.randn(12, 1000, dtype=torch.float64) * 5
    p[3] += 700  # exp overflows without the running maximum
    q = p + torch.randn(12, 1000, dtype=torch.float64) * 0.3
    blocks = LogitComparison(12, "cpu")
    for start in range(0, 1000, 64):
        blocks.add(p[:, start : start + 64], q[:, start : start + 64])
    found = blocks.figures()
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-9)
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=1e-9)
    assert found["rms"] == pytest.approx(float((p - q).square().mean().sqrt()))
    assert found["max"] == pytest.approx(float((p - q).abs().max()))
    assert found["top1"] == float((p.argmax(-1) == q.argmax(-1)).double().mean()) and 0 < found["top1"] < 1
    assert found["relative"] == pytest.approx(found["rms"] / float(p.var(-1, correction=0).mean().sqrt()), rel=1e-6)


def test_the_first_divergence_is_counted_in_new_tokens():
    p = torch.zeros(2 * 5, 3)
    p[:, 0] = 1
    q = p.clone()
    q[1, 2] = 5  # before the first new token: sequence 0, position 1
    q[5 + 4, 2] = 5  # sequence 1, position 4
    comparison = LogitComparison(10, "cpu")
    comparison.add(p, q)
    assert comparison.divergence(2, 2) == {"diverged": 1, "first": 2}
    assert comparison.divergence(2, 0) == {"diverged": 2, "first": 1}
    same = LogitComparison(10, "cpu")
    same.add(p, p)
    assert same.divergence(2, 2) == {"diverged": 0, "first": None} and same.figures()["kl_max"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_inside_the_subspace_tell_a_coarse_edit(dtype):
    u = basis(256, 10)
    x = span_rows(u, dtype)
    # Inside but for the rounding of what is stored.
    assert float((project_oracle(x, u).norm(dim=-1) / x.double().norm(dim=-1)).max()) < torch.finfo(dtype).eps
    right = check_span(project_eager(x, u), x, u, 1.0)
    assert set(right) == {"span_rule_a", "span_leak"} and max(right.values()) <= 1
    assert min(check_span(dense(x, Projection(u), 1.0), x, u, 1.0).values()) > 1
    assert set(check_span(project_eager(x, u, 0.5), x, u, 0.5)) == {"span_rule_a"}


def test_it_is_taken_with_whole_products_whatever_the_process_allows(monkeypatch):
    """cuBLAS may add a 16-bit product's parts in 16 bits, fifteen times what the bounds of a layer admit."""
    matmul, seen = torch.backends.cuda.matmul, []
    settings = lambda: (matmul.fp32_precision, matmul.allow_bf16_reduced_precision_reduction)  # noqa: E731
    real = greedy
    monkeypatch.setattr(certifying, "greedy", lambda *given: seen.append(settings()) or real(*given))
    torch.set_float32_matmul_precision("high")
    try:
        assert certified(torch.float32, prompts=1, new_tokens=1)["faults"] == []
        assert seen == [("ieee", False)] and settings() == ("tf32", True)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_polyglots_certificate_passes_on_the_gpu(dtype):
    """The same checks, with the Triton kernels in the fused mode."""
    found = certified(dtype, device="cuda")
    print(found["logits"])
    assert found["faults"] == [] and found["providers"]["fused"] == "triton/cuda"
    assert {r["norm"] > 0 for r in found["layers"] if r["mode"] == "fused"} == {True}
