"""A certificate of a baked checkpoint: passes in every dtype, and each planted fault breaks it and is named, also when
the recorded hashes were rewritten to match."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery.certify.checks import broken, check_tensor
from kernel_surgery.certify.files import verify_checkpoint
from kernel_surgery.certify.render import few, shown
from kernel_surgery.checkpoint.baking import bake_checkpoint, undo_checkpoint
from kernel_surgery.common.errors import MissingFileError, UserError
from kernel_surgery.edit.baked import bake_weight, remove
from kernel_surgery.files.hashing import sha256
from kernel_surgery.numerics.bounds import leak_floor
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint
from kernel_surgery.verify import run
from tests.support.models import basis, pico

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DOWN = "model.layers.{}.mlp.down_proj.{}"
LAYERS = (1, 2)


def prepared(folder, dtype=torch.bfloat16, strength=1.0, shards="5GB", bias=True):
    """A checkpoint of a model with biases, a subspace of it, and the two baked together; large enough for a leak."""
    size = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    model = pico("llama", dtype=dtype, bias=bias, mlp_bias=True, **size)
    model.save_pretrained(folder / "source", max_shard_size=shards)
    bases = {i: basis(128, 6, i) for i in LAYERS}
    subspace = Subspace(bases, site="mlp_out", fingerprint=fingerprint(model))
    subspace.save(folder / "subspace.safetensors")
    bake_checkpoint(folder / "source", subspace, folder / "baked", strength=strength)
    return folder


def certified(folder, *, model=True, subspace=False):
    source = folder / "source" if model else None
    return verify_checkpoint(folder / "baked", source, folder / "subspace.safetensors" if subspace else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("shards", ["5GB", "200KB"])
def test_a_certificate_passes_in_every_dtype(tmp_path, dtype, strength, shards):
    folder = prepared(tmp_path, dtype, strength, shards)
    for options in ({"model": False}, {"model": False, "subspace": True}, {}, {"subspace": True}):
        certificate = certified(folder, **options)
        print(shown(certificate))
        assert certificate["faults"] == []
        assert [(r["layer"], r["tensor"]) for r in certificate["tensors"]] == [
            (i, DOWN.format(i, part)) for i in LAYERS for part in ("weight", "bias")
        ]


def test_biases_of_zero_leak_nothing(tmp_path):
    folder = prepared(tmp_path, bias=False)
    certificate = certified(folder)
    assert certificate["faults"] == []
    assert {r["leak"] for r in certificate["tensors"] if r["tensor"].endswith("bias")} == {0.0}


def rewritten(folder, change):
    """Change the tensors of the baked checkpoint, and its hashes with them, as a forger would."""
    (file,) = (folder / "baked").glob("*.safetensors")
    tensors = load_file(file)
    old = load_file(folder / "source" / file.name)
    subspace = Subspace.load(folder / "subspace.safetensors")
    change(tensors, old, subspace.bases)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
    record = json.loads((folder / "baked" / "provenance.json").read_text())
    record["sha256"][file.name] = sha256(file)
    (folder / "baked" / "provenance.json").write_text(json.dumps(record))


def dense_projector(t, old, bases):
    name = DOWN.format(2, "weight")
    p = (torch.eye(128) - bases[2] @ bases[2].T).bfloat16()
    t[name] = (p.float() @ old[name].float()).to(old[name].dtype)


def skipped(t, old, bases):
    t[DOWN.format(2, "weight")] = old[DOWN.format(2, "weight")]


def another_layers(t, old, bases):
    t[DOWN.format(2, "weight")] = bake_weight(old[DOWN.format(2, "weight")], bases[1])


def no_bias(t, old, bases):
    t[DOWN.format(2, "bias")] = old[DOWN.format(2, "bias")]


def off_by_a_percent(t, old, bases):
    t[DOWN.format(2, "weight")] = bake_weight(old[DOWN.format(2, "weight")], bases[2], 0.99)


def one_flipped(t, old, bases):
    t[DOWN.format(2, "weight")][7, 9] *= -1


def not_finite(t, old, bases):
    t[DOWN.format(2, "weight")][7, 9] = torch.nan


FAULTS = {
    f.__name__: f
    for f in (dense_projector, skipped, another_layers, no_bias, off_by_a_percent, one_flipped, not_finite)
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, torch.bfloat16) for name in FAULTS),
        *(("off_by_a_percent", dtype) for dtype in (torch.float32, torch.float16)),
    ],
)
def test_a_planted_fault_is_found_and_its_layer_named_though_the_hashes_match(tmp_path, name, dtype, capsys):
    folder = prepared(tmp_path, dtype)
    rewritten(folder, FAULTS[name])
    words = ["--baked", str(folder / "baked"), "--model", str(folder / "source"), "--out", str(tmp_path / "c.json")]
    assert run(words) == 1
    said = capsys.readouterr().out
    certificate = json.loads((tmp_path / "c.json").read_text())
    faults = certificate["faults"]
    assert faults and all(fault.startswith("layer 2: model.layers.2.mlp.down_proj.") for fault in faults)
    assert all(f"fault: {fault}" in said for fault in faults) and "SHA-256" not in said
    print(faults)
    assert any("it holds NaN or Inf" in fault for fault in faults) == (name == "not_finite")
    # From the file alone, what leaks is found too (a flipped sign leaks too little to be told from rounding, and in
    # float32 and float16 the coarse projector and one per cent are compared with a finer floor).
    alone = certified(folder, model=False)["faults"]
    if name in ("skipped", "another_layers", "no_bias", "off_by_a_percent", "not_finite"):
        assert any(fault.startswith("layer 2: ") for fault in alone), alone


def test_a_changed_file_is_found_by_its_hash(tmp_path):
    folder = prepared(tmp_path)
    (file,) = (folder / "baked").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert any("SHA-256 differs" in fault for fault in certified(folder, model=False)["faults"])
    file.write_bytes(whole)
    (folder / "baked" / "extra.txt").write_text("?")
    (folder / "baked" / "generation_config.json").unlink()
    faults = certified(folder, model=False)["faults"]
    assert faults == ["generation_config.json is missing", "extra.txt was not there when the checkpoint was written"]


def test_a_rewritten_card_and_an_added_licence_are_remarks_and_what_a_loader_reads_is_a_fault(tmp_path, capsys):
    folder = prepared(tmp_path)
    baked = folder / "baked"
    (baked / "README.md").write_text("our own words")
    for name in ("LICENSE", "certificate.json", "picture.svg"):
        (baked / name).write_text("{}")
    found = certified(folder, model=False)
    assert found["faults"] == []
    assert [remark.split(" ")[0] for remark in found["remarks"]] == [
        *("README.md", "LICENSE", "certificate.json", "picture.svg")
    ]
    assert run(["--baked", str(baked)]) == 0
    said = capsys.readouterr().out
    assert "remark: README.md is not the file that was written" in said
    assert said.count(", and no engine reads it\n") == 4
    beside = certified(folder)
    assert beside["faults"] == [] and beside["remarks"] == found["remarks"]  # nor beside the original
    # Undoing does not depend on them either.
    undo_checkpoint(baked, folder / "restored")
    assert (folder / "restored" / "config.json").is_file()
    # What an engine may read is no document, nor is what lies in a folder of its own.
    for name in ("special_tokens_map.json", "merges.txt", "kernel_surgery/README.md"):
        (baked / name).write_text("{}")
        assert any(fault.startswith(name) for fault in certified(folder, model=False)["faults"]), name


def test_an_unedited_tensor_that_changed_is_named(tmp_path):
    folder = prepared(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"

    def change(t, old, bases):
        t[name][0, 0] += 1

    rewritten(folder, change)
    assert certified(folder, model=False)["faults"] == []
    assert certified(folder)["faults"] == [f"{name} should not have been edited, but differs from the original"]

    def drop(t, old, bases):
        del t[name]

    rewritten(folder, drop)
    assert certified(folder)["faults"] == [f"{name} is in only one of the two checkpoints"]


def test_another_model_is_a_few_lines_and_not_one_for_each_tensor(tmp_path):
    folder = prepared(tmp_path)

    def change(t, old, bases):
        for tensor in t.values():
            tensor += 1

    rewritten(folder, change)
    faults = (found := certified(folder))["faults"]
    others = sum(fault.endswith("should not have been edited, but differs from the original") for fault in faults)
    assert f"{others} of {others} tensors that are not edited differ: is it another model?" in faults and others > 20
    lines = [line for line in shown(found).splitlines() if line.startswith("fault: ")]
    assert f"fault: {others - 3} more like these" in lines and len(lines) < len(faults) / 3
    assert few(faults[:1]) == faults[:1] and few(["a.1 is", "a.2 is", "a.3 is", "a.4 is"])[3] == "a.4 is"


def test_a_certificate_is_of_the_subspace_that_was_asked_for(tmp_path):
    folder = prepared(tmp_path)
    other = {1: basis(128, 6, 1), 2: basis(128, 6, 9)}
    Subspace(other, site="mlp_out").save(folder / "subspace.safetensors")
    faults = certified(folder, subspace=True)["faults"]
    assert "layer 2: the basis differs from that in" in faults[0] and not any(f.startswith("layer 1") for f in faults)
    Subspace({1: basis(128, 6, 1)}, site="mlp_out").save(folder / "subspace.safetensors")
    with pytest.raises(ValueError, match=r"layers \[1, 2\].* has layers \[1\]"):
        certified(folder, subspace=True)


def test_what_is_no_baked_checkpoint_is_refused(tmp_path):
    folder = prepared(tmp_path)
    with pytest.raises(ValueError, match=r"is not a checkpoint from python -m kernel_surgery\.bake:"):
        verify_checkpoint(folder / "source")
    with pytest.raises(UserError, match="no folder at"):
        run(["--baked", str(folder / "nowhere")])
    shutil.rmtree(folder / "baked" / "kernel_surgery")
    with pytest.raises(MissingFileError, match=r"is incomplete: kernel_surgery/undo\.safetensors, which"):
        verify_checkpoint(folder / "baked")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_checkpoint_whose_edit_was_taken_back_has_a_certificate_too(tmp_path, dtype, strength, capsys):
    folder = prepared(tmp_path, dtype, strength)
    undo_checkpoint(folder / "baked", folder / "restored")
    words = ["--restored", str(folder / "restored"), "--model", str(folder / "source")]
    assert run([*words, "--subspace", str(folder / "subspace.safetensors"), "--out", str(tmp_path / "c.json")]) == 0
    print(capsys.readouterr().out)
    rows = json.loads((tmp_path / "c.json").read_text())["tensors"]
    assert [(r["layer"], r["tensor"]) for r in rows] == [
        (i, DOWN.format(i, part)) for i in LAYERS for part in ("weight", "bias")
    ]
    assert all(0 < r["error_over_bound"] <= 1 for r in rows) and (tmp_path / "c.svg").exists()
    capsys.readouterr()
    assert run(words[:2]) == 0  # hashes alone
    assert "2 edited layers (1, 2), rank" in capsys.readouterr().out
    (file,) = (folder / "restored").glob("*.safetensors")
    whole, record = load_file(file), folder / "restored" / "provenance.json"
    name, other = DOWN.format(2, "weight"), "model.layers.0.mlp.up_proj.weight"
    wrong = {
        "still baked": ({name: load_file(folder / "baked" / file.name)[name]}, f"layer 2: {name}: an element differs"),
        "an element": ({name: whole[name].clone()}, f"layer 2: {name}: an element differs"),
        "never edited": ({other: whole[other] + 1}, f"{other} was never edited, but differs"),
    }
    wrong["an element"][0][name][5, 5] *= -1
    for change, message in wrong.values():
        save_file(whole | change, file, metadata={"format": "pt"})
        rewritten = json.loads(record.read_text())
        rewritten["sha256"][file.name] = sha256(file)
        record.write_text(json.dumps(rewritten))
        capsys.readouterr()
        assert run(words) == 1
        broken = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
        assert len(broken) == 1 and broken[0].startswith(f"fault: {message}")
    with pytest.raises(ValueError, match=r"not a checkpoint from .*bake --undo\. verify takes it as --baked\."):
        run(["--restored", str(folder / "baked")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank, strength", [(1, 1.0), (2, 0.1), (6, 0.1), (6, -3.0)])
def test_a_correct_bake_is_never_called_broken(tmp_path, dtype, rank, strength):
    """Low ranks and small strengths: rounding then returns many elements as they were, and what it leaves of the
    subspace lies along it. Ulp / sqrt(12) of noise would be far less."""
    torch.manual_seed(0)
    weight, u = (torch.randn(512, 1024) / 32).to(dtype), basis(512, rank)
    after, inside = remove(weight, u, strength)
    for before in (weight, None):
        row = check_tensor(after, before, inside, u, strength)
        noise = row["leak"] / leak_floor(after, weight, u)
        print(f"{dtype} k={rank} a={strength}: leak/floor {row['leak_over_floor']:.3f}, of ulp noise {noise:.2f}")
        assert broken(row | {"dtype": "BF16"}) == []
    # Teeth: the same gate sees an edit of the same strength made with a coarse projector, or a tenth too weak.
    for wrong in (bake_weight(weight, u, 0.8 * strength), weight):
        assert broken(check_tensor(wrong, None, inside, u, strength) | {"dtype": "BF16"})


def test_a_folder_does_not_vouch_for_its_own_bases_layers_and_files(tmp_path):
    folder = prepared(tmp_path)
    record, undo = folder / "baked" / "provenance.json", folder / "baked" / "kernel_surgery" / "undo.safetensors"
    right, kept, whole = json.loads(record.read_text()), load_file(undo), undo.read_bytes()
    cases = [
        ({n: t * 0 if n.startswith("basis") else t for n, t in kept.items()}, {}, "layer 1 is not orthonormal"),
        ({n: t for n, t in kept.items() if n != "basis.2"}, {}, r"layers \[1\], rank 6, but .* \[1, 2\]"),
        ({n: t for n, t in kept.items() if not n.startswith("basis")}, {}, "at least one layer"),
        (kept, {"rank": 5}, r"rank 6, but provenance.json says layers \[1, 2\], rank 5"),
        (kept, {"strength": None}, "is not a checkpoint from"),
        (kept, {"strength": "x"}, "is not a checkpoint from"),
        (kept, {"layers": []}, "is not a checkpoint from"),
        (kept, {"model_id": 3}, "is not a checkpoint from"),
    ]
    for tensors, change, message in cases:
        save_file(tensors, undo)
        record.write_text(json.dumps(right | change))
        with pytest.raises(ValueError, match=message):
            certified(folder)
    undo.write_bytes(whole)
    # Files beside the weights are the original's, or our own.
    config = folder / "baked" / "config.json"
    for path, text, fault in (
        (config, config.read_text().replace("10000", "100"), "config.json differs from the original's"),
        (folder / "baked" / "tokenizer.json", "{}", "tokenizer.json is not in the original"),
        (
            folder / "baked" / "model-2.safetensors",
            "x",
            "model-2.safetensors holds weights that do not belong to the checkpoint",
        ),
    ):
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        rewritten = dict(right["sha256"]) | {path.name: sha256(path)}
        record.write_text(json.dumps(right | {"sha256": rewritten}))
        assert fault in certified(folder)["faults"]
        path.write_text(before) if before is not None else path.unlink()
    record.write_text(json.dumps(right))
    assert certified(folder)["faults"] == []
    for suffix, what in ((".svg", "plot"), (".html", "page")):
        with pytest.raises(UserError, match=f"where the {what} would go"):
            run(["--baked", str(folder / "baked"), "--out", str(tmp_path / f"c{suffix}")])
