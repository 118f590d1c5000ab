"""A baked checkpoint is the original with the edit in it and nothing else changed; a failure leaves nothing behind."""

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file, save_file

from kernel_surgery.certify.files import verify_adapter, verify_checkpoint
from kernel_surgery.checkpoint import baking
from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
from kernel_surgery.checkpoint.record import by_layer, title_of
from kernel_surgery.common.errors import UserError
from kernel_surgery.edit.baked import remove
from kernel_surgery.files import hashing, tensorfile
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.load import load_model
from kernel_surgery.numerics.bounds import baked_element_bound, leak_floor, undo_bound, worst_ratio
from kernel_surgery.numerics.oracle import bake_oracle, leak_of_weight
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis, pico


@pytest.fixture(params=["single", "sharded"])
def source(request, tmp_path):
    model = pico("qwen2", dtype=torch.bfloat16)
    folder = tmp_path / "source"
    model.save_pretrained(folder, max_shard_size="20KB" if request.param == "sharded" else "5GB")
    (folder / "notes.txt").write_text("travels along")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "sharded")
    return folder


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def space(folder, layers=(1, 2), d=None):
    """A subspace that says it was fitted on the checkpoint in `folder`."""
    model = load_model(str(folder), torch.bfloat16)
    d = d or model.config.hidden_size
    return Subspace(bases={i: basis(d, 4, i) for i in layers}, site="mlp_out", fingerprint=fingerprint(model))


def test_edited_tensors_are_right_and_all_others_are_byte_equal(source, tmp_path):
    before = {f.name: sha256(f) for f in source.iterdir() if f.is_file()}
    old = tensors(source)
    subspace = space(source)
    norms = bake_checkpoint(source, subspace, tmp_path / "baked")
    new = tensors(tmp_path / "baked")
    assert set(new) == set(old)
    edited = {f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)}
    assert set(norms) == edited
    for name in old:
        if name not in edited:
            assert torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype
            continue
        u = subspace.bases[int(name.split(".")[2])]
        ratio = worst_ratio(
            (new[name].double() - bake_oracle(old[name], u, 1.0)).abs(), baked_element_bound(old[name], u, 1.0)
        )
        leak = float(leak_of_weight(new[name], old[name], u, 1.0))
        floor = float(leak_floor(new[name], old[name], u))
        print(f"{name}: error/bound {ratio:.2f}, leak {leak:.2e}, floor {floor:.2e}, ratio {leak / floor:.2f}")
        assert ratio <= 1 and new[name].dtype == torch.bfloat16
    assert {f.name: sha256(f) for f in source.iterdir() if f.is_file()} == before
    assert (tmp_path / "baked" / "notes.txt").read_text() == "travels along"
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["layers"] == [1, 2] and record["strength"] == 1.0
    assert all(sha256(tmp_path / "baked" / n) == h for n, h in record["sha256"].items())
    assert load_model(str(tmp_path / "baked"), torch.bfloat16) is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baked", "source"]


def refused(source, destination, subspace, error, message, **options):
    before = {f.name: sha256(f) for f in source.iterdir() if f.is_file()}
    there = sorted(p.name for p in destination.parent.iterdir())
    with pytest.raises(error, match=message):
        bake_checkpoint(source, subspace, destination, **options)
    assert sorted(p.name for p in destination.parent.iterdir()) == there
    assert {f.name: sha256(f) for f in source.iterdir() if f.is_file()} == before


def test_nothing_that_a_layer_needed_outlives_it(source, tmp_path, monkeypatch):
    """A small tensor kept from every layer, between the large ones, would hold the heap up: 500 MB after 32 layers."""

    real, kept = remove, []

    def watched(*args):
        assert [reference() for reference in kept] == [None] * len(kept)
        made = real(*args)
        kept.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(baking, "remove", watched)
    bake_checkpoint(source, space(source), tmp_path / "baked")
    assert len(kept) == 4


def test_refusals_leave_nothing_behind(source, tmp_path):
    good = space(source)
    bake_checkpoint(source, good, tmp_path / "once")
    refused(source, tmp_path / "once", good, FileExistsError, "already exists. Choose another --out")
    refused(tmp_path / "once", tmp_path / "twice", good, ValueError, "was baked before")
    undo_checkpoint(tmp_path / "once", tmp_path / "restored")
    bake_checkpoint(tmp_path / "restored", good, tmp_path / "again", force=True)  # it has no edit
    assert json.loads((tmp_path / "again" / "provenance.json").read_text())["kind"] == "baked"
    (tmp_path / "once" / "provenance.json").unlink()
    refused(tmp_path / "once", tmp_path / "twice", good, ValueError, "measured on other weights")
    out_of_range = space(source, (1, 40))
    missing = r"holds layer 40, but the model has 4 layers"
    refused(source, tmp_path / "new", out_of_range, ValueError, missing)
    for force in (False, True):
        message = "d_model=50, but the model has 48"
        refused(source, tmp_path / "new", space(source, d=50), ValueError, message, force=force)


@pytest.mark.parametrize("fault, message", [("nan", "holds NaN or Inf"), ("int8", "stored as I8")])
def test_weights_that_cannot_be_edited_are_refused(source, tmp_path, fault, message):
    name = "model.layers.2.mlp.down_proj.weight"
    file = next(f for f in source.glob("*.safetensors") if name in load_file(f))
    content = load_file(file)
    subspace = space(source)
    if fault == "nan":
        content[name][1, 1] = float("nan")
    else:
        content[name] = content[name].to(torch.int8)
    save_file(content, file, metadata={"format": "pt"})
    refused(source, tmp_path / "new", subspace, ValueError, message, force=True)


def test_damaged_files_and_full_disks_are_named(source, tmp_path, monkeypatch):
    subspace = space(source)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("write_tensor", "copy_range"):
        monkeypatch.setattr(baking, name, full)
        refused(source, tmp_path / "new", subspace, ValueError, r"cannot write .*new.*No space left")
        monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(source, tmp_path / "new", subspace, ValueError, r"new' needs [\d.]+ kB, but .* has only 1\.0 kB left")
    monkeypatch.undo()
    file = next(source.glob("*.safetensors"))
    whole = file.read_bytes()
    for damage, why in {
        whole[:1000]: "header|tensors end",
        whole[:-1]: "tensors end at byte",
        whole + b"0": "tensors end at byte",
        whole[:8] + b"}" + whole[9:]: "its header is invalid",
        whole.replace(b"[0,", b"[2,", 1): "does not fit its shape",
        b"": "shorter than a header",
    }.items():
        file.write_bytes(damage)
        message = rf"{file.name}' cannot be read as safetensors \(.*({why})"
        refused(source, tmp_path / "new", subspace, ValueError, message)


def test_a_basis_of_another_site_is_said_in_the_provenance(source, tmp_path):
    from dataclasses import replace

    bake_checkpoint(source, replace(space(source), site="resid_post"), tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["note"] == "resid_post basis applied at mlp_out"


def test_an_exception_half_way_leaves_no_destination_and_the_next_run_is_clean(source, tmp_path, monkeypatch):
    subspace = space(source)
    monkeypatch.setattr(baking, "write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    refused(source, tmp_path / "new", subspace, KeyboardInterrupt, None)
    monkeypatch.undo()
    # What a kill leaves: the sibling with the deterministic name. A rerun replaces it.
    (tmp_path / ".new.baking").mkdir()
    (tmp_path / ".new.baking" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".new.baking" / "half.txt").write_bytes(b"half")
    bake_checkpoint(source, subspace, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "source"]
    made = {"README.md", "kernel_surgery", "provenance.json"}
    assert {p.name for p in (tmp_path / "new").iterdir()} == {p.name for p in source.iterdir()} | made


def test_the_same_weights_are_not_baked_twice_even_without_provenance(source, tmp_path):
    subspace = space(source)
    bake_checkpoint(source, subspace, tmp_path / "once")
    (tmp_path / "once" / "provenance.json").unlink()
    shutil.rmtree(tmp_path / "once" / "kernel_surgery")
    message = "no more of the subspace than rounding leaves"
    refused(tmp_path / "once", tmp_path / "twice", subspace, ValueError, message, force=True)
    # Another subspace, or another strength, is another edit.
    bake_checkpoint(tmp_path / "once", subspace, tmp_path / "half", strength=0.5, force=True)
    other = Subspace(bases={i: basis(48, 4, 10 + i) for i in (1, 2)}, site="mlp_out")
    bake_checkpoint(tmp_path / "once", other, tmp_path / "other", force=True)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: other\nlicense_name: a-licence\ntags: [x]\n---\n# m", ["other", "a-licence"]),
        ("---\nlicense: [a, b]\n---\n", []),  # not as the hub has it
        ("---\nlicense: [\n---\n", []),  # no YAML
        ("---\n- a\n---\n", []),
        ("# no header", []),
        (None, []),
    ],
)
def test_the_card_has_the_licence_of_the_original(card, expected, source, tmp_path):
    if card is not None:
        (source / "README.md").write_text(card)
    bake_checkpoint(source, space(source), tmp_path / "baked", model_id="org/model")
    write_adapter(source, space(source), tmp_path / "adapter", model_id="org/model")
    keys = ["base_model", "license", "license_name"]
    for folder in ("baked", "adapter"):
        header = metadata_load(tmp_path / folder / "README.md")
        assert [header[key] for key in keys if key in header] == ["org/model", *expected]


@pytest.mark.parametrize("write", [bake_checkpoint, write_adapter])
def test_a_subspace_that_was_forced_on_a_model_is_named_wherever_the_folder_goes(write, source, tmp_path):
    own, verify = space(source), verify_adapter if write is write_adapter else verify_checkpoint
    write(source, own, tmp_path / "right", force=True)
    assert "forced" not in json.loads((tmp_path / "right" / "provenance.json").read_text())
    another = pico("qwen2", dtype=torch.bfloat16, seed=9)
    other = replace(own, model_id="org/other", fingerprint=fingerprint(another))
    for name, subspace, said in (
        ("other", other, "The subspace is fitted on org/other, and was forced on these weights: it was"),
        ("bare", replace(own, fingerprint=None, model_id=None), "The subspace is of unknown origin, and was forced on"),
    ):
        write(source, subspace, tmp_path / name, force=True)
        assert f"\n**{said}" in (tmp_path / name / "README.md").read_text()
        certificate = verify(tmp_path / name, source)
        assert certificate["faults"] == [] and certificate["remarks"][0].startswith(said)
    assert "was forced" not in (tmp_path / "right" / "README.md").read_text()


@pytest.mark.parametrize("write", [bake_checkpoint, write_adapter])
def test_a_folder_has_a_name_on_the_hub_if_one_is_given(write, source, tmp_path):
    write(source, space(source), tmp_path / "new", base="org/model")
    assert metadata_load(tmp_path / "new" / "README.md")["base_model"] == "org/model"
    assert json.loads((tmp_path / "new" / "provenance.json").read_text())["base"] == "org/model"
    if write is write_adapter:
        config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "org/model" and verify_adapter(tmp_path / "new")["faults"] == []
        write(source, replace(space(source), revision="abc"), tmp_path / "pinned", base="org/model")
        assert "vllm serve org/model --revision abc --enable-lora" in (tmp_path / "pinned" / "README.md").read_text()
    for name in ("model", "a/b/c", str(source)):
        with pytest.raises(UserError, match="--base-model must be a hub id such as Qwen/"):
            write(source, space(source), tmp_path / "no", base=name)
    assert not (tmp_path / "no").exists()


def test_a_card_says_removed_only_at_strength_1_in_every_layer():
    record = {"layers": [1, 2], "strength": 1.0}
    assert title_of(record) == "language subspace removed" and by_layer(record) == ""
    assert title_of(record | {"strength": 0.5}) == "language subspace edited at strength 0.5"
    scheduled = record | {"schedule": {"2": 0.5}}
    assert title_of(scheduled) == "language subspace edited at strength 1" and "`schedule`" in by_layer(scheduled)


@pytest.mark.parametrize("strength", [1.0, 2.0, -0.5])
def test_undo_gives_the_weights_back_to_within_a_rounding_and_the_rest_to_the_byte(source, tmp_path, strength):
    (source / "README.md").write_text("# the original's card")
    subspace, old = space(source), tensors(source)
    bake_checkpoint(source, subspace, tmp_path / "baked", strength=strength)
    card = (tmp_path / "baked" / "README.md").read_text()
    assert "base_model" not in card, "a folder's name means nothing on another machine"
    done = "removed" if strength == 1 else f"edited at strength {strength:g}"
    assert f"# {source.name}, language subspace {done}\n" in card and str(tmp_path) not in card
    middle = tensors(tmp_path / "baked")
    undo_checkpoint(tmp_path / "baked", tmp_path / "restored")
    new = tensors(tmp_path / "restored")
    for name, weight in old.items():
        if "down_proj" not in name or int(name.split(".")[2]) not in (1, 2):
            assert torch.equal(new[name], weight)
            continue
        bound = undo_bound(weight, middle[name], subspace.bases[int(name.split(".")[2])], strength)
        ratio = worst_ratio((new[name].double() - weight.double()).abs(), bound)
        changed = worst_ratio((middle[name].double() - weight.double()).abs(), bound)
        print(f"{name}: restored to {ratio:.2f} of the bound, baked was {changed:.1f} away")
        assert ratio <= 1 < changed
    left = {f.name for f in (tmp_path / "restored").iterdir()} - {"provenance.json", "kernel_surgery"}
    assert left == {f.name for f in source.iterdir()}
    for name in left:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "restored" / name).read_bytes() == (source / name).read_bytes()
    # What was added after baking is about the edited weights.
    (tmp_path / "baked" / "certificate.json").write_text("{}")
    undo_checkpoint(tmp_path / "baked", tmp_path / "again")
    assert {f.name for f in (tmp_path / "again").iterdir()} == {f.name for f in (tmp_path / "restored").iterdir()}
    with pytest.raises(ValueError, match=r"not a checkpoint from .*\.bake\. verify takes it as --restored\."):
        undo_checkpoint(tmp_path / "restored", tmp_path / "no")
    file = next((tmp_path / "baked").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was written"):
        undo_checkpoint(tmp_path / "baked", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_weights_in_other_formats_are_left_out_and_named(source, tmp_path):
    """They are the original's, unedited; some engines would load them instead."""
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf"):
        (source / name).write_bytes(b"unedited")
    bake_checkpoint(source, space(source), tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert record["left_out"] == ["consolidated.safetensors", "model.gguf", "pytorch_model.bin"]
    assert not {f.name for f in (tmp_path / "baked").iterdir()} & set(record["left_out"])


@pytest.mark.parametrize("how", ["reflink", "copy_file_range", "read and write"])
def test_a_file_is_copied_whole_whatever_the_filesystem_offers(source, tmp_path, how, monkeypatch):
    if how == "reflink":  # what the ioctl would do, on a filesystem that has none

        def share(one, other):
            os.pwrite(other, os.pread(one, os.fstat(one).st_size, 0), 0)
            return True

        monkeypatch.setattr(baking, "share_blocks", share)
    elif how == "read and write":

        def refuse(*args):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    for module in (hashing, tensorfile):
        monkeypatch.setattr(module, "CHUNK", 1000)
    subspace, old = space(source), tensors(source)
    bake_checkpoint(source, subspace, tmp_path / "baked")
    new, record = tensors(tmp_path / "baked"), json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert sum(not torch.equal(new[name], old[name]) for name in old) == 2
    assert all(sha256(tmp_path / "baked" / name) == digest for name, digest in record["sha256"].items())
    assert record["sha256"].keys() == {
        f.relative_to(tmp_path / "baked").as_posix() for f in (tmp_path / "baked").rglob("*") if f.is_file()
    } - {"provenance.json"}


# A process with everything imported, which forks one that bakes for each line "PAUSE SECONDS" it reads: with pauses, so
# that a kill can fall between all steps, and killed after so many seconds. It answers with the exit status (9: killed)
# and how long it took.
BAKER = """
import os, signal, sys, time
from contextlib import contextmanager
from pathlib import Path
import torch, safetensors.torch
from kernel_surgery.checkpoint import baking
from kernel_surgery.subspace.artifact import Subspace

source, subspace, destination = sys.argv[1:]
subspace = Subspace.load(subspace)
def slowed(real, pause):
    return lambda *a, **k: (time.sleep(pause), real(*a, **k))[1]
print("ready", flush=True)
for line in sys.stdin:
    pause, limit = map(float, line.split())
    began, pid = time.monotonic(), os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        for name in ("copy_range", "write_tensor", "read_tensor"):
            setattr(baking, name, slowed(getattr(baking, name), pause))
        try:
            baking.bake_checkpoint(Path(source), subspace, Path(destination))
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    done = 0
    while not done and time.monotonic() < began + limit:
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    print(status, time.monotonic() - began, flush=True)
"""


@pytest.fixture
def large(tmp_path):
    """A checkpoint that takes long enough to be interrupted: 36 MB in four files."""
    model = pico("qwen2", dtype=torch.bfloat16, hidden_size=256, intermediate_size=2048, num_hidden_layers=8)
    model.save_pretrained(tmp_path / "source", max_shard_size="10MB")
    bases = {i: basis(256, 4, i) for i in range(2, 6)}
    Subspace(bases=bases, site="mlp_out", fingerprint=fingerprint(model)).save(tmp_path / "subspace.safetensors")
    return tmp_path


@contextmanager
def baker(folder):
    """`bake(pause, limit)` in a process of its own: (status, seconds, what it said). `bake.start` and `bake.wait` are
    its two halves."""
    words = [sys.executable, "-c", BAKER, folder / "source", folder / "subspace.safetensors", folder / "baked"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(words, **pipes, stderr=said, text=True, env=environment) as server,
    ):
        assert server.stdout.readline() == "ready\n"

        def start(pause=0.0, limit=60.0):
            said.truncate(0)
            server.stdin.write(f"{pause} {limit}\n")
            server.stdin.flush()

        def wait():
            status, seconds = server.stdout.readline().split()
            said.seek(0)
            return int(status), float(seconds), said.read()

        def bake(pause=0.0, limit=60.0):
            start(pause, limit)
            return wait()

        bake.start, bake.wait = start, wait
        yield bake
        server.stdin.close()


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_leave_no_half_checkpoint_and_one_sibling_at_most(large, kills):
    before = {f.name: sha256(f) for f in (large / "source").iterdir()}
    with baker(large) as bake:
        status, whole_run, said = bake(0.02)
        assert status == 0, said
        right = {f.name: sha256(f) for f in (large / "baked").glob("*.safetensors")}
        shutil.rmtree(large / "baked")
        states = {"nothing": 0, "sibling": 0, "whole": 0}
        for kill in range(kills):
            status, _, said = bake(0.02, whole_run * (kill + random.random()) / kills)
            assert status in (0, 9), said
            names = {p.name for p in large.iterdir()} - {"source", "subspace.safetensors"}
            assert names in (set(), {".baked.baking"}, {"baked"}), names
            states["whole" if "baked" in names else "sibling" if names else "nothing"] += 1
            if "baked" in names:
                assert {f.name: sha256(f) for f in (large / "baked").glob("*.safetensors")} == right
                shutil.rmtree(large / "baked")
        print(f"a run takes {whole_run:.2f} s; after {kills} kills: {states}")
        assert states["sibling"] >= kills // 6 + 1  # else the kills fell beside it
        status, _, said = bake()
        assert status == 0, said
    assert {p.name for p in large.iterdir()} == {"source", "subspace.safetensors", "baked"}
    assert {f.name: sha256(f) for f in (large / "baked").glob("*.safetensors")} == right
    assert {f.name: sha256(f) for f in (large / "source").iterdir()} == before


@pytest.mark.slow
def test_two_at_once_do_not_write_the_same_checkpoint(large):
    with baker(large) as first, baker(large) as second:
        first.start(0.2)
        for _ in range(500):
            if (large / ".baked.baking").exists():
                break
            time.sleep(0.01)
        status, _, said = second()
        assert status != 0 and "another process is writing" in said
        status, _, said = first.wait()
        assert status == 0, said
    assert {p.name for p in large.iterdir()} == {"source", "subspace.safetensors", "baked"}
