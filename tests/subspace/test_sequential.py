"""Fitting layer by layer: what it leaves in the whole model, what a kill costs, and the memory it needs."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from kernel_surgery import Subspace, collect_moments, fit, fit_subspace, hooked
from kernel_surgery.common.errors import ModelError, SubspaceError, UserError
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.models.load import POLYGLOT, load_model, load_tokenizer
from kernel_surgery.numerics.projection import Projection
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace import sequential
from kernel_surgery.subspace.erasing import erasing_edit
from kernel_surgery.subspace.partial import partial_folder, resuming
from kernel_surgery.subspace.sequential import batches_of, edited, fit_sequentially

LAYERS = [2, 3, 4, 5]
LANGS = ("zh", "en", "sw")


@pytest.fixture(scope="module")
def polyglot():
    return load_model("polyglot", torch.float32), load_tokenizer("polyglot"), problems("fit", 4)


def fitted(tokenizer, chosen, **options):
    return fit_sequentially(Layerwise(POLYGLOT, torch.float32), tokenizer, chosen, LANGS, LAYERS, **options)


def measured(model, tokenizer, chosen, edit):
    """The moments at every edited layer of the whole model with an edit in force, after the edit itself.

    `collect_moments` hooks `down_proj` after the edit does.
    """
    with ExitStack() as stack:
        if edit is not None:
            stack.enter_context(hooked(model, edit, force=True))
        return collect_moments(model, tokenizer, chosen, LANGS).by_layer


@pytest.mark.parametrize("method", ["oblique", "leace"])
def test_with_all_edits_on_nothing_is_left_at_any_site_where_independent_fits_leave_much(polyglot, method):
    model, tokenizer, chosen = polyglot
    original = collect_moments(model, tokenizer, chosen, LANGS)
    cov = {layer: original.by_layer[layer].label_covariance.norm() for layer in LAYERS}
    one_by_one = fit_subspace(original, method=method, layers=LAYERS)
    in_order = fitted(tokenizer, chosen, method=method)
    left = {}
    for name, edit in (("independent", one_by_one), ("sequential", in_order)):
        after = measured(model, tokenizer, chosen, edit)
        left[name] = [float(after[i].label_covariance.norm() / cov[i]) for i in LAYERS]
        print(method, name, " ".join(f"{x:.1e}" for x in left[name]))
    # The first layer has the same edit either way. What is left is float32 rounding of the edit and its activations.
    assert max(left["sequential"]) <= 1e-4 and left["independent"][0] <= 1e-4
    assert min(left["independent"][1:]) > 100 * max(left["sequential"])
    for layer, own in in_order.fit["sequential"].items():
        assert 0 <= own <= 1e-4 and int(layer) in LAYERS
    assert in_order.form == ("affine" if method == "leace" else "oblique")
    assert sum(in_order.fit["tokens"].values()) == int(original.by_layer[2].total)


def test_the_edits_are_those_fitted_with_hooks_on_the_whole_model(polyglot):
    """The same fit by other code: one layer after the other, on the loaded model with the edits so far hooked in."""
    model, tokenizer, chosen = polyglot
    edits: dict[int, Projection] = {}
    for layer in LAYERS:
        with ExitStack() as stack:
            if edits:
                stack.enter_context(hooked(model, edits))
            moments = collect_moments(model, tokenizer, chosen, LANGS, str(layer)).by_layer[layer]
        edits[layer] = erasing_edit(moments)[0]
    own = fitted(tokenizer, chosen)
    for layer in LAYERS:
        p, q = (e.basis.double() @ e.reads.double().T for e in (edits[layer], own.projections[layer]))
        difference = float((p - q).norm() / p.norm())
        # Batches with padding and without differ by float32 rounding, which the fit amplifies by norm(A) norm(B).
        bound = 2.0**-24 * 256 * float(edits[layer].basis.norm() * edits[layer].reads.norm())
        print(f"layer {layer}: {difference:.1e}, error/bound {difference / bound:.2f}")
        assert difference <= bound


def test_an_edit_that_is_not_made_before_the_next_layer_is_seen(polyglot, monkeypatch):
    """The guard of the first test: without its edit, a layer's successors see the original's activations."""
    _, tokenizer, chosen = polyglot
    monkeypatch.setattr(sequential, "edited", lambda y, edit: y)
    edit = fitted(tokenizer, chosen)
    assert min(edit.fit["sequential"].values()) == 1.0
    monkeypatch.undo()
    assert max(fitted(tokenizer, chosen).fit["sequential"].values()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edited_row_is_the_exact_edit_with_one_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(7, 24, generator=generator).to(dtype)
    a, b, c = (torch.randn(s, generator=generator) for s in ((24, 3), (24, 3), (3,)))
    exact = y.double() - (y.double() @ b.double() - c.double()) @ a.double().T
    size = (y.double().abs() @ b.double().abs() + c.double().abs()) @ a.double().abs().T
    # One rounding to the dtype, and float32 sums of 24 and of 3 terms.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 30 * 2.0**-24 * (size + y.double().abs())
    error = (edited(y, Projection(a, b, c)).double() - exact).abs()
    print(f"error/bound {float((error / bound).max()):.2f}")
    assert bool((error <= bound).all())


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 2, 4, 5])
def test_a_fit_that_is_killed_goes_on_at_its_layer_and_writes_the_same_bytes(polyglot, tmp_path, monkeypatch, at):
    _, tokenizer, chosen = polyglot
    whole, out, ran = tmp_path / "whole", tmp_path / "again", []
    real = Layerwise.layer

    def watched(self, index):
        ran.append(index)
        if armed and index == at:
            raise Killed
        return real(self, index)

    def run(path):
        with resuming(partial_folder(path)) as kept:
            kept.publish(fitted(tokenizer, chosen, partial=kept).save, path)

    armed = False
    run(whole)
    monkeypatch.setattr(Layerwise, "layer", watched)
    armed = True
    with pytest.raises(Killed):
        run(out)
    assert not out.exists() and ran == list(range(at + 1))
    armed = False
    ran.clear()
    run(out)
    assert ran == list(range(at, 6)) and not partial_folder(out).exists()
    # The environment has the time of nothing: equal fits give equal files.
    assert out.read_bytes() == whole.read_bytes()


def test_another_fit_does_not_go_on_from_there(polyglot, tmp_path):
    _, tokenizer, chosen = polyglot
    out = tmp_path / "s"
    with resuming(partial_folder(out)) as kept:
        fitted(tokenizer, chosen, partial=kept)
    with pytest.raises(UserError, match="rank is None there, 1 here"), resuming(partial_folder(out)) as kept:
        fitted(tokenizer, chosen, rank=1, partial=kept)


def test_prompts_of_one_length_are_batched_within_the_budget():
    encoded = [[0] * n for n in (5, 3, 5, 5, 9, 3)]
    batches = batches_of(encoded, 10)
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    for batch in batches:
        lengths = {len(encoded[i]) for i in batch}
        assert len(lengths) == 1 and (len(batch) * lengths.pop() <= 10 or len(batch) == 1)
    assert [len(batch) for batch in batches] == [2, 2, 1, 1]


def test_what_cannot_be_fitted_is_said(polyglot, tmp_path):
    _, tokenizer, chosen = polyglot
    with pytest.raises(SubspaceError, match="cannot fit 'deviations' layer by layer; known: leace, oblique"):
        fitted(tokenizer, chosen, method="deviations")
    with pytest.raises(SubspaceError, match="at least two languages, got zh"):
        fit_sequentially(Layerwise(POLYGLOT, torch.float32), tokenizer, chosen, ("zh",), LAYERS)
    reader = Layerwise(POLYGLOT, torch.float32)
    reader.config.max_position_embeddings = 8
    with pytest.raises(ModelError, match="the model has 8 positions"):
        fit_sequentially(reader, tokenizer, chosen, LANGS, LAYERS)
    for words, said in (
        (["--sequential"], "--sequential needs --model"),
        (["--sequential", "--model", "polyglot", "--activations", "x"], "leave out --activations"),
        (["--sequential", "--model", "polyglot", "--method", "centroids"], "is for --method leace and oblique"),
        (["--sequential", "--model", "polyglot", "--languages", "en"], "at least two languages"),
        (["--sequential", "--model", "polyglot", "--batch-tokens", "0"], "must be at least 1"),
        (["--model", "polyglot", "--activations", "x"], "--model is for --sequential"),
        ([], "--activations is missing"),
    ):
        with pytest.raises(UserError, match=said):
            fit.run([*words, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_subspace_and_says_what_is_left(tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    words = ["--sequential", "--model", "polyglot", "--problems", "1", "--languages", "en,zh", "--rank", "1"]
    assert fit.run([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].strip() for line in said[:4]] == ["L2", "L3", "L4", "L5"]
    assert said[4].endswith("another text, another layer or a probe may still tell the language")
    assert said[5].endswith("polyglot, layers 2-5 of 8, site mlp_out, d_model 128")
    assert said[6].startswith("fit    oblique, layer by layer, rank 1, ")
    subspace = Subspace.load(out)
    assert subspace.rank == 1 and subspace.fit["split"] == "fit" and set(subspace.fit["tokens"]) == {"en", "zh"}
    assert subspace.fit["command"].startswith("fit --sequential --rank 1 --method oblique")
    subspace.check_model(load_model("polyglot", torch.float32))


MEMORY = """
import json, os, sys, torch
from pathlib import Path
from kernel_surgery.models.layerwise import Layerwise
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace import sequential
from kernel_surgery.subspace.sequential import fit_sequentially

def now(name):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

class Bytes:
    def __call__(self, text):
        return type("Ids", (), {"input_ids": list(text.encode())[:64]})

def measured(folder, layers):
    reader, chosen = Layerwise(Path(folder), torch.float32), problems("fit", 2)
    # Once before, so that what is allocated for good, such as buffers of the linear algebra, is there.
    fit_sequentially(reader, Bytes(), chosen[:2], ("en", "zh"), [0], rank=1, batch_tokens=512)
    before = now("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    shared = now("VmRSS") - before
    fit_sequentially(reader, Bytes(), chosen, ("en", "zh"), list(range(1, layers)), rank=1, batch_tokens=512)
    return now("VmHWM") - shared - before

torch.set_num_threads(1)
for folder, layers in json.loads(sys.argv[1]).items():
    if os.fork() == 0:  # both from the same state: what is imported, and nothing that the other has allocated
        print(json.dumps([layers, measured(folder, layers)]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        sys.exit(f"{layers} layers: failed")
"""


@pytest.mark.slow
def test_the_peak_memory_is_two_layers_and_the_activations_at_8_and_at_32_layers(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    d, wide = 256, 1024
    folders = {str(tmp_path / str(layers)): layers for layers in (8, 32)}
    for folder, layers in folders.items():
        config = AutoConfig.for_model(
            "llama",
            hidden_size=d,
            intermediate_size=wide,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            vocab_size=256,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    # Every large block is mapped and unmapped for itself: what was freed, in pieces, is not counted.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", MEMORY, json.dumps(folders)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    peaks = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    layer = 4 * (4 * d * d + 3 * d * wide)
    prompts, tokens = 10 * 2, 64
    # Hidden states before and after a layer; moments of two passes and their eigenvectors, all [d, d] float64; one
    # batch of the MLP: gate, up, their product and what SiLU makes of it, [512, wide] float32.
    activations = 2 * prompts * tokens * d * 4 + 8 * 8 * d * d + 4 * 512 * wide * 4
    print({n: f"{peak / 1e6:.0f} MB" for n, peak in peaks.items()}, f"bound {(2 * layer + activations) / 1e6:.0f} MB")
    assert max(peaks.values()) <= 2 * layer + activations
    # 24 layers more do not need the memory of one.
    assert peaks[32] - peaks[8] < layer and peaks[8] > layer / 2
