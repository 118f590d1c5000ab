"""An edited checkpoint or adapter is evaluated with the numbers that its folder holds, beside its own original."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery.checkpoint.record import write_provenance
from kernel_surgery.common.errors import CheckpointError, MismatchError, UserError
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.written import read_written
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE, load_model
from tests.support.calls import call, one_thread
from tests.support.models import pico
from tests.test_golden import SHIPPED, changed_model

DOWN = "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A baked checkpoint and an adapter of the embedded model, at strength 0.5, each with a number changed by hand."""
    made = tmp_path_factory.mktemp("written")
    common = ("--model", "polyglot", "--subspace", SHIPPED, "--strength", 0.5, "--no-damage")
    for command, kind, file, name in (
        ("bake", "baked", "model.safetensors", f"{DOWN}.weight"),
        ("lora", "adapter", "adapter_model.safetensors", f"base_model.model.{DOWN}.lora_B.weight"),
    ):
        status, _, error = call(command, *common, "--out", made / kind)
        assert status == 0, error
        held = load_file(made / kind / file)
        held[name][5, 2] += 1.0
        save_file(held, made / kind / file, metadata={"format": "pt"})
        record = json.loads((made / kind / "provenance.json").read_text())
        (made / kind / "provenance.json").unlink()
        write_provenance(made / kind, {k: v for k, v in record.items() if k not in ("sha256", "environment")}, {})
    return made


def test_the_baked_weights_are_the_folders_and_then_the_originals(folders):
    model, file = load_model("polyglot", torch.bfloat16), load_file(folders / "baked" / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = read_written(folders / "baked", "baked", POLYGLOT)
    with applied("baked", model, made, 0.5):
        for name, tensor in model.state_dict().items():
            assert name not in file or torch.equal(tensor, file[name]), name
        assert not torch.equal(model.state_dict()[f"{DOWN}.weight"], before[f"{DOWN}.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_adapter_is_the_folders(folders):
    model, made = load_model("polyglot", torch.float32), read_written(folders / "adapter", "adapter", POLYGLOT)
    file, module = load_file(folders / "adapter" / "adapter_model.safetensors"), model.get_submodule(DOWN)
    a, b = (file[f"base_model.model.{DOWN}.lora_{part}.weight"] for part in "AB")
    x = torch.randn(4, module.in_features)
    plain = module(x)
    with applied("lora", model, made, 0.5), torch.no_grad():
        torch.testing.assert_close(module(x), plain + (x @ a.T) @ b.T)
    assert torch.equal(module(x), plain)


def test_a_folder_of_another_model_or_changed_since_is_refused(folders, tmp_path):
    shutil.copytree(POLYGLOT, tmp_path / "other")
    held = load_file(tmp_path / "other" / "model.safetensors")
    held["model.norm.weight"][0] += 1
    held["model.layers.2.mlp.down_proj.weight"][:] *= 2
    save_file(held, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=r"baked' was made of another model: model\.norm\.weight differs"):
        read_written(folders / "baked", "baked", tmp_path / "other")
    with pytest.raises(MismatchError, match=r"adapter' was made of another model: model\.layers\.2.* other weights"):
        read_written(folders / "adapter", "adapter", tmp_path / "other")
    small = changed_model(tmp_path / "small")
    with pytest.raises(MismatchError, match="was made of another model"):
        read_written(folders / "baked", "baked", small)
    pico("qwen2", num_hidden_layers=8, hidden_size=64).save_pretrained(tmp_path / "narrow")
    with pytest.raises(MismatchError, match=r"adapter' was made of another model: model\.layers\.2.* another shape"):
        read_written(folders / "adapter", "adapter", tmp_path / "narrow")
    shutil.copytree(folders / "baked", tmp_path / "changed")
    (tmp_path / "changed" / "README.md").write_text("mine")
    read_written(tmp_path / "changed", "baked", POLYGLOT)  # a card is read by nobody here
    (tmp_path / "changed" / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not as it was made: generation_config\.json is not the file"):
        read_written(tmp_path / "changed", "baked", POLYGLOT)
    with pytest.raises(CheckpointError, match="not a checkpoint from"):
        read_written(folders / "adapter", "baked", POLYGLOT)


def test_the_folder_says_mode_and_strength(folders):
    baked, adapter = folders / "baked", folders / "adapter"
    options = Options(baked=baked).as_written()
    assert (options.mode, options.strength) == ("baked", 0.5) and options.as_written() == options
    assert Options(adapter=adapter).as_written().mode == "lora" and Options().as_written() == Options()
    for settings, said in (
        ({"baked": baked, "adapter": adapter}, "--baked or --adapter, not both"),
        ({"baked": baked, "subspace": SHIPPED}, "has its own subspace: leave out --subspace"),
        ({"baked": baked, "mode": "lora"}, "is evaluated as mode baked: leave out --mode lora"),
        ({"adapter": adapter, "strength": 2.0}, r"was made at strength 0\.5: leave out --strength 2"),
    ):
        with pytest.raises(UserError, match=said):
            Options(**settings).as_written()


@pytest.mark.parametrize(("kind", "mode", "what"), [("baked", "baked", "weights"), ("adapter", "lora", "adapter")])
def test_the_command(folders, tmp_path, kind, mode, what):
    words = ("--problems", 1, "--max-new-tokens", 4, "--no-damage", "--device", "cpu", "--languages", "en")
    for other in ("fused", "all"):
        status, _, error = call("eval", f"--{kind}", folders / kind, "--mode", other, *words, "--out", tmp_path / "no")
        assert status == 2 and f"a folder is evaluated as it was written: leave out --mode {other}." in error
    assert not (tmp_path / "no").exists()
    with one_thread():
        status, out, error = call("eval", f"--{kind}", folders / kind, *words, "--out", tmp_path / "run")
    assert (status, error) == (0, "")
    assert re.search(r"^of what the models write, \d of 5 texts differs? from the original's$", out, re.MULTILINE)
    assert f"{mode}: the {what} as written in {kind}, at strength 0.5" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert list(results["modes"]) == ["original", mode] and results["config"]["strength"] == 0.5
    assert str(folders) not in json.dumps(results)


def test_a_certificate_of_another_edit_is_refused(folders, tmp_path):
    """A certificate names what it certified: the record of a folder, the subspace, the strength."""
    mine, small = tmp_path / "mine.json", ("--prompts", 1, "--new-tokens", 0, "--device", "cpu")
    with one_thread():
        assert call("verify", "--baked", folders / "baked", "--out", mine)[0] == 1  # the changed number
        assert call("verify", "--model", "polyglot", *small, "--out", tmp_path / "of the model.json")[0] == 0
    held = json.loads(mine.read_text())
    assert held["of"]["record_sha256"] == sha256(folders / "baked" / "provenance.json")
    assert held["environment"]["date"][:2] == "20"
    other = json.loads((tmp_path / "of the model.json").read_text())["of"]
    assert other["subspace_sha256"] == sha256(POLYGLOT_SUBSPACE) and "record_sha256" not in other
    strength = held["strength"]
    for name, change, said in (
        ("strength", {"strength": strength + 1}, f"its strength is {strength + 1}, and here it is {strength}"),
        ("rank", {"rank": 99}, "its rank is 99, and here it is"),
        ("folder", {"of": {"record_sha256": "0" * 64}}, f"its record_sha256 is {'0' * 64}, and here"),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(held | change))
        words = ("--baked", folders / "baked", "--mode", "baked", "--certificate", file, "--device", "cpu")
        status, _, error = call("eval", *words, "--out", tmp_path / name)
        assert status == 2 and "certifies another edit" in error and said in error, error
        assert "Nothing was written." in error and not (tmp_path / name / "results.json").exists()


def test_a_baked_folder_is_no_original_to_compare_with(folders):
    status, _, error = call("verify", "--baked", folders / "baked", "--model", folders / "baked")
    assert status == 2 and "was baked before: it holds provenance.json. An edit is compared with" in error
