"""The messages of docs/errors.md, as commands print them.

They come from tests/golden/errors.json, which tests/test_golden.py holds to what the commands say. Nothing is run here.
"""

import json
import shlex
import textwrap
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden" / "errors.json"
# {mark on the page: case of the golden file}.
CASES = {
    "wrong-path": "wrong model path",
    "not-cached": "eval: a model of the hub, offline",
    "unknown-type": "bake: another architecture",
    "missing-shard": "eval: a model without a shard",
    "cut-off": "bake: weights cut short",
    "pickled-weights": "eval: pickled weights",
    "no-cuda": "eval: a device that is not there",
    "no-template": "eval: a chat without a template",
    "other-width": "eval: a subspace of another width",
    "other-weights": "foreign subspace",
    "no-origin": "eval: a subspace of no known model",
    "test-split": "fitted on the problems asked",
    "pickled-npz": "pickled npz",
    "rank": "wrong rank",
    "rank-of-the-operator": "rank beyond the operator's",
    "breaks": "bake: an edit that breaks the model",
    "exists": "bake: a folder that exists",
    "other-settings": "eval: a run with another strength",
    "unfinished": "collect: begun with other options",
    "baked-before": "bake: baked before",
    "baked-offset": "bake: an offset without a bias",
    "adapter-offset": "lora: an offset",
    "bias": "lora: a bias",
    "integers": "bake: integers",
    "changed": "bake: undo of a changed file",
}
# Said where a package, a server or room is missing, which tests/test_reference.py makes so: {mark: (words, message)}.
ELSEWHERE = {
    "gguf": (
        ["eval", "--model", "{tmp}/model.gguf", "--out", "{tmp}/out"],
        ["error: GGUF files need two more packages: pip install gguf accelerate", "Nothing was written."],
    ),
    "full-disk": (
        ["collect", "--device", "cpu", "--out", "{tmp}/acts.safetensors"],
        [
            "error: --out '{tmp}/acts.safetensors' needs 2.1 MB, but '{tmp}' has only 1.0 kB left.",
            "No file was written.",
        ],
    ),
    "no-server": (
        [
            *("eval", "--engine", "openai", "--mode", "original", "--base-url", "http://127.0.0.1:9/v1"),
            *("--served", "original=NAME", "--out", "{tmp}/out"),
        ],
        [
            "error: no list of models from http://127.0.0.1:9/v1/models: Connection error: All connection attempts "
            "failed. Is the server running, and is this its address?",
            "Nothing was written.",
        ],
    ),
    "no-vllm": (
        ["eval", "--engine", "vllm", "--out", "{tmp}/out"],
        [
            "error: --engine vllm needs vLLM, which is not installed here. It pins its own torch, so give it an "
            "environment of its own: docs/engines.md, Installing.",
            "Nothing was written.",
        ],
    ),
}
# Where the tests' files lie, and what a user would type. What a machine decides is left out.
PLACES = {
    "{package}/polyglot/model": "polyglot",
    "{package}/polyglot/subspace.safetensors": "polyglot.safetensors",
    "{tmp}/before/": "",
    "{tmp}/": "",
    "'{tmp}'": "'.'",
    "has {number} CUDA": "has 0 CUDA",
    "{number}": "...",
}
COLUMNS = 84


@cache
def golden() -> dict[str, dict]:
    """Every case: its words, and what the command says."""
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def plain(text: str) -> str:
    """A text with the places of the tests replaced."""
    for place, shown in PLACES.items():
        text = text.replace(place, shown)
    return text


def message(words: list[str], said: list[str]) -> str:
    """One command and its message, as a block of text."""
    stage, *given = words
    command = f"$ python -m kernel_surgery.{stage} {shlex.join(plain(word) for word in given)}"
    wrap = partial(textwrap.wrap, width=COLUMNS, break_long_words=False, break_on_hyphens=False)
    shown = [part for line in said for part in wrap(plain(line), subsequent_indent="  ")]
    return "```text\n" + "\n".join([command, *shown]) + "\n```\n"


def of_case(case: str) -> str:
    """The message of a case of the golden file."""
    held = golden()[case]
    return message(held["words"], [held["error"], *held.get("more", [])])


SECTIONS: dict[str, Callable[[], str]] = {
    **{mark: partial(of_case, case) for mark, case in CASES.items()},
    **{mark: partial(message, *held) for mark, held in ELSEWHERE.items()},
}
