"""`--engine openai` against `vllm serve`: the texts, verdicts and figures of transformers but for near ties.

One server has the original model and its adapter, another one the plugin. They are processes of their own.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import kernel_surgery
from kernel_surgery.checkpoint.adapter import write_adapter
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.judging import Generation
from kernel_surgery.evaluation.run import evaluate
from kernel_surgery.models.load import POLYGLOT, POLYGLOT_SUBSPACE, load_model, load_tokenizer
from kernel_surgery.subspace.artifact import Subspace
from tests.support.ties import near_ties, noise_of_best

pytestmark = pytest.mark.engines

ROOT = Path(kernel_surgery.__file__).parents[1]
ASKED = {"problems": 2, "languages": "en,zh"}  # ten problems in each language
CELL, LANGUAGES = 10, 2
START_S, IDLE_S = 600, 60


def environment(folders):
    """The environment of a server: on a CPU, offline, and with this very code."""
    path = os.pathsep.join(map(str, [ROOT, *folders, *filter(None, [os.environ.get("PYTHONPATH")])]))
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return os.environ | more | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def serve(name, folders, log, *more):
    """Start a server of the embedded model under a name. Yields its address. It need not answer yet."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(POLYGLOT), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", *more]
    # A session of its own, so that its workers end with it.
    with (
        open(log, "w") as out,
        subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(folders), cwd=log.parent, start_new_session=True
        ) as server,
    ):
        try:
            yield server, f"http://127.0.0.1:{port}/v1"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read().decode()


def wait_for(server, url, log):
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            return get(f"{url}/models")
        except OSError:
            time.sleep(1)
    raise AssertionError(f"no server after {START_S} s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def served(named_vllm, tmp_path_factory):
    """{mode: (name, address)} of two running servers."""
    folder = tmp_path_factory.mktemp("servers")
    write_adapter(POLYGLOT, Subspace.load(POLYGLOT_SUBSPACE), folder / "adapter")
    where = subprocess.run(
        [sys.executable, "-c", "import kernel_surgery; print(kernel_surgery.__file__)"],
        **{"env": environment(named_vllm), "cwd": folder, "capture_output": True, "text": True, "check": True},
    )
    assert where.stdout.strip() == kernel_surgery.__file__
    lora = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "16", "--lora-modules", f"edited={folder}/adapter")
    plugin = ("--additional-config", json.dumps({"kernel_surgery": {"subspace": str(POLYGLOT_SUBSPACE)}}))
    logs = folder / "base.log", folder / "fused.log"
    with (
        serve("base/model@1", named_vllm, logs[0], *lora) as (first, base),
        serve("fused", named_vllm, logs[1], *plugin) as (second, fused),
    ):
        wait_for(first, base, logs[0])
        wait_for(second, fused, logs[1])
        yield {"original": ("base/model@1", base), "lora": ("edited", base), "fused": ("fused", fused)}


def asked_of(served, mode):
    names = [f"{one}={served[one][0]}@{served[one][1]}" for one in ("original", mode)]
    return {"engine": "openai", "served": tuple(names), "mode": mode, "in_flight": 8} | ASKED


def best_of(served, mode):
    """A function for `noise_of_best`: the five best of each token of a prompt, as the server gives them."""
    name, url = served[mode]
    body = {"model": name, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 5}

    def best(full):
        found = [json.loads(get(f"{url}/completions", body | {"prompt": ids}))["choices"][0] for ids in full]
        return [
            [{int(token): held["logprob"] for token, held in (at or {}).items()} for at in one["prompt_logprobs"]]
            for one in found
        ]

    return best


def generation(sample):
    return Generation(tuple(sample["tokens"]), sample["text"], sample["finish"])


def cells_agree(served, mode, theirs, ours):
    """The number of near ties in the cells of `mode`. Every other sample is the same in every field, tokens too."""
    tokenizer, ties = load_tokenizer("polyglot"), 0
    original, model = (load_model("polyglot", torch.float32) for _ in range(2))
    with applied(mode, model, Subspace.load(POLYGLOT_SUBSPACE), 1.0):
        for language in ASKED["languages"].split(","):
            one, other = ours.cells[mode, language], theirs.cells[mode, language]
            prompts, own = [sample["prompt"] for sample in one], [generation(sample) for sample in one]
            noise = noise_of_best(best_of(served, mode), model, tokenizer, prompts, own)
            if mode != "original":  # teeth: what the server computes is far from the original, which has the same texts
                assert noise_of_best(best_of(served, mode), original, tokenizer, prompts, own) > 1000 * noise
            print(f"{mode} {language}:", end=" ")
            ties += near_ties(model, tokenizer, prompts, own, [sample["text"] for sample in other], noise)
            assert all(a == b for a, b in zip(one, other, strict=True) if a["text"] == b["text"])
    return ties


def requests(url):
    """(the requests that a server has finished, those that it has now), by its own count."""
    lines = [line.split() for line in get(url.removesuffix("/v1") + "/metrics").splitlines() if line[:1] not in "#"]
    of = {
        name: sum(float(line[-1]) for line in lines if line[0].startswith(f"vllm:{name}"))
        for name in ("request_success_total", "num_requests_running", "num_requests_waiting")
    }
    return of["request_success_total"], of["num_requests_running"] + of["num_requests_waiting"]


def idle(url):
    until = time.monotonic() + IDLE_S
    while time.monotonic() < until:
        finished, now = requests(url)
        if not now:
            return finished
        time.sleep(0.2)
    raise AssertionError(f"the server still has requests after {IDLE_S} s")


def words(served, mode, folder):
    asked = asked_of(served, mode)
    found = ["eval", "--engine", "openai", "--mode", mode, "--served", *asked["served"]]
    return [*found, "--problems", "2", "--languages", ASKED["languages"], "--in-flight", "2", "--out", str(folder)]


def test_a_fused_servers_texts_are_those_of_transformers(served, tmp_path):
    theirs = evaluate(**asked_of(served, "fused"), out=tmp_path / "server")
    ours = evaluate(mode="fused", no_damage=True, **ASKED, out=tmp_path / "transformers")
    ties = [cells_agree(served, mode, theirs, ours) for mode in ("original", "fused")]
    print(f"near ties of {LANGUAGES * CELL} texts: original {ties[0]}, fused {ties[1]}")
    if not any(ties):
        assert theirs.results["modes"] == ours.results["modes"] and theirs.results["paired"] == ours.results["paired"]


def test_a_run_with_an_adapter_that_is_killed_goes_on_and_asks_nothing_again(served, tmp_path):
    folder, url = tmp_path / "server", served["lora"][1]
    samples = folder / "samples.jsonl"
    command = [sys.executable, "-m", "kernel_surgery", *words(served, "lora", folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not (samples.exists() and samples.read_text().count("\n") >= CELL):
            time.sleep(0.01)
        run.kill()
    assert run.wait() == -signal.SIGKILL, "it was done before it was killed"
    kept = samples.read_text().count("\n") // CELL
    assert 1 <= kept < 2 * LANGUAGES
    # The killed run's connections are closed, so the server gives its requests up.
    before = idle(url)
    theirs = evaluate(**asked_of(served, "lora"), out=folder, resume=True)
    modes = 1 if kept >= LANGUAGES else 2  # of which one token is asked first
    assert idle(url) - before == (2 * LANGUAGES - kept) * CELL + modes
    ours = evaluate(mode="lora", no_damage=True, **ASKED, out=tmp_path / "transformers")
    ties = [cells_agree(served, mode, theirs, ours) for mode in ("original", "lora")]
    print(f"killed after {kept} cells; near ties of {LANGUAGES * CELL} texts: original {ties[0]}, lora {ties[1]}")
