"""What commands write: nothing is overwritten unasked, no folder is named in what travels, a full disk is one error."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from kernel_surgery.common.command import command_line
from kernel_surgery.common.errors import ExistsError, UserError
from kernel_surgery.common.files import check_folder, check_output, mistaken, shareable
from kernel_surgery.models.load import hub_id, public_name
from tests.support.calls import call, one_thread
from tests.test_golden import BEFORE, PACKAGE

ROOT = Path(__file__).resolve().parents[2]
SUBSPACE = BEFORE / "subspace.safetensors"


# ----------------------------------------------------------------------------------------------- overwriting

COMMANDS = {
    "collect": ["--model", "polyglot", "--problems", "2", "--languages", "en,zh", "--layers", "2-5"],
    "fit": ["--rank", "1"],
    "verify": ["--baked", BEFORE / "baked"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_older_file_is_replaced_only_where_that_was_asked_for(command, tmp_path):
    out, words = tmp_path / "made.json", COMMANDS[command]
    if command == "fit":
        activations = tmp_path / "acts.safetensors"
        assert call("collect", *COMMANDS["collect"], "--out", activations)[0] == 0
        words = [*words, "--activations", activations]
    out.write_text("a user's own")
    with one_thread():
        status, _, error = call(command, *words, "--out", out)
        assert status == 2 and f"{str(out)!r} already exists. Choose another --out, or add --overwrite." in error
        assert out.read_text() == "a user's own"
        status, _, error = call(command, *words, "--out", out, "--overwrite")
    assert (status, error) == (0, "")
    assert b"a user's own" not in out.read_bytes()


def test_the_plot_beside_a_certificate_is_not_overwritten_either(tmp_path):
    (tmp_path / "c.svg").write_text("a picture")
    status, _, error = call("verify", *COMMANDS["verify"], "--out", tmp_path / "c.json")
    assert status == 2 and "c.svg' already exists" in error
    assert [path.name for path in tmp_path.iterdir()] == ["c.svg"]


def test_outputs_are_checked_as_files_or_folders(tmp_path):
    check_output(tmp_path / "new" / "deep.json", overwrite=False)
    (written := tmp_path / "written").mkdir()
    (written / "provenance.json").write_text("{}")
    check_output(written / "certificate.json", overwrite=False)  # a document beside the weights
    for inside in (
        lambda: check_output(written / "sub"),
        lambda: check_output(written / "sub" / "deep.json", overwrite=False),
        lambda: check_folder(written / "results" / "one"),
    ):
        with pytest.raises(UserError, match=r"is inside .*written.*names every file of that folder"):
            inside()
    check_folder(tmp_path / "new" / "deep")
    check_folder(tmp_path)
    with pytest.raises(ExistsError):
        check_output(tmp_path)
    with pytest.raises(UserError, match=r"is a folder\. Name a file in it"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExistsError):
        check_output(tmp_path / "link", overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "written"]


# -------------------------------------------------------------------------------------------- what travels


def test_names_that_travel(tmp_path):
    assert public_name("org/name") == "org/name" and public_name("polyglot") == "polyglot"
    assert public_name(PACKAGE / "polyglot" / "model") == "polyglot"
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert public_name(cached) == hub_id(cached) == "org/name"
    assert public_name(tmp_path) == tmp_path.name and hub_id(tmp_path) is None
    assert hub_id("org/name") == "org/name" and hub_id("polyglot") is hub_id("a/b/c") is None
    assert shareable(tmp_path / "x.json") == "x.json" and shareable("results/x.json") == "results/x.json"
    words = ["--model", str(tmp_path), f"--out={tmp_path}/made", "--layers", "2-5"]
    assert command_line("bake", words) == (
        f"python -m kernel_surgery.bake --model {tmp_path.name} --out=made --layers 2-5"
    )


def test_nothing_that_travels_names_a_folder(tmp_path):
    shutil.copytree(PACKAGE / "polyglot" / "model", tmp_path / "model")
    model, basis = ["--model", tmp_path / "model"], ["--subspace", tmp_path / "s.safetensors"]
    with one_thread():
        for command, words in (
            ("collect", [*model, "--problems", "2", "--out", tmp_path / "acts.safetensors"]),
            ("fit", ["--activations", tmp_path / "acts.safetensors", "--rank", "2", "--out", basis[1]]),
            ("bake", [*model, *basis, "--out", tmp_path / "baked"]),
            ("bake", ["--undo", "--model", tmp_path / "baked", "--out", tmp_path / "restored"]),
            ("lora", [*model, *basis, "--out", tmp_path / "adapter"]),
            ("verify", [*model, *basis, "--baked", tmp_path / "baked", "--out", tmp_path / "certificate.json"]),
            ("verify", ["--adapter", tmp_path / "adapter", *model, "--out", tmp_path / "adapter.json"]),
        ):
            status, _, error = call(command, *words)
            assert (status, error) == (0, ""), command
    looked = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(looked) > 20
    for path in looked:
        for word in (str(tmp_path), str(BEFORE), str(PACKAGE), str(ROOT)):
            assert word.encode() not in path.read_bytes(), f"{path.relative_to(tmp_path)} names {word}"
    configuration = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert configuration["base_model_name_or_path"] is None
    assert "base_model" not in (tmp_path / "adapter" / "README.md").read_text()


# ------------------------------------------------------------------------------------------- failing disks


@pytest.mark.parametrize("command", ["collect", "fit"])
def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(command, tmp_path):
    """The largest file that the process may write stands for the disk."""
    words = [*COMMANDS["collect"], "--out", str(tmp_path / "acts.safetensors")]
    if command == "fit":
        assert call("collect", *words)[0] == 0
        words = ["--activations", str(tmp_path / "acts.safetensors"), "--out", str(tmp_path / "s.safetensors")]
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        status, _, error = call(command, *words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2 and "error: cannot write '" in error and "File too large. Make room there" in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b"\n <!DOCTYPE html><title>404", "it is a web page"),
        (b"<html>", "it is a web page"),
        (b"PK\x03\x04", None),
        (b"", None),
    ],
)
def test_a_download_that_is_something_else_is_named(head, what, tmp_path):
    (tmp_path / "file.npz").write_bytes(head)
    found = mistaken(tmp_path / "file.npz")
    assert found is None if what is None else found.startswith(what)
    if what:
        status, _, error = call("fit", "--activations", tmp_path / "file.npz", "--out", tmp_path / "s")
        assert status == 2 and what in error and "pickle" not in error.lower()
        status, _, error = call(
            *("bake", "--model", BEFORE / "model", "--subspace", tmp_path / "file.npz", "--out", tmp_path / "new")
        )
        assert status == 2 and what in error
