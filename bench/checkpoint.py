"""Time baking a checkpoint beside copying and hashing it: python -m bench.checkpoint [--out FILE] [--layers N]

The source is a synthetic checkpoint of Qwen2.5-3B's shapes: random bfloat16 weights, about 6 GB. It is made in a
temporary folder and removed afterwards. Each round runs these commands, in changing order:

    cp -r                   the copy alone
    cp -r, then SHA-256     the copy, then `hashlib`'s SHA-256 of its files. This is the yardstick: bake hashes too
    bake                    `python -m kernel_surgery.bake`, with the start of Python and its imports

Peak memory comes from the kernel's accounts. Resident memory includes mapped file pages, anonymous memory does not.
The baked checkpoint is then loaded with transformers and has to generate.

--peers adds two commands that load the whole model into memory and hash nothing. One multiplies the weights by a dense
P in their own dtype, like the script that this project began with. The other is PEFT's merge_and_unload of the adapter
from `python -m kernel_surgery.lora`, which is made beforehand and not timed.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench.parsing import bench_parser
from bench.shapes import QWEN
from bench.store import keep, record
from bench.timing import ends, interleaved, percentiles, ratio, stamp
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.progress import progress_bar

COPY, HASHED = "cp -r", "cp -r, then SHA-256"
DENSE, PEFT = "from_pretrained, dense P @ W, save_pretrained", "from_pretrained, peft merge_and_unload, save_pretrained"


def make_source(folder: Path, layers: int, **changes) -> None:
    """Write a checkpoint of random weights and a matching subspace. Its shapes are QWEN, updated with `changes`."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    from kernel_surgery.models.architectures import default_layers
    from kernel_surgery.models.table import LLAMA
    from kernel_surgery.subspace.artifact import Subspace
    from kernel_surgery.subspace.fingerprint import sample_weights

    folder.mkdir()
    shapes = QWEN | changes | {"num_hidden_layers": layers}
    config = Qwen2Config(**shapes, architectures=["Qwen2ForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    d, ff, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * 128
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    embedding = LLAMA.embedding_name()
    tensors = {embedding: random(config.vocab_size, d), "model.norm.weight": torch.ones(d, dtype=torch.bfloat16)}
    for i in range(layers):
        shapes = {
            **{"mlp.down_proj.weight": (d, ff), "mlp.up_proj.weight": (ff, d), "mlp.gate_proj.weight": (ff, d)},
            **{"self_attn.q_proj.weight": (d, d), "self_attn.q_proj.bias": (d,), "self_attn.o_proj.weight": (d, d)},
            **{
                f"self_attn.{n}_proj.{part}": (kv, d)[: 2 if part == "weight" else 1]
                for n in "kv"
                for part in ("weight", "bias")
            },
            **{"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)},
        }
        tensors |= {f"model.layers.{i}.{name}": random(*shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    wanted = [embedding, *(f"model.layers.{i}.mlp.down_proj.weight" for i in range(layers))]
    marks = sample_weights((name, tensors[name]) for name in wanted)
    bases = {
        i: torch.linalg.qr(torch.randn(d, 10, generator=generator, dtype=torch.float64))[0].float()
        for i in default_layers(layers)
    }
    Subspace(bases, site="mlp_out", n_layers=layers, fingerprint=marks).save(folder.with_name("subspace.safetensors"))


def watched(words: list[str]) -> tuple[float, dict[str, float]]:
    """(seconds, {"resident", "anonymous": peak memory in GB}) of a command. Raises CalledProcessError if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    peak = {"resident": 0.0, "anonymous": 0.0}

    def look():
        while process.poll() is None:
            try:
                text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
            except OSError:
                return
            now = {
                line.split(":")[0]: int(line.split()[1]) / 1e6
                for line in text.splitlines()
                if line.startswith(("VmHWM", "RssAnon"))
            }
            peak["resident"] = max(peak["resident"], now.get("VmHWM", 0.0))
            peak["anonymous"] = max(peak["anonymous"], now.get("RssAnon", 0.0))
            time.sleep(0.02)

    watcher = threading.Thread(target=look)
    watcher.start()
    status = process.wait()
    seconds = time.perf_counter() - began
    watcher.join()
    if status:
        raise subprocess.CalledProcessError(status, words)
    return seconds, peak


HASH_CODE = """
import hashlib, pathlib, subprocess, sys
subprocess.run(["cp", "-r", sys.argv[1], sys.argv[2]], check=True)
for file in pathlib.Path(sys.argv[2]).iterdir():
    with file.open("rb") as opened:
        hashlib.file_digest(opened, "sha256").hexdigest()
"""

# Like the script that this project began with: the whole model in memory, W multiplied by a dense P in its own dtype.
DENSE_CODE = """
import sys
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with safe_open(sys.argv[2], "pt") as file, torch.no_grad():
    for name in file.keys():
        kind, layer, what = name.split(".")
        if what == "basis":
            basis, weight = file.get_tensor(name), model.model.layers[int(layer)].mlp.down_proj.weight
            p = (torch.eye(len(basis)) - basis @ basis.T).to(weight.dtype)
            weight.copy_(p @ weight)
model.save_pretrained(sys.argv[3])
"""

PEFT_CODE = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

GENERATE_CODE = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = torch.arange(100, 132)[None]
out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
assert out.shape == (1, 40) and torch.isfinite(model(out).logits).all()
"""


def check(source: Path, baked: Path, subspace: Path) -> dict[str, float]:
    """{"leak_over_floor", "error_over_bound", "not_correctly_rounded"}: the worst of three layers, from the files.

    The last one is the share of elements that are not the correctly rounded exact value.
    """
    from safetensors import safe_open

    from kernel_surgery.numerics.bounds import baked_element_bound, leak_floor, worst_ratio
    from kernel_surgery.numerics.oracle import bake_oracle, leak_of_weight
    from kernel_surgery.subspace.artifact import Subspace

    space = Subspace.load(subspace)
    worst = {"leak_over_floor": 0.0, "error_over_bound": 0.0, "not_correctly_rounded": 0.0}
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(baked / "model.safetensors", "pt") as new:
        for layer in (space.layers[0], space.layers[len(space.layers) // 2], space.layers[-1]):
            name, basis = f"model.layers.{layer}.mlp.down_proj.weight", space.bases[layer]
            before, after = old.get_tensor(name), new.get_tensor(name)
            ratio = leak_of_weight(after, before, basis) / leak_floor(after, before, basis)
            worst["leak_over_floor"] = max(worst["leak_over_floor"], ratio)
            exact = bake_oracle(before, basis)
            ratio = worst_ratio((after.double() - exact).abs(), baked_element_bound(before, basis))
            worst["error_over_bound"] = max(worst["error_over_bound"], ratio)
            share = float((after != exact.to(after.dtype)).double().mean())
            worst["not_correctly_rounded"] = max(worst["not_correctly_rounded"], share)
    return worst


def hash_rate() -> float:
    """GB/s of hashlib's SHA-256 over a block in memory."""
    block = bytes(2**26)
    began = time.perf_counter()
    hashlib.sha256(block).digest()
    return len(block) / (time.perf_counter() - began) / 1e9


def parser() -> Parser:
    """The command line."""
    p = bench_parser("checkpoint", "Time baking beside copying and hashing.")
    p.add_argument("--out", type=Path, help="JSON file for the rows")
    p.add_argument(
        "--layers", type=int, default=36, help="number of layers; fewer make a smaller checkpoint (default: 36)"
    )
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument(
        "--peers",
        action="store_true",
        help="also time a dense P @ W and PEFT's merge (they load the model into memory)",
    )
    p.add_argument("--folder", type=Path, help="parent of the working folder (default: the system's temporary folder)")
    return p


def run(argv: list[str] | None = None) -> int:
    """Print the ceiling and the table. Returns 1 if the baked file exceeds its bound or 1.1 times its leak floor."""
    args, about = parser().parse_args(argv), stamp(None, "peft")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source, subspace, target = folder / "source", folder / "subspace.safetensors", folder / "target"
        make_source(source, args.layers)
        size = sum(f.stat().st_size for f in source.iterdir())
        print(
            f"{about['device']}: {size / 1e9:.2f} GB, {args.layers} layers; hashing as many bytes of memory takes "
            f"{size / 1e9 / hash_rate():.1f} s",
            flush=True,
        )
        # The model has random weights and no tokenizer: there is no damage to measure.
        given = ["--model", str(source), "--subspace", str(subspace), "--no-damage", "--out"]
        commands = {
            COPY: ["cp", "-r", str(source)],
            HASHED: [sys.executable, "-c", HASH_CODE, str(source)],
            "bake": [sys.executable, "-m", "kernel_surgery.bake", *given],
        }
        if args.peers:
            adapter = str(folder / "adapter")
            make = [sys.executable, "-m", "kernel_surgery.lora", *given, adapter]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
            commands[DENSE] = [sys.executable, "-c", DENSE_CODE, str(source), str(subspace)]
            commands[PEFT] = [sys.executable, "-c", PEFT_CODE, str(source), adapter]
        peaks, checks = {name: [] for name in commands}, {}

        def one(name: str) -> float:
            seconds, peak = watched([*commands[name], str(target)])
            peaks[name].append(peak)
            if name not in (COPY, HASHED, *checks):  # checked in the first round, which is discarded
                checks[name] = check(source, target, subspace)
                if name == "bake":
                    subprocess.run([sys.executable, "-c", GENERATE_CODE, str(target)], check=True)
                    checks[name]["generated_tokens"] = 8
            shutil.rmtree(target)
            return seconds * 1e6

        with progress_bar((args.rounds + 1) * len(commands), "checkpoint", unit="run") as bar:
            times = interleaved({name: lambda name=name: one(name) for name in commands}, args.rounds, bar.update)
    rows, copied = [], percentiles(times[COPY])["us_p50"]
    print(
        f"{'':<57} seconds  of cp -r, then SHA-256   resident GB anonymous leak/floor error/bound not correctly rounded"
    )
    for name, sample in times.items():
        known = {"d": QWEN["hidden_size"], "k": 10, "dtype": "bfloat16", "cache": "warm"} | percentiles(sample)
        known |= {"gbps": 2 * size / known["us_p50"] / 1e3, "fraction_of_copy": copied / known["us_p50"]}
        row = record("checkpoint", "bake", name, **known) | {"gigabytes": size / 1e9, "layers": args.layers}
        row |= ratio(sample, times[HASHED]) | {"rounds": args.rounds, "seconds": [t / 1e6 for t in sample]}
        low, high = ends(row)
        line = f"{name:<57} {row['us_p50'] / 1e6:>7.2f}  {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
        if name in checks:
            row |= {f"peak_{kind}_gb": max(p[kind] for p in peaks[name]) for kind in ("resident", "anonymous")}
            row |= checks[name]
            line += f"{row['peak_resident_gb']:>19.2f} {row['peak_anonymous_gb']:>9.2f}"
            line += f" {row['leak_over_floor']:>10.3f} {row['error_over_bound']:>11.3f}"
            line += f" {row['not_correctly_rounded']:>21.5f}"
        print(line)
        rows.append(row | about)
    keep(args.out, rows)
    own = next(row for row in rows if row["provider"] == "bake")
    print(json.dumps({"case": "checkpoint", "ratio": own["ratio"], "gigabytes": size / 1e9, **about}))
    return 0 if own["leak_over_floor"] <= 1.1 and own["error_over_bound"] <= 1 else 1


if __name__ == "__main__":
    main(run)
