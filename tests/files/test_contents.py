"""One rule of what belongs to a checkpoint: equal to what transformers loads, for every command and for the hub."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernel_surgery import Subspace, bake_checkpoint, write_adapter
from kernel_surgery.certify.files import verify_adapter, verify_checkpoint, verify_restored
from kernel_surgery.checkpoint.baking import undo_checkpoint
from kernel_surgery.common.errors import CheckpointError
from kernel_surgery.files.contents import SMALL, contents, select, weight_files
from kernel_surgery.models import load
from kernel_surgery.models.load import POLYGLOT, load_model
from kernel_surgery.models.stored import located
from kernel_surgery.subspace.fingerprint import fingerprint
from tests.support.models import basis, pico

INDEX = "model.safetensors.index.json"


def save(folder, model, *, shard="1GB"):
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def space(model, *layers):
    return Subspace({i: basis(48, 4, i) for i in layers or (1, 2)}, site="mlp_out", fingerprint=fingerprint(model))


def sizes(**more):
    names = {"config.json": 9, "model.safetensors": 9}
    return names | {name.replace("__", "/"): size for name, size in more.items()}


def chosen(names, texts=None):
    return select(names, lambda name: (texts or {}).get(name, "{}"), "model 'm'")


def test_small_files_and_named_templates_belong_and_copies_of_the_weights_do_not():
    names = dict.fromkeys(
        (
            *("config.json", "model.safetensors", "tokenizer.model", "spiece.model", "qwen.tiktoken", "LICENSE"),
            "merges.txt",
            *("chat_template.jinja", "additional_chat_templates/tool_use.jinja", "additional_chat_templates/notes.md"),
            *("consolidated.safetensors", "4bit/model.safetensors", "4bit/config.json", "original/consolidated.00.pth"),
            *("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.gguf", "onnx/model.onnx"),
            *(".gitattributes", ".cache/huggingface/x.lock", "provenance.json", "kernel_surgery/undo.safetensors"),
        ),
        5,
    )
    found = chosen(names | {"data.zip": SMALL + 1, "tokenizer.json": SMALL})
    assert found.weights == ("model.safetensors",)
    assert found.along == (
        *("LICENSE", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "config.json", "merges.txt"),
        *("qwen.tiktoken", "spiece.model", "tokenizer.json", "tokenizer.model"),
    )
    assert found.left_out == (
        *("4bit/", "additional_chat_templates/", "consolidated.safetensors", "data.zip", "model.gguf", "onnx/"),
        *("original/", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    )


def test_a_single_file_comes_before_an_index_as_in_transformers():
    stale = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    found = chosen(sizes() | {INDEX: 9, "model-1.safetensors": 9}, {INDEX: stale})
    assert found.weights == ("model.safetensors",) and found.left_out == ("model-1.safetensors", INDEX)
    same = json.dumps({"weight_map": {"a": "model.safetensors"}})
    assert INDEX in chosen(sizes() | {INDEX: 9}, {INDEX: same}).along


def test_the_weights_that_the_configuration_names_come_first():
    texts = {"config.json": '{"transformers_weights": "other.safetensors"}'}
    found = chosen(sizes() | {"other.safetensors": 9}, texts)
    assert found.weights == ("other.safetensors",) and found.left_out == ("model.safetensors",)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, r"names '\.\./outside.safetensors', which is not a safetens"),
        ({"weight_map": {"a": "sub/a.safetensors"}}, "not a safetensors file in the same folder"),
        ({"weight_map": {"a": "a.bin"}}, "names 'a.bin'"),
        ({"weight_map": {"a": 3}}, "its weight_map names no files"),
        ({"weight_map": {}}, "its weight_map names no files"),
        ({}, "'weight_map' is missing"),
        ([], "is not a safetensors index"),
        ({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}, r"1 of 2 weight files missing \(first: b.s"),
    ],
)
def test_an_index_that_cannot_be_followed_is_one_clear_error(index, message):
    names = {"config.json": 9, INDEX: 9, "a.safetensors": 9, "sub/a.safetensors": 9, "a.bin": 9}
    with pytest.raises(CheckpointError, match=message):
        chosen(names, {INDEX: json.dumps(index)})


def test_all_commands_take_the_weights_that_transformers_loads(tmp_path):
    """A folder with a single file of one model, and an index and shards of another."""
    model, other = pico("qwen2"), pico("qwen2", seed=1)
    folder = save(tmp_path / "m", other, shard="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    save(tmp_path / "single", model)
    (folder / "model.safetensors").write_bytes((tmp_path / "single" / "model.safetensors").read_bytes())
    loaded = load_model(str(folder))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert weight_files(folder) == [folder / "model.safetensors"]
    bake_checkpoint(folder, space(model), tmp_path / "baked")
    record = json.loads((tmp_path / "baked" / "provenance.json").read_text())
    assert INDEX in record["left_out"] and sorted(p.name for p in (tmp_path / "baked").glob("*.safetensors")) == [
        "model.safetensors"
    ]
    assert verify_checkpoint(tmp_path / "baked", folder)["faults"] == []
    undo_checkpoint(tmp_path / "baked", tmp_path / "restored")
    assert verify_restored(tmp_path / "restored", folder)["faults"] == []
    write_adapter(folder, space(model), tmp_path / "adapter")
    assert verify_adapter(tmp_path / "adapter", folder)["faults"] == []


def test_a_bake_keeps_named_templates_and_names_what_it_leaves_out(tmp_path):
    model = pico("llama")
    folder = save(tmp_path / "m", model)
    for name in ("additional_chat_templates/tool_use.jinja", "original/weights.pth", ".cache/x", "tokenizer.model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("text")
    bake_checkpoint(folder, space(model), tmp_path / "baked")
    baked = tmp_path / "baked"
    assert (baked / "additional_chat_templates" / "tool_use.jinja").read_text() == "text"
    assert not (baked / "original").exists() and not (baked / ".cache").exists()
    assert (baked / "tokenizer.model").is_file()
    assert json.loads((baked / "provenance.json").read_text())["left_out"] == ["original/"]
    assert verify_checkpoint(baked, folder)["faults"] == []
    (baked / "additional_chat_templates" / "tool_use.jinja").write_text("other")
    assert any("tool_use.jinja differs" in fault for fault in verify_checkpoint(baked, folder)["faults"])


def test_what_a_download_adds_is_no_fault(tmp_path):
    model = pico("llama")
    folder = save(tmp_path / "m", model)
    bake_checkpoint(folder, space(model), tmp_path / "baked")
    (tmp_path / "baked" / ".gitattributes").write_text("*.safetensors filter=lfs")
    (tmp_path / "baked" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "baked" / ".cache" / "huggingface" / "model.safetensors.metadata").write_text("x")
    assert verify_checkpoint(tmp_path / "baked", folder)["faults"] == []
    (tmp_path / "baked" / "added.json").write_text("{}")
    assert verify_checkpoint(tmp_path / "baked", folder)["faults"] != []


def test_an_inner_model_that_was_saved_alone_is_taken_by_every_command(tmp_path):
    model = pico("qwen2", tie_word_embeddings=True)
    folder = save(tmp_path / "inner", model.model)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    names = set(load_file(folder / "model.safetensors"))
    assert "layers.1.mlp.down_proj.weight" in names and not any(name.startswith("model.") for name in names)
    loaded, subspace = load_model(str(folder)), space(model)
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    bake_checkpoint(folder, subspace, tmp_path / "baked")
    assert set(load_file(tmp_path / "baked" / "model.safetensors")) == names
    assert verify_checkpoint(tmp_path / "baked", folder)["faults"] == []
    edited = load_model(str(tmp_path / "baked")).model.layers[1].mlp.down_proj.weight
    assert float((subspace.bases[1].T @ edited).abs().max()) < 1e-5
    undo_checkpoint(tmp_path / "baked", tmp_path / "restored")
    assert verify_restored(tmp_path / "restored", folder)["faults"] == []
    write_adapter(folder, subspace, tmp_path / "adapter")
    assert verify_adapter(tmp_path / "adapter", folder)["faults"] == []


def test_a_tensor_in_two_weight_files_is_refused(tmp_path):
    model = pico("llama")
    folder = save(tmp_path / "m", model, shard="20KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    one, two = load_file(shards[0]), load_file(shards[1])
    name = sorted(one)[0]
    save_file(two | {name: one[name]}, shards[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is in two of its weight files, model-00001.*model-00002"):
        located(folder)


def test_the_embedded_model_is_a_folder_that_an_engine_can_load():
    """vLLM loads every safetensors file of a folder without an index, and needs every tensor to belong to the model."""
    found = contents(POLYGLOT)
    assert [path.name for path in POLYGLOT.glob("*.safetensors")] == list(found.weights) and found.left_out == ()
    assert {f"{name}" for name in located(POLYGLOT)} <= set(load_model("polyglot").state_dict())


def test_the_hub_is_asked_for_the_files_that_belong_and_no_others(tmp_path, monkeypatch):
    import huggingface_hub

    there = {"config.json": 9, "model.safetensors": 9, "tokenizer.model": 9, "4bit/model.safetensors": 9, "x[1].txt": 9}

    class File:
        def __init__(self, name, size):
            self.rfilename, self.size = name, size

    class Info:
        sha, siblings = "0123", [File(*item) for item in there.items()]

    asked = {}

    def fetch(name, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, files_metadata: Info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(tmp_path / file))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load.local_folder("org/m") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/m", "0123")
    from fnmatch import fnmatch

    taken = {name for name in there if any(fnmatch(name, pattern) for pattern in asked["patterns"])}
    assert taken == there.keys() - {"4bit/model.safetensors"}


def test_links_of_the_hubs_cache_are_files(tmp_path):
    model = pico("llama")
    folder = save(tmp_path / "m", model)
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        os.symlink(path, linked / path.name)
    assert contents(linked) == contents(folder)
