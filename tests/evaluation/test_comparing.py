"""`compare --engine vllm`: an engine writes both texts, one started after the other, and no model is loaded here."""

import pytest

from kernel_surgery.evaluation import comparing, generate
from tests.support.calls import call, one_thread
from tests.support.engine import stand_in

WORDS = ("--strength", -30, "--max-new-tokens", 8)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Add 238 and 152 together.\n把 238 和 152 相加。\n", encoding="utf-8")
    return file


def test_the_engines_write_the_texts_one_after_the_other(prompts, monkeypatch):
    with one_thread():
        here = call("compare", "--file", prompts, *WORDS)[1].splitlines()
        starts = stand_in(monkeypatch)
        for module, name in ((comparing, "load_checked"), (generate, "generate"), (comparing, "compare_texts")):
            monkeypatch.setattr(module, name, None)  # calling it would be an error
        engine = ("--engine", "vllm", "--tensor-parallel", 2, "--engine-args", '{"enforce_eager": true}')
        status, out, error = call("compare", "--file", prompts, *WORDS, *engine)
    assert (status, error) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "damage: not measured (vLLM 0 gives no logits; without --engine, --damage measures it)"
    assert lines[1] == here[1] + " in vLLM" and lines[2:] == here[2:] and "{+" in out
    assert [(s["variant"].mode, s["asked"]) for s in starts] == [("original", [2]), ("fused", [2])]
    assert all(s["options"].tensor_parallel == 2 and s["options"].more == {"enforce_eager": True} for s in starts)
    assert not starts[1]["variant"].settings.subspace.exists(), "what was written for the engine is removed"


@pytest.mark.parametrize("mode", ["baked", "lora"])
def test_what_an_engine_loads_is_written_for_it_and_removed(mode, prompts, monkeypatch):
    starts = stand_in(monkeypatch)
    assert call("compare", "--file", prompts, *WORDS, "--engine", "vllm", "--mode", mode)[0] == 0
    variant = starts[1]["variant"]
    written = variant.adapter if mode == "lora" else variant.model
    assert variant.mode == mode and starts[1]["files"] and not written.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--engine", "vllm", "--damage"), "--damage cannot be measured with --engine vllm: it needs logits"),
        (("--engine", "vllm", "--mode", "hook"), "--mode hook does not exist in --engine vllm"),
        (("--engine", "vllm", "--engine-args", "[]"), "--engine-args must be a JSON object"),
        (("--engine", "vllm", "--tensor-parallel", 0), "--tensor-parallel must be at least 1, got 0"),
        (("--tensor-parallel", 2), "--tensor-parallel is for --engine vllm, not --engine transformers"),
        (("--engine-args", "{}"), "--engine-args is for --engine vllm, not --engine transformers"),
        (("--engine", "openai"), "invalid choice: 'openai'"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_by_name(words, message, monkeypatch):
    starts = stand_in(monkeypatch)
    status, out, error = call("compare", "Add 1 and 2.", *words)
    assert (status, out, starts) == (2, "", []) and message in error
