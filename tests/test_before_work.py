"""What can be known before a model is loaded is said before it is loaded: fault x command -> message, in seconds.

Every case runs a command whose model must not be loaded. `pytest -rP -n 0` prints how long each one took.
"""

import importlib.util
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.calls import call, one_thread
from tests.test_golden import BEFORE, BEGUN, PACKAGE, changed_model, changed_subspace

SECONDS = 5.0  # with torch imported already; most take a tenth of one
BASIS = PACKAGE / "polyglot" / "subspace.safetensors"
ODD = "\udcff.out"  # a name that is not UTF-8, as the command line delivers it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The inputs: a small model in many states, subspaces, and places to write to."""
    import torch

    made = tmp_path_factory.mktemp("inputs")
    shutil.copytree(BEFORE / "model", made / "small")
    for file in (PACKAGE / "polyglot" / "model").iterdir():
        if not file.name.endswith(".safetensors"):
            (made / "poly").mkdir(exist_ok=True)
            shutil.copy(file, made / "poly" / file.name)
    shutil.copy(PACKAGE / "polyglot" / "model" / "model.safetensors", made / "poly")
    config = json.loads((made / "poly" / "config.json").read_text())
    for name, changes in (("short", {"max_position_embeddings": 20}), ("odd", {"model_type": "opt"})):
        shutil.copytree(made / "poly", made / name)
        (made / name / "config.json").write_text(json.dumps(config | changes))
    shutil.copytree(made / "poly", made / "cut")
    weights = made / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(made / "poly", made / "pointer")
    (made / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    changed_model(made / "lacking", lambda held: held.pop("model.layers.3.mlp.down_proj.weight"))
    shutil.copytree(BEFORE / "baked", made / "baked")
    wide = torch.eye(128)[:, :65].contiguous()
    changed_subspace(made / "wide.safetensors", tensors=lambda held: {"layer.2.basis": wide})
    far = torch.eye(128)[:, :4].contiguous()
    changed_subspace(made / "far.safetensors", tensors=lambda held: {"layer.70.basis": far}, n_layers=None)
    (made / "blank.txt").write_text("\n \n")
    (made / "file").write_text("something")
    (made / "old").mkdir()
    (made / "old" / "config.json").write_text("{}")
    for name, text in (
        *(("rank", "[grid]\nrank = [65]"), ("layers", "[grid]\nlayers = ['2-99']"), ("good", "problems = 1")),
        *(("talk", 'chat = "on"'), ("thinks", "thinking = 1")),
        *(("nan", "[grid]\nstrength = [nan]"), ("long", "max_new_tokens = 700"), ("odd", "model = '{odd}'")),
    ):
        (made / f"{name}.toml").write_text(text.format(odd=made / "odd"))
    lines = ({"id": n, "answer": answer, "prompts": {"en": "1", "zh": "1"}} for n, answer in ((1, 2), (2, "many")))
    (made / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (made / "own.toml").write_text(f"problems = '{made}/bad.jsonl'")
    settings = BEGUN | {"model_id": "poly", "seed": 3, "problems": 10}
    for name, file in (("begun", "settings.json"), ("taken", "thesis.txt")):
        (made / f"{name}.partial").mkdir()
        (made / f"{name}.partial" / file).write_text(json.dumps(settings))
    return made


UNKNOWN = r"of a 'opt' model: it is none of the \d+ known model types"


def words(command: str, model: str = "poly", out: str = "new", more: str = "", subspace: str | None = None) -> str:
    """The least that a command needs, with a model, an output and more options."""
    given = f"--model {{folder}}/{model}"
    basis = f"--subspace {subspace or BASIS}"
    form = {
        "collect": f"collect {given} --problems 2",
        "fit": "fit --activations {folder}/none.npz",
        "bake": f"bake {given} {basis}",
        "undo": "bake --undo --model {folder}/baked",
        "lora": f"lora {given} {basis}",
        "verify": f"verify {given} {basis}",
        "eval": f"eval {given} {basis} --problems 1",
        "study": f"study {{folder}}/{more or 'good'}.toml",
        "reproduce": f"reproduce {given} --problems 1",
        "aot": "aot",
    }[command]
    return f"{form} {more if command != 'study' else ''} --out {{folder}}/{out}"


NEW_FILE, NEW_FOLDER, CONTINUED = ("collect", "fit", "verify", "aot"), ("bake", "undo", "lora"), ("study", "reproduce")
WRITERS = (*NEW_FILE, *NEW_FOLDER, "eval", *CONTINUED)
COMPARE = "compare --model {folder}/poly --subspace " + f"{BASIS} --max-new-tokens 8"
LOADERS = ("collect", "bake", "lora", "verify", "eval", "reproduce")
FULL = "full disk"  # in the name of a case: the disk is said to have 1000 bytes left
CASES = {
    **{
        f"{command}: --out exists": (words(command, out="file"), "file' already exists. Choose another --out")
        for command in (*NEW_FILE, *NEW_FOLDER)
    },
    **{
        f"{command}: --out is a folder": (words(command, out="old"), "old' is a folder. Name a file in it.")
        for command in NEW_FILE
    },
    **{
        f"{command}: --out is a file": (words(command, out="file"), "file' is a file. Name a folder.")
        for command in ("eval", *CONTINUED)
    },
    "eval: a run is there": (words("eval", out="old"), "old' already holds a run. Continue it with --resume"),
    "eval: another run is there": (words("eval", out="old", more="--resume"), "old' holds a run with other settings"),
    "study: another is there": (words("study", out="old"), "old' holds a run with other settings"),
    **{f"{c}: in no folder": (words(c, out="file/new"), r"file' is not a folder that you may write") for c in WRITERS},
    **{f"{c}: name not UTF-8": (words(c, out=ODD), "cannot be a file's name here: it is not UTF-8") for c in WRITERS},
    **{f"{c}: name too long": (words(c, out=300 * "x"), r"cannot be a file's name here \(File name") for c in WRITERS},
    **{
        f"{command}: {FULL}": (words(command), r"needs [\d.]+ [MkB]+, but .* has only 1\.0 kB left")
        for command in ("collect", "bake", "lora", "reproduce")
    },
    "undo: " + FULL: (words("undo"), r"needs [\d.]+ [MkB]+, but .* has only 1\.0 kB left"),
    # The model: architecture, files, positions.
    **{f"{c}: architecture": (words(c, "odd"), UNKNOWN) for c in LOADERS},
    "study: architecture": (words("study", more="odd"), UNKNOWN),
    **{f"{c}: file cut off": (words(c, "cut"), r"cut/model\.safetensors' cannot be read .*ends? at") for c in LOADERS},
    **{
        f"{command}: LFS pointer": (words(command, "pointer"), r"is a Git LFS pointer, .*: fetch it with git lfs pull")
        for command in LOADERS
    },
    **{
        f"{command}: tensor missing": (words(command, "lacking"), r"is incomplete: it has no tensor .*layers\.3")
        for command in LOADERS
    },
    "collect: positions": (words("collect", "short"), r"longest prompt has \d+ tokens, but the model has 20 positions"),
    "eval: positions": (words("eval", more="--max-new-tokens 700"), r"positions. Use --max-new-tokens \d+ at most"),
    "study: positions": (words("study", more="long"), r"positions. Use --max-new-tokens \d+ at most"),
    "verify: positions": (words("verify", more="--new-tokens 700"), r"positions"),
    # The subspace against the model.
    **{
        f"{command}: another width": (words(command, "small"), r"the subspace has d_model=128, but the model has 48")
        for command in ("bake", "lora", "verify", "eval")
    },
    **{
        f"{command}: layers beyond": (
            words(command, subspace="{folder}/far.safetensors", more="--force"),
            "the subspace holds layer 70, but the model has 8 layers, 0 to 7",
        )
        for command in ("bake", "lora", "verify", "eval")
    },
    "eval: rank": (words("eval", subspace="{folder}/wide.safetensors", more="--force"), "k=65 columns, but .* 1 to 64"),
    "study: rank": (words("study", more="rank"), r"grid\.rank has 65: choose 1 to 64"),
    "reproduce: rank": (words("reproduce", more="--rank 65"), "--rank is 65: choose 1 to 6"),
    "study: layers": (words("study", more="layers"), "layer"),
    "study: strength": (words("study", more="nan"), "--strength must be"),
    "collect: layers": (words("collect", more="--layers 2-99"), "layer"),
    "collect: one language": (words("collect", more="--languages en"), "at least two languages"),
    "collect: batches of nothing": (words("collect", more="--batch-tokens 0"), "--batch-tokens must be at least 1"),
    "collect: the first token of one": (
        words("collect", more="--pool last --keep-first"),
        "--keep-first is for --pool tokens",
    ),
    "collect: moments and a " + FULL: (words("collect", more="--pool tokens"), r"needs [\d.]+ [MkB]+, but .* has only"),
    "collect: begun with another seed": (words("collect", out="begun"), r"other options: seed is 3 there, 0 here"),
    "collect: begun with other layers": (
        words("collect", out="begun", more="--seed 3 --layers 2-5"),
        r"other options: layers is \[0, 1, 2, 3, 4, 5, 6, 7\] there, \[2, 3, 4, 5\] here",
    ),
    "collect: something else in the way": (words("collect", out="taken"), "is not an unfinished collection"),
    "collect: something else, not removed": (words("collect", out="taken", more="--restart"), "is not an unfinished"),
    "collect: a device and a map": (
        words("collect", more="--device cpu --device-map auto"),
        "--device-map auto chooses the devices itself; leave out --device cpu",
    ),
    "collect: no accelerate": (
        words("collect", more="--device-map auto"),
        r"--device-map auto needs accelerate, which is not installed: pip install accelerate",
    ),
    **{
        f"{command}: no chat template": (
            words(command, more=more),
            r"--chat on needs a chat template, and the tokenizer of 'poly(glot)?' has none\. Use --chat off",
        )
        for command, more in (("collect", "--chat on"), ("eval", "--chat on"), ("study", "talk"))
    },
    "eval: thinking without a chat": (words("eval", more="--chat off --thinking"), "--thinking is for prompts"),
    "study: thinking that is a number": (words("study", more="thinks"), "thinking is 1, not true or false"),
    **{
        f"{command}: a bad line of problems": (
            words(command, more=more),
            r"bad\.jsonl', line 2: the answer is \"many\"",
        )
        for command, more in (
            *((name, "--problems {folder}/bad.jsonl") for name in ("collect", "eval")),
            ("study", "own"),
        )
    },
    "eval: no baked checkpoint": (
        "eval --baked {folder}/poly --problems 1 --out {folder}/new",
        "poly' is not a checkpoint from python -m kernel_surgery.bake",
    ),
    "eval: baked of another model": (
        "eval --baked {folder}/baked --problems 1 --out {folder}/new",
        "baked' was made of another model: its tensors have other names",
    ),
    "compare: no prompt": (COMPARE, r"give one prompt, such as .* or --file FILE"),
    "compare: two": (f"{COMPARE} Add --file {{folder}}/good.toml", "give one prompt"),
    "compare: an empty file": (f"{COMPARE} --file {{folder}}/blank.txt", "blank.txt' holds no prompts: it is empty"),
    "compare: no file": (f"{COMPARE} --file {{folder}}/none.txt", "cannot open .*none.txt"),
    "compare: nothing to write": (f"{COMPARE} Add --max-new-tokens 0", "--max-new-tokens must be at least 1, got 0"),
    "compare: strength": (f"{COMPARE} Add --strength nan", "--strength must be a finite number"),
    "compare: positions": (f"{COMPARE} Add --max-new-tokens 700", r"positions. Use --max-new-tokens \d+ at most"),
    "compare: no chat template": (f"{COMPARE} Add --chat on", "--chat on needs a chat template"),
    "compare: no subspace": ("compare --model {folder}/poly Add", "--mode fused needs --subspace"),
    "compare: another width": (
        f"compare --model {{folder}}/small --subspace {BASIS} Add",
        "the subspace has d_model=128, but the model has 48",
    ),
    "reproduce: languages": (words("reproduce", more="--languages en,fr"), "fr"),
    "reproduce: controls": (words("reproduce", more="--controls gauss:3"), "gauss"),
    "eval: a baked model": (
        words("eval", "baked", subspace=str(BEFORE / "subspace.safetensors")),
        r"baked' was baked: the edit is in its weights already \(rank 4, .*\)\. Evaluate it with --mode original",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_before_the_model_is_loaded(name, folder, monkeypatch):
    import transformers

    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loaded)
    if "no accelerate" in name:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if FULL in name:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    line, message = CASES[name]
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    started = time.monotonic()
    with one_thread():
        status, _, error = call(*(word.format(folder=folder) for word in line.split(" ") if word))
    seconds = time.monotonic() - started
    print(f"{seconds:5.2f} s  {name}: {error.splitlines()[0]}")
    assert status == 2 and error.startswith("error: "), error
    assert re.search(message, error), error
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before, "nothing was written"
    assert seconds < SECONDS
