"""A killed collection goes on where it was, to the same bytes; another one never takes its batches up."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from kernel_surgery.common.errors import CheckpointError, UserError
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.collecting import collect_activations, collect_moments, encode
from kernel_surgery.subspace.moments import Moments
from kernel_surgery.subspace.partial import GRACE_S, SHARE, Partial, check_partial, partial_folder, resuming
from tests.subspace.test_collecting import Characters
from tests.support.calls import call, one_thread
from tests.support.models import pico
from tests.test_golden import ROOT

LANGUAGES, BUDGET = ("en", "sw"), 100


class Stopped(Exception):
    pass


def stopping(model, after):
    """A hook that ends the run in batch `after` + 1, in the middle of the model; and the batches that began."""
    begun = []

    def hook(module, inputs):
        begun.append(1)
        if len(begun) > after:
            raise Stopped

    return model.model.layers[1].register_forward_pre_hook(hook), begun


KINDS = {"vectors": collect_activations, "moments": collect_moments}


OPTIONS = {"languages": LANGUAGES, "layers": "0-2", "batch_tokens": BUDGET, "about": {"seed": 0}}


def collect(kind, model, folder, said=None, **options):
    options = OPTIONS | options
    with resuming(folder, say=[].append if said is None else said.append) as partial:
        return KINDS[kind](model, Characters("left"), problems("fit", 1), partial=partial, **options)


def tensors(made):
    if hasattr(made, "vectors"):
        return {(lang, i): x for lang, by in made.vectors.items() for i, x in by.items()}
    return {(i, name): x for i, m in made.by_layer.items() for name, x in vars(m).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_with_the_batch_that_was_lost_to_the_same_bits(kind, tmp_path):
    model, whole = pico("qwen2"), collect(kind, pico("qwen2"), tmp_path / "whole")
    prompts = [p.prompts[language] for language in LANGUAGES for p in problems("fit", 1)]
    batches, ran, said = len(encode(Characters("left"), prompts, BUDGET)[1]), 0, []
    for after in (0, 1, 3):
        handle, begun = stopping(model, after)
        with pytest.raises(Stopped):
            collect(kind, model, tmp_path / "part", said)
        handle.remove()
        ran += len(begun)
    handle, begun = stopping(model, 1000)
    made = collect(kind, model, tmp_path / "part", said)
    handle.remove()
    assert batches > 4 and ran + len(begun) == batches + 3  # each of the three lost the batch it was in
    assert [line.split(": ")[1].split(" of ")[0] for line in said] == ["1", "4"]
    assert "batches are done; going on from there" in said[0]
    one, other = tensors(whole), tensors(made)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert made.provenance == whole.provenance


def test_other_options_weights_or_prompts_are_refused_and_named(tmp_path):
    folder, model = tmp_path / "part", pico("qwen2")
    handle, _ = stopping(model, 2)
    with pytest.raises(Stopped):
        collect("vectors", model, folder)
    handle.remove()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    cases = {
        "site is 'mlp_out' there, 'resid_post' here": ("vectors", model, {"site": "resid_post"}),
        "pool is 'last' there, 'mean' here": ("vectors", model, {"pool": "mean"}),
        "pool is 'last' there, 'tokens' here": ("moments", model, {}),
        r"languages is \['en', 'sw'\] there, \['en', 'zh'\] here": ("vectors", model, {"languages": ("en", "zh")}),
        r"layers is \[0, 1, 2\] there, \[0, 1\] here": ("vectors", model, {"layers": "0-1"}),
        "batch_tokens is 100 there, 101 here": ("vectors", model, {"batch_tokens": 101}),
        "seed is 0 there, 1 here": ("vectors", model, {"about": {"seed": 1}}),
        "the model's weights differ": ("vectors", pico("qwen2", seed=1), {}),
        "n_layers is 4 there, 3 here": ("vectors", pico("qwen2", num_hidden_layers=3), {}),
    }
    for message, (kind, other, options) in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            collect(kind, other, folder, **options)
        assert "To begin again, add --restart" in str(caught.value)
    with resuming(folder) as partial, pytest.raises(UserError, match="the prompts' tokens differ"):
        collect_activations(model, Characters("left"), problems("dev", 1), partial=partial, **OPTIONS)
    begun = json.loads(before["settings.json"])
    begun["environment"]["torch"] = "1.0"
    (folder / "settings.json").write_text(json.dumps(begun))
    with pytest.raises(UserError, match=r"torch is '1\.0' there"):
        collect("vectors", model, folder)
    (folder / "settings.json").write_bytes(before["settings.json"])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    collect("vectors", model, folder)  # with the same options it goes on


def test_a_folder_of_something_else_is_left_alone_also_by_restart(tmp_path):
    folder = tmp_path / "acts.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not an unfinished collection: it has no settings\.json"), resuming(
        folder, restart=True
    ):
        pass
    assert (folder / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="it is a file"):
        check_partial(tmp_path / "file", {})


def test_a_damaged_batch_is_named_and_restart_begins_again(tmp_path):
    model, folder = pico("qwen2"), tmp_path / "part"
    for kind, name in (("vectors", "batch-00000.safetensors"), ("moments", "moments.safetensors")):
        whole = collect(kind, model, folder)
        file = folder / name
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=rf"{name}' is damaged .* Add --restart"):
            collect(kind, model, folder)
        (folder / ".moments.safetensors.1.partial").write_text("of a kill")
        with resuming(folder, restart=True):
            assert not list(folder.iterdir())
        again = collect(kind, model, folder)
        assert all(torch.equal(x, tensors(again)[key]) for key, x in tensors(whole).items())
        with resuming(folder, restart=True):
            pass


def test_one_process_at_a_time(tmp_path):
    other = resuming(tmp_path / "part")
    with resuming(tmp_path / "part"), pytest.raises(CheckpointError, match="another process is collecting into"):
        other.__enter__()
    assert not (tmp_path / "part").exists()  # nothing was begun, nothing is left


@pytest.mark.parametrize("save_s, batch_s", [(0.001, 1.0), (0.005, 0.01), (0.2, 1.0), (3.0, 1.0), (1.0, 99.0)])
def test_moments_are_saved_as_often_as_a_twentieth_of_the_time_allows(tmp_path, save_s, batch_s):
    """On a clock that batches and saves move: the share of the time, and the most that a kill can lose."""
    now, saved = [0.0], []

    class Slow(Partial):
        def _write(self, name, tensors, metadata):
            now[0] += save_s
            saved.append((now[0], int(metadata["batches"])))

    partial, n = Slow(tmp_path, print, clock=lambda: now[0]), 400
    for number in range(n):
        now[0] += batch_s
        partial.add_moments(number + 1, {0: Moments.empty(2, 3)})
    share = (len(saved) * save_s - GRACE_S) / now[0]
    apart = [later - earlier for (_, earlier), (_, later) in itertools.pairwise(saved)]
    print(f"save {save_s} s, batch {batch_s} s: {share:.3f} of the time, {max(apart)} batches between saves")
    assert saved[0][1] == 1
    assert share <= SHARE + 2 * save_s / now[0]  # of the first and the last
    if save_s <= SHARE * batch_s or n * save_s <= GRACE_S:
        assert set(apart) == {1}  # a batch is lost at most
    else:
        assert 1 < max(apart) <= 1 + save_s / SHARE / batch_s


@pytest.mark.parametrize("pool", ["last", "tokens"])
def test_the_command_says_that_it_goes_on_and_restart_does_not(pool, tmp_path, monkeypatch):
    def interrupted(self, save, out):
        raise KeyboardInterrupt

    small = ["--problems", "1", "--batch-tokens", "128", "--device", "cpu", "--pool", pool]
    out, whole = tmp_path / "acts", tmp_path / "whole"
    with one_thread():
        assert call("collect", *small, "--out", whole)[0] == 0
        with monkeypatch.context() as inner:
            inner.setattr(Partial, "publish", interrupted)
            assert call("collect", *small, "--out", out)[0] == 130
        assert not out.exists() and partial_folder(out).is_dir()
        status, _, err = call("collect", *small, "--seed", "1", "--out", out)
        assert status == 2 and "seed is 0 there, 1 here" in err and "No file was written." in err
        status, _, err = call("collect", *small, "--out", out)
        said = rf"{out}\.partial: (\d+) of \1 batches are done; going on from there\n"
        assert status == 0 and re.fullmatch(said, err)
        assert out.read_bytes() == whole.read_bytes() and not partial_folder(out).exists()
        with monkeypatch.context() as inner:
            inner.setattr(Partial, "publish", interrupted)
            call("collect", *small, "--out", tmp_path / "again")
        assert call("collect", *small, "--restart", "--out", tmp_path / "again")[::2] == (0, "")
    assert (tmp_path / "again").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts", "again", "whole"]


def words(out, pool):
    options = "--problems 10 --layers 2-5 --batch-tokens 128 --device cpu"
    return ["--pool", pool, *options.split(), "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["last", "tokens"])
def test_ten_kills_lose_a_batch_each_at_most_and_no_byte(tmp_path, pool):
    with one_thread():
        assert call("collect", *words(tmp_path / "whole", pool))[0] == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = {}
    for name, kills in (("once", 0), ("killed", 10)):
        command = [sys.executable, "-m", "tests.support.killed", "7", str(kills), *words(tmp_path / name, pool)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        ran[name] = json.loads(done.stdout.splitlines()[-1])
        assert ran[name]["status"] == 0 and ran[name]["kills"] == kills, done.stderr
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole").read_bytes()
        assert not partial_folder(tmp_path / name).exists()
    lost = ran["killed"]["batches"] - ran["once"]["batches"]
    print(f"{pool}: {ran['once']['batches']} batches; 10 kills, {lost} batches were run again")
    assert ran["once"]["batches"] > 40 and 0 < lost <= 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "once", "whole"]
