"""Golden files: what the commands say and write, word for word, so that a move of the code is seen to change nothing.

    tests/golden/help/         --help of every command
    tests/golden/errors.json   bad input to every command: the exit status and the message
    tests/golden/run/          a fixed small run of eval, bake, lora, verify, collect, fit, probe and study

python -m tests.test_golden --update writes them all again, after a change that was meant.

What a machine or a day decides (dates, versions, devices, commits, seconds, folders) is replaced by a placeholder
before it is written or compared. Whole numbers, words and yes/no are compared exactly; other numbers to one part in a
thousand (and printed ones to one unit of their last digit), for another CPU sums float32 in another order. Where a
number is itself a rounding error (certificates), it is replaced by the word "number".

The generated pages (README.md, docs/) need no golden file: tests/test_readme.py holds them to `bench.pages`
(test_the_measured_tables_are_what_was_kept, test_the_pictures_are_drawn_from_the_kept_rows).
"""

import contextlib
import functools
import html
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import kernel_surgery
from kernel_surgery.common.names import LANGUAGES
from tests.support.calls import call, one_thread

ROOT = Path(__file__).resolve().parent.parent
GOLDEN, BEFORE = ROOT / "tests" / "golden", ROOT / "tests" / "data" / "before"
PACKAGE = Path(kernel_surgery.__file__).resolve().parent
POLYGLOT = PACKAGE / "polyglot" / "model"
SHIPPED = POLYGLOT.parent / "subspace.safetensors"
STAGES = (
    *("collect", "fit", "aot", "bake", "lora", "verify", "eval", "score", "study", "reproduce", "dequantize"),
    *("compare", "probe", "polyglot.train", "polyglot.card"),
)
UPDATE = "run python -m tests.test_golden --update if the change was meant"
RELATIVE, ABSOLUTE = 1e-3, 1e-6

# ------------------------------------------------------------------------------------------------ comparing


def differences(golden, made, where: str = ""):
    """Where two values of JSON differ, in sentences."""
    if isinstance(golden, dict) and isinstance(made, dict):
        for key in [*golden, *(key for key in made if key not in golden)]:
            if key not in made or key not in golden:
                yield f"{where}.{key} is {'missing' if key in golden else 'new'}"
            else:
                yield from differences(golden[key], made[key], f"{where}.{key}")
        if golden.keys() == made.keys() and list(golden) != list(made):
            yield f"{where}: the order of its fields is {list(made)}, was {list(golden)}"
    elif isinstance(golden, list) and isinstance(made, list):
        if len(golden) != len(made):
            yield f"{where} holds {len(made)}, held {len(golden)}"
        for i, (one, other) in enumerate(zip(golden, made, strict=False)):
            yield from differences(one, other, f"{where}[{i}]")
    elif isinstance(golden, float) and isinstance(made, float):
        if not close(golden, made, room_of(where, golden)):
            yield f"{where} is {made!r}, was {golden!r}"
    elif type(golden) is not type(made) or golden != made:
        yield f"{where} is {made!r}, was {golden!r}"


# The yardstick that runs the model in the other precision is bfloat16 on a CPU. How a CPU sums it depends on the
# instructions that it has, and its figures are those of rounding alone: one CPU's and another's differ by a hundredth.
BFLOAT16, BY_CPU = ("other precision", "run in bfloat16"), 0.1


def room_of(where: str, golden: float) -> float:
    """How far a figure may be off beside `RELATIVE`. where: its path in a file, or its line."""
    return BY_CPU * abs(golden) if any(name in where for name in BFLOAT16) else 0.0


def close(one: float, other: float, room: float = 0.0) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return repr(one) == repr(other)
    return abs(one - other) <= max(RELATIVE * max(abs(one), abs(other)) + ABSOLUTE, room)


NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")


def printed_differences(golden: str, made: str):
    """Where two printed texts differ: spaces as such do not count, and the numbers in the words may be close."""
    one, other = golden.split("\n"), made.split("\n")
    for number, (was, now) in enumerate(zip(one, other, strict=False), 1):
        words = [NUMBER.sub("#", line).split() for line in (was, now)]
        numbers = [NUMBER.findall(line) for line in (was, now)]
        held = all(close_as_printed(a, b, room_of(was, float(a))) for a, b in zip(*numbers, strict=False))
        if words[0] != words[1] or not held:
            yield f"line {number} is {now!r}, was {was!r}"
    if len(one) != len(other):
        yield f"it has {len(other)} lines, had {len(one)}"


def close_as_printed(one: str, other: str, room: float = 0.0) -> bool:
    if one == other:
        return True
    if not any(mark in number for number in (one, other) for mark in ".e"):
        return False
    mantissa, _, exponent = one.partition("e")
    places = len(mantissa.partition(".")[2])
    return close(float(one), float(other), room=max(room, 1.01 * 10.0 ** (int(exponent or 0) - places)))


def exact_differences(golden: str, made: str):
    """Where two texts differ at all."""
    one, other = golden.split("\n"), made.split("\n")
    for number, (was, now) in enumerate(zip(one, other, strict=False), 1):
        if was != now:
            yield f"line {number} is {now!r}, was {was!r}"
    if len(one) != len(other):
        yield f"it has {len(other)} lines, had {len(one)}"


def compared(name: str, golden: str, made: str) -> list[str]:
    """The differences of one file, as its name says how to look at it."""
    if name.endswith(".json"):
        return list(differences(json.loads(golden), json.loads(made)))
    if name.endswith(".jsonl"):
        return list(differences(*([json.loads(line) for line in text.splitlines()] for text in (golden, made))))
    if name.endswith("stdout.txt"):
        return list(printed_differences(golden, made))
    return list(exact_differences(golden, made))


def check(folder: Path, made: dict[str, str]) -> None:
    """Every golden file of a folder against what was made; fails with the first difference of each."""
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    said = [f"{name} is not made any more" for name in sorted(there - made.keys())]
    said += [f"{name} is new" for name in sorted(made.keys() - there)]
    for name in sorted(there & made.keys()):
        found = compared(name, (folder / name).read_text(encoding="utf-8"), made[name])
        if found:
            said.append(f"tests/golden/{folder.name}/{name}: {found[0]} (the first of {len(found)})")
    if said:
        pytest.fail("\n".join([*said, UPDATE]), pytrace=False)


# ---------------------------------------------------------------------------------------------- normalising


def with_places(text: str, **folders: Path) -> str:
    """A text with the folders replaced by their names in braces."""
    for name, folder in folders.items():
        text = text.replace(str(folder), f"{{{name}}}")
    return text


# Replaced whole, wherever they stand: what is in the environment of a record, and the time it took.
PLACEHOLDERS = {"environment": "environment", "versions": "version"}
# Files whose bytes depend on how a CPU rounds, or on the folder that the package lies in.
ROUNDED = {
    **dict.fromkeys(("model.safetensors", "kernel_surgery/undo.safetensors", "adapter_model.safetensors"), "rounded"),
    "adapter_config.json": "names a folder",
}


def normal(value, key: str = "", *, numbers: bool = True):
    """A record without what a machine or a day decides; numbers=False replaces those that are not whole too."""
    if isinstance(value, dict):
        if key in PLACEHOLDERS:
            return {name: f"{{{PLACEHOLDERS[key]}}}" for name in value}
        if key == "sha256":
            return {name: f"{{{ROUNDED[name]}}}" if name in ROUNDED else made for name, made in value.items()}
        return {name: normal(made, name, numbers=numbers) for name, made in value.items()}
    if isinstance(value, list):
        return [normal(made, numbers=numbers) for made in value]
    if key == "seconds" or key == "record_sha256":  # of a record with its environment
        return f"{{{key}}}"
    if isinstance(value, float):
        # Six digits: far finer than what is compared, and an update changes no line for nothing.
        return (float(f"{value:.6g}") if math.isfinite(value) else value) if numbers else "number"
    return with_places(value, package=PACKAGE) if isinstance(value, str) else value


def record(file: Path, *, numbers: bool = True) -> str:
    made = normal(json.loads(file.read_text(encoding="utf-8")), numbers=numbers)
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def records(file: Path) -> str:
    lines = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
    return "".join(json.dumps(normal(line), ensure_ascii=False) + "\n" for line in lines)


def printed(text: str, *, numbers: bool = True) -> str:
    """What a command said, without times; numbers=False replaces those that are not whole, and what hangs on them."""
    text = with_places(text, package=PACKAGE)
    text = re.sub(r"^took \d+ s$", "took {seconds} s", text, flags=re.MULTILINE)
    text = re.sub(r"^(wrote .* )\([\d.]+ (?:bytes|[kMG]B)\)$", r"\1({size})", text, flags=re.MULTILINE)
    text = re.sub(r"about \d+ min", "about {minutes} min", text)
    if not numbers:
        # Which pair of modes lies furthest apart is a matter of roundings too.
        mode = "(?:hook|fused|baked|lora)"
        text = re.sub(rf"\b{mode}-{mode}\b", "pair", text)
        text = NUMBER.sub(lambda found: "number" if "." in found[0] or "e" in found[0] else found[0], text)
        text = re.sub(" {2,}", "  ", text)
    return text


def skeleton(page: str) -> str:
    """The words of report.html, a line for each piece of text: without pictures, and without its figures."""
    page = re.sub("<style.*?</style>", "", page, flags=re.DOTALL)
    page = re.sub("<svg.*?</svg>", "<p>[picture]</p>", page, flags=re.DOTALL)

    def configuration(found: re.Match) -> str:
        made = normal(json.loads(html.unescape(found[2])))
        return found[1] + html.escape(json.dumps(made, indent=2, ensure_ascii=False)) + "</pre>"

    page = re.sub("(Configuration</summary><pre>)(.*?)</pre>", configuration, page, flags=re.DOTALL)
    page = re.sub("</?(?:mark|sub|sup)>", "", page)
    text = html.unescape(re.sub("<[^>]*>", "\n", page))
    lines = [" ".join(re.sub(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?", "#", line).split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


# -------------------------------------------------------------------------------------------------- help


@functools.cache
def help_of(stage: str) -> str:
    environment = os.environ | {"COLUMNS": "120", "PYTHONPATH": str(PACKAGE.parent), "NO_COLOR": "1"}
    words = [sys.executable, "-m", f"kernel_surgery.{stage}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    return with_places(done.stdout, package=PACKAGE)


@pytest.mark.parametrize("stage", STAGES)
def test_help(stage):
    golden = (GOLDEN / "help" / f"{stage}.txt").read_text(encoding="utf-8")
    for found in exact_differences(golden, help_of(stage)):
        pytest.fail(f"tests/golden/help/{stage}.txt: {found}\n{UPDATE}", pytrace=False)


# ------------------------------------------------------------------------------------------------ errors


def changed_subspace(path: Path, source: Path = SHIPPED, tensors=None, **changes) -> Path:
    """A subspace file with other tensors (a function of them) or another provenance."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(source, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        provenance = json.loads(file.metadata()["provenance"]) | changes
    held = held if tensors is None else tensors(held)
    save_file(held, path, metadata={"provenance": json.dumps(provenance)})
    return path


def changed_model(folder: Path, change=None, **config) -> Path:
    """The small model with other fields in its configuration, or other tensors (changed in place)."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(BEFORE / "model", folder)
    file = folder / "config.json"
    made = json.loads(file.read_text(encoding="utf-8")) | config
    file.write_text(json.dumps({name: value for name, value in made.items() if value is not None}))
    if change is not None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# What a collection with the default options keeps beside its batches, and what is known before the model is loaded.
BEGUN = {
    **{"model_id": "polyglot", "split": "fit", "seed": 0, "languages": list(LANGUAGES), "layers": list(range(8))},
    **{"problems": 200, "site": "mlp_out", "pool": "last", "dtype": "float32", "batch_tokens": 1024},
}


def inputs(tmp: Path) -> None:
    """Everything bad that the commands are given, in a folder."""
    import numpy as np
    import torch

    shutil.copytree(BEFORE, tmp / "before")
    (tmp / "folder").mkdir()
    (tmp / "file").write_text("nothing")
    (tmp / "broken.safetensors").write_bytes(b"nothing")
    # Subspaces.
    changed_subspace(tmp / "leaky.safetensors", fit={"split": "test", "rank": 10})
    changed_subspace(tmp / "unnamed.safetensors", fingerprint=None)
    fingerprint = {"dtype": "bfloat16", "samples": {"model.embed_tokens.weight": [0.5]}}
    changed_subspace(tmp / "foreign.safetensors", fingerprint=fingerprint, model_id="somebody/else")
    one = {name: value for name, value in provenance(SHIPPED)["fingerprint"]["samples"].items()}
    one["model.embed_tokens.weight"] = [value + 1 for value in one["model.embed_tokens.weight"]]
    other = {"dtype": "bfloat16", "samples": one}
    changed_subspace(tmp / "other.safetensors", fingerprint=other, model_id="somebody/other")
    changed_subspace(tmp / "layers.safetensors", n_layers=36)
    wide = {f"layer.{i}.basis": torch.eye(128)[:, :65].contiguous() for i in range(2, 6)}
    changed_subspace(tmp / "wide.safetensors", tensors=lambda held: wide)
    changed_subspace(tmp / "empty.safetensors", tensors=lambda held: {"layer.2.mean": held["layer.2.mean"]})
    changed_subspace(tmp / "alien.safetensors", tensors=lambda held: {"weight": torch.zeros(3)})
    nan = {"layer.2.basis": torch.full((128, 10), math.nan)}
    changed_subspace(tmp / "nan.safetensors", tensors=lambda held: held | nan)
    changed_subspace(tmp / "long.safetensors", tensors=lambda held: held | {"layer.3.basis": 2 * held["layer.3.basis"]})
    mixed = torch.eye(128)[:, :9].contiguous()
    changed_subspace(tmp / "mixed.safetensors", tensors=lambda held: held | {"layer.3.basis": mixed})
    beyond = torch.eye(48)[:, :4].contiguous()
    small = tmp / "before" / "subspace.safetensors"
    changed_subspace(tmp / "beyond.safetensors", small, tensors=lambda held: {"layer.40.basis": beyond})
    offsets = {f"layer.{i}.offset": torch.ones(4) for i in range(1, 3)}
    changed_subspace(tmp / "offset.safetensors", small, tensors=lambda held: held | offsets)
    changed_subspace(tmp / "first.safetensors", small, tensors=lambda held: {"layer.0.basis": beyond})
    # Collections that were killed, or look like it.
    for name, file in (("begun", "settings.json"), ("taken", "notes.txt")):
        (tmp / f"{name}.safetensors.partial").mkdir()
        (tmp / f"{name}.safetensors.partial" / file).write_text(json.dumps(BEGUN | {"site": "resid_post"}))
    (tmp / "filed.safetensors.partial").write_text("nothing")
    # Activations.
    rng = np.random.default_rng(0)

    def arrays(name: str, shape=(8, 16), languages=("en", "zh"), **more) -> None:
        made = {f"{lang}_L{i}": rng.normal(size=shape) for lang in languages for i in range(4)} | more
        np.savez(tmp / name, **made)

    arrays("acts.npz")
    arrays("alone.npz", languages=("en",))
    arrays("ragged.npz", zh_L3=rng.normal(size=(7, 16)))
    arrays("layers.npz", zh_L7=rng.normal(size=(8, 16)))
    arrays("named.npz", english=rng.normal(size=(8, 16)))
    arrays("flat.npz", en_L1=rng.normal(size=8))
    arrays("nan.npz", en_L1=np.full((8, 16), np.nan))
    np.savez(tmp / "pickled.npz", en_L0=np.array([{}], dtype=object))
    (tmp / "text.npz").write_text("nothing")
    # Models.
    down = "model.layers.1.mlp.down_proj.weight"
    changed_model(tmp / "opt", model_type="opt")
    changed_model(tmp / "sizeless", hidden_size=None)
    changed_model(tmp / "holes", lambda held: held[down].__setitem__((3, 3), math.nan))
    changed_model(tmp / "whole", lambda held: held.update({down: held[down].to(torch.int8)}))
    changed_model(tmp / "lacking", lambda held: held.pop("model.layers.3.mlp.up_proj.weight"))
    biases = [f"model.layers.{i}.mlp.down_proj.bias" for i in range(4)]
    bias = {name: torch.ones(48, dtype=torch.bfloat16) for name in biases}
    changed_model(tmp / "biased", lambda held: held.update(bias))
    for name in ("short", "weightless", "sharded", "indexed", "configless", "pickled"):
        changed_model(tmp / name)
    cut = tmp / "short" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    for name in ("weightless", "sharded", "indexed", "pickled"):
        (tmp / name / "model.safetensors").unlink()
    (tmp / "pickled" / "pytorch_model.bin").write_bytes(b"nothing")
    index = "model.safetensors.index.json"
    (tmp / "sharded" / index).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    (tmp / "indexed" / index).write_text("[]")
    (tmp / "configless" / "config.json").write_text("{")
    # Baked checkpoints and adapters.
    for name, kind in (("changed", "baked"), ("lost", "baked"), ("rewritten", "baked"), ("odd", "adapter")):
        shutil.copytree(tmp / "before" / kind, tmp / name)
    changed = tmp / "changed" / "config.json"
    changed.write_text(changed.read_text() + " ")
    (tmp / "lost" / "kernel_surgery" / "undo.safetensors").unlink()
    said = json.loads((tmp / "rewritten" / "provenance.json").read_text())
    (tmp / "rewritten" / "provenance.json").write_text(json.dumps(said | {"layers": [1, 3]}))
    (tmp / "odd" / "adapter_config.json").write_text("3")
    # Runs, studies, bundles.
    (tmp / "started").mkdir()
    (tmp / "started" / "results.json").write_text("{}")
    (tmp / "unreadable").mkdir()
    (tmp / "unreadable" / "config.json").write_text("nothing")
    (tmp / "manifest").mkdir()
    (tmp / "manifest" / "manifest.json").write_text('{"kind": "list"}')
    grids = {
        **{"setting": "rank = [1]", "cell": "[grid]\nsize = [1]", "open": "[grid", "single": "[grid]\nrank = 10"},
        **{"hollow": "[grid]\nrank = []", "word": "[grid]\nrank = ['x']", "site": "[grid]\nsite = ['attn']"},
        **{"pool": "[grid]\npool = ['first']", "mode": "mode = 'original'", "test": "test = 'some'"},
        **{"problems": "problems = 0", "budget": "max_new_tokens = 8\nbudget = 9", "language": "languages = ['fr']"},
        **{"device": "device = 'tpu'", "dtype": "dtype = 'float8'", "model": "model = 'nowhere'"},
        "good": "problems = 1",
    }
    for name, text in grids.items():
        (tmp / f"{name}.toml").write_text(text)
    # Texts to be scored.
    line = {"text": "It is 3.", "answer": 3, "language": "en", "prompt": "1 + 2?"}
    texts = {
        **{"words": "nothing", "list": "[]", "empty": "\n", "fraction": json.dumps(line | {"answer": "one"})},
        **{"textless": json.dumps(line | {"text": None}), "prompt": json.dumps(line | {"prompt": 3})},
        **{"french": json.dumps(line | {"language": "fr"}), "yes": json.dumps(line | {"answer": True})},
        **{"huge": json.dumps(line | {"answer": "1e999"}), "scored": json.dumps(line)},
        **{"against": json.dumps(line | {"correct": False, "value": "3"})},
        **{"second": json.dumps(line) + "\n" + json.dumps({"text": "3"})},
    }
    for name, text in texts.items():
        (tmp / f"{name}.jsonl").write_text(text + "\n")


def provenance(file: Path) -> dict:
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return json.loads(tensors.metadata()["provenance"])


# {name: the words, the first of them the command}. {tmp} is the folder of the inputs, {package} the package's own.
_OUT = "--out {tmp}/out"
_MODEL, _SUBSPACE = "--model {tmp}/before/model", "--subspace {tmp}/before/subspace.safetensors"
_SHIPPED = "--subspace {package}/polyglot/subspace.safetensors"
_BAKED, _ADAPTER = "--baked {tmp}/before/baked", "--adapter {tmp}/before/adapter"
_RUN = "--mode hook --problems 1 --max-new-tokens 48 --device cpu --out {tmp}/before/run"
CASES = {
    # The cases of tests/test_commands.py.
    "wrong model path": f"eval --model {{tmp}}/nowhere {_OUT}",
    "folder without a model": f"collect --model {{tmp}}/folder {_OUT}",
    "wrong rank": f"fit --activations {{tmp}}/acts.npz {_OUT} --rank 99",
    "rank zero": f"fit --activations {{tmp}}/acts.npz {_OUT} --rank 0",
    "foreign subspace": f"eval --subspace {{tmp}}/foreign.safetensors {_OUT}",
    "foreign subspace baked": f"bake --model polyglot --subspace {{tmp}}/foreign.safetensors {_OUT}",
    "pickled npz": f"fit --activations {{tmp}}/pickled.npz {_OUT}",
    "layers out of range": f"collect --layers 2-99 {_OUT}",
    "layers not collected": f"fit --activations {{tmp}}/acts.npz --layers 9-12 {_OUT}",
    "layers that are no layers": f"collect --layers two {_OUT}",
    "unknown language": f"eval --languages en,fr {_OUT}",
    "one language": f"collect --languages en {_OUT}",
    "no such subspace": f"eval --subspace {{tmp}}/none.safetensors {_OUT}",
    "not a subspace": f"eval --subspace {{tmp}}/broken.safetensors {_OUT}",
    "too many problems": f"eval --problems 100000 {_OUT}",
    "no subspace for a model": f"eval --model {{package}}/polyglot/model {_OUT}",
    "expag in Spanish": f"eval --protocol expag --languages es {_OUT}",
    "unknown mode": f"eval --mode magic {_OUT}",
    "budget of nothing": f"eval --max-new-tokens 0 {_OUT}",
    "resume without a folder": "eval --resume",
    "rank beyond the operator's": f"eval --subspace {{tmp}}/wide.safetensors {_OUT}",
    "fitted on the problems asked": f"eval --subspace {{tmp}}/leaky.safetensors {_OUT}",
    "unknown controls": f"eval --controls gauss:3 {_OUT}",
    "controls of the original": f"eval --mode original --controls haar:3 {_OUT}",
    "margin of nothing": f"eval --margin 0 {_OUT}",
    "no certificate": f"eval --certificate {{package}}/polyglot/model/config.json {_OUT}",
    "strength nan": f"eval --strength nan {_OUT}",
    "bake at strength nan": f"bake --model polyglot --strength nan {_SHIPPED} {_OUT}",
    # More of eval.
    "eval: no such option": f"eval --no-such-option {_OUT}",
    "eval: an abbreviated option": f"eval --max-new 3 {_OUT}",
    "eval: an option without its value": "eval --out",
    "eval: problems that are no number": f"eval --problems some {_OUT}",
    "eval: no problems": f"eval --problems 0 {_OUT}",
    "eval: unknown protocol": f"eval --protocol loose {_OUT}",
    "eval: unknown dtype": f"eval --dtype float8 {_OUT}",
    "eval: unknown device": f"eval --device tpu {_OUT}",
    "eval: a device that is not there": f"eval --device cuda:99 {_OUT}",
    "eval: batches of nothing": f"eval --batch-size 0 {_OUT}",
    "eval: expag with a number of problems": f"eval --protocol expag --problems 3 {_OUT}",
    "eval: expag with controls": f"eval --protocol expag --controls haar:3 {_OUT}",
    "eval: no controls": f"eval --controls haar:0 {_OUT}",
    "eval: a model that is a file": f"eval --model {{tmp}}/file {_OUT}",
    "eval: a model that is no name": f"eval --model one/two/three {_OUT}",
    "eval: a model of the hub, offline": f"eval --model somebody/nothing {_SHIPPED} {_OUT}",
    "eval: a model without a tokenizer": f"eval {_MODEL} {_SUBSPACE} --device cpu {_OUT}",
    "eval: a model without weights": f"eval --model {{tmp}}/weightless {_SUBSPACE} {_OUT}",
    "eval: a model without a shard": f"eval --model {{tmp}}/sharded {_SUBSPACE} {_OUT}",
    "eval: an index that is none": f"eval --model {{tmp}}/indexed {_SUBSPACE} {_OUT}",
    "eval: pickled weights": f"eval --model {{tmp}}/pickled {_SUBSPACE} {_OUT}",
    "eval: a missing tensor": f"eval --model {{tmp}}/lacking {_SUBSPACE} --device cpu {_OUT}",
    "eval: weights cut short": f"eval --model {{tmp}}/short {_SUBSPACE} --device cpu {_OUT}",
    "eval: a subspace of another width": f"eval {_SUBSPACE} --device cpu {_OUT}",
    "eval: a subspace of another depth": f"eval --subspace {{tmp}}/layers.safetensors --device cpu {_OUT}",
    "eval: a subspace of other weights": f"eval --subspace {{tmp}}/other.safetensors --device cpu {_OUT}",
    "eval: a subspace of no known model": f"eval --subspace {{tmp}}/unnamed.safetensors {_OUT}",
    "eval: a subspace without a basis": f"eval --subspace {{tmp}}/empty.safetensors {_OUT}",
    "eval: a subspace of other tensors": f"eval --subspace {{tmp}}/alien.safetensors {_OUT}",
    "eval: a subspace of NaN": f"eval --subspace {{tmp}}/nan.safetensors {_OUT}",
    "eval: a basis that is not orthonormal": f"eval --subspace {{tmp}}/long.safetensors {_OUT}",
    "eval: bases of two ranks": f"eval --subspace {{tmp}}/mixed.safetensors {_OUT}",
    "eval: a certificate that is not there": f"eval --certificate {{tmp}}/none.json {_OUT}",
    "eval: a certificate that is no JSON": f"eval --certificate {{tmp}}/file {_OUT}",
    "eval: a folder that holds a run": f"eval {_RUN}",
    "eval: a run with another strength": f"eval {_RUN} --resume --strength 2",
    "eval: results without a run": "eval --device cpu --out {tmp}/started",
    "eval: a run that cannot be read": "eval --device cpu --resume --out {tmp}/unreadable",
    "eval: a chat without a template": f"eval --chat on --device cpu {_OUT}",
    # probe.
    "probe: no output": "probe",
    "probe: controls that are none": f"probe --controls haar {_OUT}",
    "probe: one language": f"probe --languages en {_OUT}",
    "probe: fitted on the problems asked": f"probe --subspace {{tmp}}/leaky.safetensors --device cpu {_OUT}",
    "probe: a foreign subspace": f"probe --subspace {{tmp}}/foreign.safetensors --device cpu {_OUT}",
    "probe: no subspace for a model": f"probe --model {{package}}/polyglot/model {_OUT}",
    # More of collect.
    "collect: no output": "collect",
    "collect: unknown site": f"collect --site attn {_OUT}",
    "collect: unknown pooling": f"collect --pool first {_OUT}",
    "collect: unknown split": f"collect --split train {_OUT}",
    "collect: no language": f"collect --languages , {_OUT}",
    "collect: no problems": f"collect --problems 0 {_OUT}",
    "collect: batches of nothing": f"collect --batch-tokens 0 {_OUT}",
    "collect: the first token of one vector": f"collect --pool last --keep-first {_OUT}",
    "collect: a device and a map": f"collect --device cpu --device-map auto {_OUT}",
    "collect: unknown map of devices": f"collect --device-map spread {_OUT}",
    "collect: begun with other options": "collect --seed 1 --device cpu --out {tmp}/begun.safetensors",
    "collect: something else where batches would lie": "collect --device cpu --out {tmp}/taken.safetensors",
    "collect: a file where batches would lie": "collect --device cpu --out {tmp}/filed.safetensors",
    "collect: a layer twice": f"collect --layers 2,2 --device cpu {_OUT}",
    "collect: layers backwards": f"collect --layers 5-2 --device cpu {_OUT}",
    "collect: unknown device": f"collect --device tpu {_OUT}",
    "collect: a model without a tokenizer": f"collect {_MODEL} --device cpu {_OUT}",
    # More of fit.
    "fit: no activations": f"fit {_OUT}",
    "fit: activations that are not there": f"fit --activations {{tmp}}/none.npz {_OUT}",
    "fit: no safetensors": f"fit --activations {{tmp}}/broken.safetensors {_OUT}",
    "fit: no npz": f"fit --activations {{tmp}}/text.npz {_OUT}",
    "fit: one language": f"fit --activations {{tmp}}/alone.npz {_OUT}",
    "fit: ragged": f"fit --activations {{tmp}}/ragged.npz {_OUT}",
    "fit: other layers in one language": f"fit --activations {{tmp}}/layers.npz {_OUT}",
    "fit: an entry of another name": f"fit --activations {{tmp}}/named.npz {_OUT}",
    "fit: an entry of another shape": f"fit --activations {{tmp}}/flat.npz {_OUT}",
    "fit: NaN": f"fit --activations {{tmp}}/nan.npz {_OUT}",
    "fit: unknown site": f"fit --activations {{tmp}}/acts.npz --site attn {_OUT}",
    "fit: unknown method": f"fit --activations {{tmp}}/acts.npz --method magic {_OUT}",
    "fit: another model than it says": (
        f"fit --activations {{tmp}}/before/study/activations-mlp_out-last.safetensors --model-id somebody/else {_OUT}"
    ),
    # More of bake.
    "bake: no model": f"bake {_SUBSPACE} {_OUT}",
    "bake: no subspace": f"bake {_MODEL} {_OUT}",
    "bake: a subspace and undo": f"bake {_MODEL} {_SUBSPACE} --undo {_OUT}",
    "bake: a folder that exists": f"bake {_MODEL} {_SUBSPACE} --out {{tmp}}/folder",
    "bake: baked before": f"bake --model {{tmp}}/before/baked {_SUBSPACE} {_OUT}",
    "bake: a subspace that is not there": f"bake {_MODEL} --subspace {{tmp}}/none.safetensors {_OUT}",
    "bake: another architecture": f"bake --model {{tmp}}/opt {_SUBSPACE} {_OUT}",
    "bake: a configuration without a size": f"bake --model {{tmp}}/sizeless {_SUBSPACE} {_OUT}",
    "bake: a configuration that is none": f"bake --model {{tmp}}/configless {_SUBSPACE} {_OUT}",
    "bake: NaN": f"bake --model {{tmp}}/holes {_SUBSPACE} {_OUT} --no-damage",
    "bake: integers": f"bake --model {{tmp}}/whole {_SUBSPACE} --force {_OUT}",
    "bake: weights cut short": f"bake --model {{tmp}}/short {_SUBSPACE} {_OUT}",
    "bake: a layer that is not there": f"bake {_MODEL} --subspace {{tmp}}/beyond.safetensors {_OUT}",
    "bake: a subspace of another width": f"bake {_MODEL} {_SHIPPED} --force {_OUT}",
    "bake: undo of what was not baked": f"bake --undo {_MODEL} {_OUT}",
    "bake: undo of a changed file": f"bake --undo --model {{tmp}}/changed {_OUT}",
    "bake: undo into a folder that exists": "bake --undo --model {tmp}/before/baked --out {tmp}/folder",
    "bake: an offset without a bias": f"bake {_MODEL} --subspace {{tmp}}/offset.safetensors {_OUT}",
    "bake: an edit that breaks the model": f"bake --model polyglot {_SHIPPED} --strength 30 --languages en {_OUT}",
    # lora.
    "lora: an offset": f"lora {_MODEL} --subspace {{tmp}}/offset.safetensors {_OUT}",
    "lora: no subspace": f"lora {_MODEL} {_OUT}",
    "lora: strength without end": f"lora {_MODEL} {_SUBSPACE} --strength inf {_OUT}",
    "lora: a folder that exists": f"lora {_MODEL} {_SUBSPACE} --out {{tmp}}/folder",
    "lora: baked before": f"lora --model {{tmp}}/before/baked {_SUBSPACE} {_OUT}",
    "lora: a foreign subspace": f"lora --model polyglot --subspace {{tmp}}/foreign.safetensors {_OUT}",
    "lora: a bias": f"lora --model {{tmp}}/biased {_SUBSPACE} {_OUT}",
    "lora: NaN": f"lora --model {{tmp}}/holes {_SUBSPACE} {_OUT} --no-damage",
    "lora: no model at the path": f"lora --model {{tmp}}/nowhere {_SUBSPACE} {_OUT}",
    # verify.
    "verify: nothing": "verify",
    "verify: two at a time": f"verify {_BAKED} {_ADAPTER}",
    "verify: a folder that is not there": "verify --baked {tmp}/nowhere",
    "verify: what is not baked": "verify --baked {tmp}/before/model",
    "verify: what is no adapter": "verify --adapter {tmp}/before/baked",
    "verify: what is not restored": "verify --restored {tmp}/before/baked",
    "verify: an adapter that is not there": "verify --adapter {tmp}/nowhere",
    "verify: no prompts": "verify --model polyglot --prompts 0",
    "verify: too many prompts": "verify --model polyglot --prompts 257",
    "verify: new tokens below none": "verify --model polyglot --new-tokens -1",
    "verify: strength nan": "verify --model polyglot --strength nan",
    "verify: no subspace for a model": f"verify {_MODEL}",
    "verify: output where the plot goes": "verify --model polyglot --out {tmp}/out.svg",
    "verify: output where the page goes": "verify --model polyglot --out {tmp}/out.html",
    "verify: another strength": f"verify {_BAKED} --strength 2",
    "verify: another dtype": f"verify {_BAKED} {_MODEL} {_SUBSPACE} --dtype float32",
    "verify: another subspace": f"verify {_BAKED} {_SHIPPED}",
    "verify: other layers": f"verify {_BAKED} --subspace {{tmp}}/first.safetensors",
    "verify: layers that were not edited": "verify --baked {tmp}/rewritten",
    "verify: a record that is lost": "verify --baked {tmp}/lost",
    "verify: an adapter's configuration that is none": "verify --adapter {tmp}/odd",
    "verify: unknown device": f"verify {_MODEL} {_SUBSPACE} --device tpu",
    "verify: a model of integers": f"verify --model {{tmp}}/whole {_SUBSPACE} --force",
    # score.
    "score: no file": "score",
    "score: a file that is not there": "score {tmp}/none.jsonl",
    "score: a folder": "score {tmp}/folder",
    "score: no JSON": "score {tmp}/words.jsonl",
    "score: a list": "score {tmp}/list.jsonl",
    "score: no lines": "score {tmp}/empty.jsonl",
    "score: no text": "score {tmp}/textless.jsonl",
    "score: a field missing in the second line": "score {tmp}/second.jsonl",
    "score: a prompt that is a number": "score {tmp}/prompt.jsonl",
    "score: an answer that is yes": "score {tmp}/yes.jsonl",
    "score: an answer that is no number": "score {tmp}/fraction.jsonl",
    "score: an answer of too many digits": "score {tmp}/huge.jsonl",
    "score: unknown language": "score {tmp}/french.jsonl",
    "score: labels that are not there": "score {tmp}/scored.jsonl --labels",
    "score: labels that contradict themselves": "score {tmp}/against.jsonl --labels",
    # study.
    "study: no output": "study {tmp}/good.toml",
    "study: no declaration": f"study {_OUT}",
    "study: a declaration that is not there": f"study {{tmp}}/none.toml {_OUT}",
    "study: unknown setting": f"study {{tmp}}/setting.toml {_OUT}",
    "study: unknown setting of the grid": f"study {{tmp}}/cell.toml {_OUT}",
    "study: no TOML": f"study {{tmp}}/open.toml {_OUT}",
    "study: a number for a list": f"study {{tmp}}/single.toml {_OUT}",
    "study: an empty list": f"study {{tmp}}/hollow.toml {_OUT}",
    "study: a rank that is a word": f"study {{tmp}}/word.toml {_OUT}",
    "study: unknown site": f"study {{tmp}}/site.toml {_OUT}",
    "study: unknown pooling": f"study {{tmp}}/pool.toml {_OUT}",
    "study: the original as mode": f"study {{tmp}}/mode.toml {_OUT}",
    "study: unknown test": f"study {{tmp}}/test.toml {_OUT}",
    "study: no problems": f"study {{tmp}}/problems.toml {_OUT}",
    "study: budget beyond the texts": f"study {{tmp}}/budget.toml {_OUT}",
    "study: unknown language": f"study {{tmp}}/language.toml {_OUT}",
    "study: unknown device": f"study {{tmp}}/device.toml {_OUT}",
    "study: unknown dtype": f"study {{tmp}}/dtype.toml {_OUT}",
    "study: no model": f"study {{tmp}}/model.toml {_OUT}",
    "study: unknown controls": f"study {{tmp}}/good.toml --controls gauss:3 {_OUT}",
    "study: another declaration": "study {tmp}/good.toml --out {tmp}/before/study",
    # reproduce.
    "reproduce: nothing": "reproduce",
    "reproduce: a model without a folder": "reproduce --model polyglot",
    "reproduce: a folder without a model": f"reproduce {_OUT}",
    "reproduce: make and check": f"reproduce --model polyglot {_OUT} --check {{tmp}}/before/bundle",
    "reproduce: unknown mode": f"reproduce --model polyglot --mode magic {_OUT}",
    "reproduce: no bundle": "reproduce --check {tmp}/folder",
    "reproduce: a bundle that is not there": "reproduce --check {tmp}/nowhere",
    "reproduce: a manifest of something else": "reproduce --check {tmp}/manifest",
    # The rest.
    "aot: no such option": "aot --sm 90",
    "polyglot.train: no output": "polyglot.train",
    "polyglot.train: unknown precision": f"polyglot.train --precision float16 {_OUT}",
    "polyglot.train: steps that are no number": f"polyglot.train --steps many {_OUT}",
    "polyglot.card: no results": "polyglot.card",
    "polyglot.card: results that are not there": "polyglot.card --results {tmp}/folder",
    "polyglot.card: results of something else": "polyglot.card --results {tmp}/before/bundle",
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        file.relative_to(folder).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in folder.rglob("*")
    }


def error_of(name: str, tmp: Path) -> dict:
    """One case: its words, the status, what it said on stderr; and what it printed or wrote (it should not)."""
    words = CASES[name].split()
    before = tree(tmp)
    stage, *given = [word.format(tmp=tmp, package=PACKAGE) for word in words]
    status, out, err = call(stage, *given)
    err = with_places(err, tmp=tmp, package=PACKAGE)
    # A parser names the program that runs, which here is pytest.
    err = re.sub(r"\(see .* --help\)$", "(see {program} --help)", err, flags=re.MULTILINE)
    # Python writes the choices with quotes or without, by its version.
    err = re.sub(r"\(choose from [^)]*\)", lambda found: found[0].replace("'", ""), err)
    err = re.sub(r"this machine has \d+ CUDA", "this machine has {number} CUDA", err)
    # Measured: its digits depend on how a CPU rounds.
    if "BROKEN" in err:
        err = re.sub(r"\d+\.\d+", "{number}", err)
    # The words of another library.
    err = re.sub(r"(Error while deserializing header: )[^)\n]*", r"\1{reason}", err)
    first, *more = err.splitlines() or [""]
    made = {"words": words, "status": status, "error": first}
    if more:
        made["more"] = more
    if out:
        made["out"] = with_places(out, tmp=tmp, package=PACKAGE)
    if written := sorted(path for path, about in tree(tmp).items() if before.get(path) != about):
        made["written"] = written
    return made


@contextlib.contextmanager
def inside(folder: Path):
    """The working folder, for a while."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors").resolve()
    inputs(folder)
    return folder


@functools.cache
def golden_errors() -> dict:
    return json.loads((GOLDEN / "errors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_error(name, bad):
    with inside(bad):
        made = error_of(name, bad)
    for found in differences(golden_errors()[name], made, name):
        pytest.fail(f"tests/golden/errors.json: {found}\n{UPDATE}", pytrace=False)


def test_the_table_of_errors_is_of_these_cases_and_each_is_one_clear_error():
    assert list(golden_errors()) == list(CASES)
    for name, row in golden_errors().items():
        assert row["status"] == 2 and row["error"].startswith("error: ") and "Traceback" not in row["error"], name
        # The damage comes before the weights are read: it cannot be measured of a model that cannot be loaded.
        said = row.get("out", "damage: not measured (")
        assert said.startswith("damage: not measured (") and said.count("\n") <= 1, name
        assert row.keys() <= {"words", "status", "error", "more", "out"}, f"{name}: it writes something all the same"


# --------------------------------------------------------------------------------------------- a small run

GRID = """\
mode = "hook"
problems = 1
max_new_tokens = 24
device = "cpu"

[grid]
rank = [2, 10]
"""


def small_run(folder: Path) -> dict[str, str]:
    """{golden file: what it should hold} of a fixed run of the commands, made in an empty folder."""
    made: dict[str, str] = {}

    def done(name: str, stage: str, *words, numbers: bool = True) -> None:
        status, out, err = call(stage, *words)
        assert (status, err) == (0, ""), f"{stage} {words}: {status} {err}"
        made[f"{name}/stdout.txt"] = printed(out, numbers=numbers)

    def keep(name: str, file: str, **options) -> None:
        path = Path(name) / file
        made[f"{name}/{file}"] = record(path, **options) if file.endswith(".json") else records(path)

    def listing(name: str) -> None:
        files = sorted(f.relative_to(name).as_posix() for f in Path(name).rglob("*") if f.is_file())
        made[f"{name}/files.txt"] = "\n".join(files) + "\n"

    with inside(folder), one_thread():
        words = ("--mode", "all", "--problems", 1, "--max-new-tokens", 48, "--languages", "en,zh", "--seed", 3)
        done("eval", "eval", *words, "--controls", "haar:2", "--device", "cpu", "--out", "eval")
        for file in ("config.json", "results.json", "samples.jsonl", "controls.jsonl"):
            keep("eval", file)
        made["eval/report.txt"] = skeleton((folder / "eval" / "report.html").read_text(encoding="utf-8"))
        polyglot = ("--model", "polyglot", "--subspace", SHIPPED)
        done("baked", "bake", *polyglot, "--out", "baked")
        done("adapter", "lora", *polyglot, "--out", "adapter")
        for name in ("baked", "adapter"):
            keep(name, "provenance.json")
            made[f"{name}/README.md"] = (folder / name / "README.md").read_text(encoding="utf-8")
        keep("adapter", "adapter_config.json")
        words = ("--baked", "baked", *polyglot, "--prompts", 2, "--new-tokens", 1, "--device", "cpu")
        Path("certificate").mkdir()
        done("certificate", "verify", *words, "--out", "certificate/certificate.json", numbers=False)
        keep("certificate", "certificate.json", numbers=False)
        done("collect", "collect", "--problems", 1, "--device", "cpu", "--out", "collect/acts.safetensors")
        done("fit", "fit", "--activations", "collect/acts.safetensors", "--out", "fit/space.safetensors", "--rank", 3)
        for name, file in (("collect", "acts.safetensors"), ("fit", "space.safetensors")):
            about = normal(provenance(folder / name / file))
            made[f"{name}/provenance.json"] = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
            made[f"{name}/tensors.json"] = json.dumps(shapes(folder / name / file), indent=1) + "\n"
        words = ("--controls", "haar:1,energy:1", "--probed", 5, "--languages", "en,zh", "--device", "cpu")
        done("probe", "probe", *words, "--out", "probe", numbers=False)  # another CPU may turn a token or two
        keep("probe", "probe.json", numbers=False)
        Path("grid.toml").write_text(GRID, encoding="utf-8")
        done("study", "study", "grid.toml", "--out", "study")
        for file in ("config.json", "study.json", "frozen.json", "dev.jsonl", "test.jsonl"):
            keep("study", file)
        for name in ("eval", "baked", "adapter", "certificate", "probe", "study"):
            listing(name)
    return made


def shapes(file: Path) -> dict[str, str]:
    """{tensor: dtype and shape} of a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        held = {name: tensors.get_slice(name) for name in sorted(tensors.keys())}
        return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in held.items()}


@pytest.mark.slow
def test_a_small_run(tmp_path):
    check(GOLDEN / "run", small_run(tmp_path.resolve()))


# ------------------------------------------------------------------------- the comparison itself can fail


def test_another_number_word_or_field_is_seen():
    golden = {"a": [1, 0.5, {"b": None}], "word": "yes", "sure": True}
    assert not list(differences(golden, json.loads(json.dumps(golden))))
    assert not list(differences(golden, golden | {"a": [1, 0.5004, {"b": None}]}))
    for made, said in (
        (golden | {"a": [2, 0.5, {"b": None}]}, ".a[0] is 2, was 1"),
        (golden | {"a": [1, 0.501, {"b": None}]}, ".a[1] is 0.501, was 0.5"),
        (golden | {"a": [1, 0.5, {}]}, ".a[2].b is missing"),
        (golden | {"a": [1, 0.5]}, ".a holds 2, held 3"),
        (golden | {"sure": 1}, ".sure is 1, was True"),
        (golden | {"word": "Yes"}, ".word is 'Yes', was 'yes'"),
        (golden | {"more": 1}, ".more is new"),
        (dict(reversed(golden.items())), "the order of its fields"),
    ):
        assert any(said in found for found in differences(golden, made)), said
    rounding = {"yardsticks": {"other precision": {"kl": 2.0}, "8 bits": {"kl": 2.0}}}
    for name, factor, seen in (("other precision", 1.05, 0), ("other precision", 1.2, 1), ("8 bits", 1.05, 1)):
        made = {"yardsticks": rounding["yardsticks"] | {name: {"kl": 2.0 * factor}}}
        assert len(list(differences(rounding, made))) == seen
    assert not list(printed_differences("run in bfloat16 0.0100", "run in bfloat16 0.0105"))
    assert list(printed_differences("run in bfloat16 0.0100", "run in bfloat16 0.0120"))
    text = "en 3/5 right, 0.600 (0.23 to 0.88), 1.2e-05\n"
    assert not list(printed_differences(text, text.replace("0.600", "0.601").replace(" right", "  right")))
    for one, other in (("3/5", "2/5"), ("0.600", "0.602"), ("right", "wrong"), ("1.2e-05", "1.4e-05"), ("\n", " x\n")):
        assert list(printed_differences(text, text.replace(one, other))), one


def update() -> None:
    """Write every golden file again."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    made = {f"help/{stage}.txt": help_of(stage) for stage in STAGES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "errors").mkdir()
        (folder / "run").mkdir()
        inputs(folder / "errors")
        with inside(folder / "errors"):
            table = {case: error_of(case, folder / "errors") for case in CASES}
        made["errors.json"] = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
        made |= {f"run/{file}": text for file, text in small_run(folder / "run").items()}
    for file, text in made.items():
        (GOLDEN / file).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / file).write_bytes(text.encode())
    print(f"tests/golden: {len(made)} files")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("error: python -m tests.test_golden --update")
    importlib.import_module("tests.conftest")  # the network is off, as in the tests
    update()
