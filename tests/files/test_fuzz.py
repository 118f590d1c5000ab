"""2,000 damaged safetensors files through bake, lora, verify and undo.

Each is one file of a small checkpoint with a seeded change, most of them in the header. Whatever a command says of it,
it is a clean error or a finished work: no traceback, the input unchanged, nothing half-written, and no output that the
format's own library refuses.
"""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kernel_surgery.files.hashing import sha256
from kernel_surgery.subspace.artifact import Subspace
from tests.support.calls import call, one_thread
from tests.support.models import basis, pico

COUNT, GROUP = 2000, 100
EVERYDAY = 1  # groups


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A checkpoint, a subspace, and what bake and lora make of them."""
    made = tmp_path_factory.mktemp("originals")
    size = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 16}
    model = pico("qwen2", dtype=torch.bfloat16, **size)
    model.save_pretrained(made / "model")
    Subspace({1: basis(16, 2)}, site="mlp_out").save(made / "s.safetensors")
    given = ("--model", made / "model", "--subspace", made / "s.safetensors", "--force", "--no-damage", "--out")
    assert call("bake", *given, made / "baked")[0] == 0
    assert call("lora", *given, made / "adapter")[0] == 0
    return made


FILES = (
    *4 * ("model/model.safetensors",),
    *("baked/model.safetensors", "baked/kernel_surgery/undo.safetensors", "s.safetensors"),
    *("adapter/adapter_model.safetensors", "adapter/kernel_surgery/subspace.safetensors"),
)
TOKENS = (
    *("{", "}", "[", "]", '"', ":", ",", "0", "-1", "1e9", "9" * 40, "null", "true", "[]", "{}", '"F32"', '"BF16"'),
    *('"F8_E4M3"', '"I64"', '"X"', '"shape"', '"__metadata__"', "[" * 3000, "NaN", "\\ud800", "\x00", "é"),
)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One seeded change of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = bytearray(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(8)
    at = rng.randrange(len(head))
    if kind == 0:  # bits
        for _ in range(rng.choice((1, 1, 2, 8))):
            head[rng.randrange(len(head))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a digit, the likeliest way to a header that still parses
        digits = [i for i, byte in enumerate(head) if chr(byte).isdigit()]
        for _ in range(rng.choice((1, 1, 2))):
            head[rng.choice(digits)] = ord(rng.choice("0123456789"))
    elif kind == 2:  # a piece left out
        del head[at : at + rng.choice((1, 2, 10, 100))]
    elif kind == 3:  # a piece put in, or in place of another
        word = rng.choice(TOKENS).encode()
        head[at : at + rng.choice((0, 1, len(word)))] = word
    elif kind == 4:  # two pieces exchanged
        other, width = rng.randrange(len(head)), rng.choice((1, 4, 12))
        one, two = head[at : at + width], head[other : other + width]
        head[at : at + width], head[other : other + width] = two, one
    elif kind == 5:  # the file cut off, or with more at its end
        whole = data[: rng.randrange(len(data))] if rng.random() < 0.7 else data + bytes(rng.randrange(1, 40))
        return whole
    elif kind == 6:  # another length of the header
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1))) + data[8:]
    else:  # one field of one tensor
        header = json.loads(bytes(head))
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        value = rng.choice(("F32", "F16", "U8", "", [], [1 << 62, 4], [-1], [2.0], [[1]], None, {}, [0, 0], [1, 0]))
        if rng.random() < 0.3:
            entry.pop(field)
        else:
            entry[field] = value
        head = bytearray(json.dumps(header).encode())
    if rng.random() < 0.5 and kind != 7:  # so that the offsets of the header are right again
        return struct.pack("<Q", len(head)) + bytes(head) + body
    return data[:8] + bytes(head)[:length].ljust(length) + body


def loads(folder: Path) -> None:
    """Every safetensors file of a folder is read whole by the format's own library."""
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                assert tensors.get_tensor(name).shape is not None


def state(folder: Path) -> dict[str, bytes]:
    held = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with open(file := f"{place}/{name}", "rb") as opened:
                held[file] = opened.read()
    return held


def tried(made: Path, seed: int) -> list[int]:
    """Damage one file of a fresh copy and run every command that reads it. Return their exit statuses."""
    rng = random.Random(seed)
    name = rng.choice(FILES)
    file = made / name
    file.write_bytes(damaged(file.read_bytes(), rng))
    record = made / name.split("/")[0] / "provenance.json"
    if record.exists() and rng.random() < 0.7:  # by someone who knew how: the record fits
        said = json.loads(record.read_text())
        said["sha256"]["/".join(name.split("/")[1:])] = sha256(file)
        record.write_text(json.dumps(said))
    model, subspace = ("--model", made / "model"), ("--subspace", made / "s.safetensors", "--force")
    bake, lora = (
        (command, *model, *subspace, "--no-damage", "--out", made / f"new-{command}") for command in ("bake", "lora")
    )
    undo = ("bake", "--undo", "--model", made / "baked", "--out", made / "restored")
    verify = ("verify", "--baked", made / "baked", *model)
    readers = {
        "model": (bake, lora, verify),
        "s.safetensors": (bake, lora),
        "baked": (undo, verify),
        "adapter": (("verify", "--adapter", made / "adapter", *model),),
    }
    statuses, before = [], state(made)
    for command in readers[name.split("/")[0]]:
        status, _, error = call(*command)
        after = state(made)
        assert status in (0, 1, 2), (seed, command[0], error)
        if status == 2:
            assert error.startswith("error: ") and "Traceback" not in error, (seed, command[0], error)
            assert after == before, (seed, command[0], "something was changed or left")
        else:
            kept = {file: after.get(file) for file in before}
            assert kept == before, (seed, command[0], "an input was changed")
            for folder in ("new-bake", "new-lora", "restored"):
                loads(made / folder) if (made / folder).exists() else None
        statuses.append(status)
        before = after
    return statuses


@pytest.mark.parametrize(
    "group", [pytest.param(g, marks=[pytest.mark.slow] if g >= EVERYDAY else []) for g in range(COUNT // GROUP)]
)
def test_a_damaged_file_is_a_clean_error_or_a_finished_work(group, originals, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # no power fails here, and a disk is slow
    refused = 0
    with one_thread():
        for seed in range(group * GROUP, (group + 1) * GROUP):
            made = tmp_path / str(seed)
            shutil.copytree(originals, made)
            refused += any(status != 0 for status in tried(made, seed))
            shutil.rmtree(made)
    print(f"{refused} of {GROUP} were refused by at least one command")
    assert refused > GROUP // 3, "most changes do matter"
