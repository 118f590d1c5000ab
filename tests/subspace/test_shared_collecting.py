"""Several processes collect together: the same vectors as one, the same moments but for the order of the sums."""

import json
import re
from pathlib import Path

import pytest
import torch

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.problems.generator import problems
from kernel_surgery.subspace.collecting import prompt_states
from kernel_surgery.subspace.moments import load_moments
from kernel_surgery.subspace.partial import (
    SETTINGS,
    Partial,
    check_partial,
    partial_folder,
    refuse_other_launch,
    resuming,
)
from tests.subspace.test_collecting import Characters
from tests.subspace.test_partial import KINDS, OPTIONS, Stopped, collect, stopping, tensors
from tests.support.calls import call, one_thread
from tests.support.models import pico
from tests.support.processes import killed_when
from tests.support.ranks import run, torchrun
from tests.support.together import together

CHOSEN = problems("fit", 1)  # 7 batches
KEPT = 1, 2  # batches that each process finishes before it is killed


def shared(kind, size, out, said=None, prepare=lambda rank, model: None):
    """What `size` processes make of `out`, each with a model of its own, and which published it."""
    models = [pico("qwen2") for _ in range(size)]
    for rank, model in enumerate(models):
        prepare(rank, model)

    def work(ranks):
        folders = [partial_folder(out, ranks, rank) for rank in range(size)]
        say = [].append if said is None else said.append
        with resuming(partial_folder(out, ranks), say=say, ranks=ranks, folders=folders) as partial:
            made = KINDS[kind](models[ranks.rank], Characters("left"), CHOSEN, partial=partial, **OPTIONS)
            partial.publish(made.save, out)
            return made

    return together(size, work)


@pytest.mark.parametrize("size", [2, 3, 40])  # 40: more than there are batches
def test_vectors_are_one_processs_bit_for_bit(tmp_path, size):
    whole = collect("vectors", pico("qwen2"), tmp_path / "one.partial")
    whole.save(tmp_path / "one")
    for made in shared("vectors", size, tmp_path / "many"):
        want, got = tensors(whole), tensors(made)
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    assert not list(tmp_path.glob("many.*"))


def sums_of_magnitudes(languages, layer):
    """sum |x_i x_j| and, by language, sum |x_i| of what is counted, from the prompts one at a time; and how many."""
    model, tokenizer = pico("qwen2"), Characters("left")
    found, sums, count = 0.0, [], 0
    for language in languages:
        sums.append(0.0)
        for problem in CHOSEN:
            caught = []
            site = model.model.layers[layer].mlp.down_proj
            handle = site.register_forward_hook(lambda m, i, o, caught=caught: caught.append(o))
            prompt_states(model, tokenizer, [problem.prompts[language]], [layer])
            handle.remove()
            x = caught[0][0, 1:].double().abs()
            found, sums[-1], count = found + x.T @ x, sums[-1] + x.sum(0), count + len(x)
    return found, torch.stack(sums), count


def test_moments_are_the_same_bits_every_time_and_one_processs_up_to_the_order_of_the_sums(tmp_path):
    whole = tensors(collect("moments", pico("qwen2"), tmp_path / "one.partial"))
    for size in (2, 3):
        first, again = (shared("moments", size, tmp_path / f"{size}{name}") for name in "ab")
        assert (tmp_path / f"{size}a").read_bytes() == (tmp_path / f"{size}b").read_bytes()
        assert first[0].provenance["environment"]["processes"] == size
        for made in (*first, *again):
            got = tensors(made)
            assert got.keys() == whole.keys()
            assert all(torch.equal(got[key], tensors(first[0])[key]) for key in got)
    magnitudes, by_language, count = sums_of_magnitudes(OPTIONS["languages"], 1)
    got = tensors(shared("moments", 2, tmp_path / "c")[0])
    assert torch.equal(got[1, "counts"], whole[1, "counts"]) and float(whole[1, "counts"].sum()) == count
    for name, scale in (("second", magnitudes), ("sums", by_language)):
        # `collect_moments`: either order of the sums is off by n 2^-53 sum |x_i x_j| at most. The states themselves are
        # the same bits, because the batches are. The 1.001 is for the float32 states of a prompt alone.
        ratio = (got[1, name] - whole[1, name]).abs() / (1.001 * 2 * count * 2.0**-53 * scale)
        print(f"{name}: {float(ratio.max()):.2e} of the bound")
        assert ratio.max() <= 1
    kept = tensors(load_moments(tmp_path / "c"))
    off = kept[1, "second"] * (1 - 1e-9)  # far less than one token
    assert ((off - whole[1, "second"]).abs() / (2 * count * 2.0**-53 * magnitudes)).max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_killed_processes_go_on_where_each_was_to_the_same_bytes(tmp_path, kind):
    shared(kind, 2, tmp_path / "whole")
    begun = {}

    def stop(rank, model):
        begun[rank] = stopping(model, KEPT[rank])[1]

    found = shared(kind, 2, tmp_path / "out", prepare=stop)
    assert all(isinstance(one, Stopped) for one in found) and not (tmp_path / "out").exists()

    def count(rank, model):
        begun[rank] = stopping(model, 10**6)[1]

    said = []
    shared(kind, 2, tmp_path / "out", said, prepare=count)
    done = {line.split(":")[0].split(".")[-2]: re.search(r"(\d+) of (\d+) batches are done", line) for line in said}
    assert {rank: int(found[1]) for rank, found in done.items()} == {"0-of-2": 1, "1-of-2": 2}
    assert [len(begun[rank]) for rank in (0, 1)] == [int(done[f"{rank}-of-2"][2]) - KEPT[rank] for rank in (0, 1)]
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


def test_moments_that_were_too_costly_to_keep_after_every_batch_are_kept_at_the_end(tmp_path, monkeypatch):
    shared("moments", 2, tmp_path / "whole")
    for name in ("GRACE_S", "SHARE"):  # after the first save, none is worth its time
        monkeypatch.setattr(f"kernel_surgery.subspace.partial.{name}", 0.0)
    shared("moments", 2, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()


def begin(out, ranks):
    folder = partial_folder(out, ranks)
    folder.mkdir()
    Partial(folder, lambda line: None, ranks=ranks).begin({"seed": 0}, 4)
    return folder


def test_another_number_of_processes_is_refused_and_restart_begins_again(tmp_path):
    out = tmp_path / "acts"
    begin(out, ALONE)
    with pytest.raises(UserError, match=r"acts\.partial' holds an unfinished collection of 1 process, and this is"):
        refuse_other_launch(out, Ranks(0, 2))
    assert together(2, lambda ranks: refuse_other_launch(out, ranks, restart=True)) == [None, None]
    assert not partial_folder(out).exists()
    folders = [begin(out, Ranks(rank, 2)) for rank in (0, 1)]
    assert json.loads((folders[1] / SETTINGS).read_text()) == {"seed": 0, "processes": 2}
    for ranks, word in ((ALONE, "1"), (Ranks(0, 3), "3")):
        with pytest.raises(UserError, match=rf"0-of-2\.partial' .* of 2 processes, and this is a launch of {word}\. "):
            refuse_other_launch(out, ranks)
    refuse_other_launch(tmp_path / "other", ALONE)
    refuse_other_launch(tmp_path / "none" / "other", ALONE)
    (tmp_path / "acts.9-of-9.partial").mkdir()  # not ours: it has no settings
    assert together(2, lambda ranks: refuse_other_launch(out, ranks)) == [None, None]
    check_partial(folders[0], {"seed": 0})
    refuse_other_launch(out, ALONE, restart=True)
    assert {path.name for path in tmp_path.iterdir()} == {"acts.9-of-9.partial"}


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["last", "tokens"])
def test_two_real_processes_killed_and_started_again_write_what_one_does(tmp_path, pool):
    options = ["--pool", pool, "--problems", "8", "--layers", "2-5", "--batch-tokens", "128", "--languages", "en,zh,sw"]

    def words(out: Path) -> list[str]:
        return torchrun("-m", "kernel_surgery.collect", *options, "--out", str(out))

    out = tmp_path / "acts"
    folders = [partial_folder(out, Ranks(rank, 2)) for rank in (0, 1)]
    killed_when(words(out), tmp_path, lambda: all(any(folder.glob("*.safetensors")) for folder in folders))
    assert not out.exists() and all((folder / SETTINGS).is_file() for folder in folders)
    done = run(words(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("batches are done; going on from there") == 1  # process 0's; the other is silent
    assert done.stdout.count("40 problems x 3 languages x 4 layers") == 1
    assert not any(folder.exists() for folder in folders)
    with one_thread():
        assert call("collect", *options, "--out", tmp_path / "one")[0] == 0
    if pool == "last":
        assert out.read_bytes() == (tmp_path / "one").read_bytes()
        return
    assert run(words(tmp_path / "again"), cwd=tmp_path).returncode == 0
    assert out.read_bytes() == (tmp_path / "again").read_bytes()
    many, one = (load_moments(file).by_layer for file in (out, tmp_path / "one"))
    for layer, there in one.items():
        # As above; by Cauchy and Schwarz, sum |x_i x_j| is at most the root of sum x_i^2 times that of sum x_j^2.
        n, roots = there.total, there.second.diagonal().sqrt()
        unit = 2 * n * 2.0**-53
        assert ((many[layer].second - there.second).abs() <= unit * torch.outer(roots, roots)).all()
        assert ((many[layer].sums - there.sums).abs() <= unit * n**0.5 * roots).all()
        assert torch.equal(many[layer].counts, there.counts)

