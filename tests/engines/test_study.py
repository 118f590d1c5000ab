"""`compare` and `study` with vLLM: its texts are those of transformers, but for near ties."""

import json
import os

import pytest
import torch

from kernel_surgery.edit.modes import applied
from kernel_surgery.engines import offline
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.evaluation.sidebyside import Pair, shown
from kernel_surgery.models.load import POLYGLOT_SUBSPACE, load_model, load_tokenizer
from kernel_surgery.problems.neutral import neutral
from kernel_surgery.subspace.artifact import Subspace
from tests.support.calls import call
from tests.support.ties import near_ties

pytestmark = pytest.mark.engines

EAGER = '{"enforce_eager": true}'
TOKENS = 48
NEUTRAL = 8  # sentences
PROMPTS = ("Add 238 and 152 together.", "What is 12 times 7?", "把 238 和 152 相加。")
GRID = f"""
engine = "vllm"
engine_args = {{enforce_eager = true}}
problems = 1
languages = ["en"]
max_new_tokens = {TOKENS}
dtype = "float32"
device = "cpu"
[grid]
rank = [2]
strength = [1.0, 2.0]
"""


@pytest.fixture
def wrote(monkeypatch):
    """A list, to which an engine adds a dict after its texts.

    {"variant", "prompts": their token ids, "texts", "log": its log probabilities of neutral text}
    """
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    found, write = [], offline.Engine.texts

    def recorded(self, prompts, **given):
        texts = write(self, prompts, **given)
        log = self.log_probabilities(neutral_tokens())
        found.append({"variant": self.variant, "prompts": prompts, "texts": texts, "log": log})
        return texts

    monkeypatch.setattr(offline.Engine, "texts", recorded)
    return found


def neutral_tokens():
    return [ids[:TOKENS] for ids in load_tokenizer("polyglot")(neutral("test")["en"][:NEUTRAL]).input_ids]


def noise(model, log):
    """The largest difference between an engine's log probabilities of neutral text and transformers'.

    Those of the texts say little: the model is all but certain of its own tokens, so that rounding does not show.
    """
    worst = 0.0
    for ids, theirs in zip(neutral_tokens(), log, strict=True):
        with torch.no_grad():
            own = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        worst = max(worst, float((own[torch.arange(len(theirs)), ids[1:]] - theirs).abs().max()))
    return worst


def same_texts(prompts, one, subspace, strength):
    """The texts that an engine wrote, all of which are transformers' but for near ties."""
    model, tokenizer = load_model("polyglot", torch.float32), load_tokenizer("polyglot")
    assert one["prompts"] == [tokenizer(prompt).input_ids for prompt in prompts]
    texts = [tokenizer.decode(text.ids) for text in one["texts"]]
    mode = "original" if one["variant"].mode == "original" else "fused"
    original = noise(model, one["log"])
    with applied(mode, model, subspace, strength):
        own = generate(model, tokenizer, list(prompts), max_new_tokens=TOKENS)
        theirs = noise(model, one["log"])
        assert near_ties(model, tokenizer, prompts, own, texts, theirs) < len(prompts) / 2
    # Teeth: what the engine computed is the edit, and not the original, which may write the same texts.
    assert mode == "original" or original > 1000 * theirs
    return texts


def test_compare_shows_what_vllm_wrote(wrote, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ("--max-new-tokens", TOKENS, "--dtype", "float32", "--engine", "vllm")
    status, out, error = call("compare", "--file", file, *words, "--engine-args", EAGER)
    assert status == 0, error
    assert [one["variant"].mode for one in wrote] == ["original", "fused"]
    subspace = Subspace.load(POLYGLOT_SUBSPACE)
    sides = [same_texts(PROMPTS, one, subspace, 1.0) for one in wrote]
    pairs = [shown(Pair(*pair), "fused", width=120, colour=False) for pair in zip(PROMPTS, *sides, strict=True)]
    head, *shown_pairs = out.partition("\n\nA few texts do not show")[0].split("\n\n> ")
    assert [f"> {pair}" for pair in shown_pairs] == pairs
    first, second = head.split("\n")
    assert first.startswith("damage: not measured (vLLM ") and second.endswith("greedy decoding in vLLM")


def test_a_study_asks_vllm_for_every_setting_and_every_control(wrote, tmp_path):
    out, grid = tmp_path / "out", tmp_path / "grid.toml"
    grid.write_text(GRID)
    words = (grid, "--out", out, "--controls", "haar:1")
    status, said, error = call("study", *words)
    assert status == 0, error
    assert [one["variant"].mode for one in wrote] == ["original", "fused", "fused", "original", "fused", "haar:00"]
    subspace = Subspace.load(out / "chosen.safetensors")  # both settings have it
    control = wrote.pop()
    samples = {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_bytes().split(b"\n") if line]
        for split in ("dev", "test", "controls")
    }
    for split, at in (("dev", wrote[:3]), ("test", wrote[3:])):
        for number, one in enumerate(at):
            cell = samples[split][5 * number : 5 * number + 5]
            assert [tuple(sample["tokens"]) for sample in cell] == [text.ids for text in one["texts"]]
            strength = 1.0 if one["variant"].settings is None else one["variant"].settings.strength
            texts = same_texts([sample["prompt"] for sample in cell], one, subspace, strength)
            assert [sample["text"] for sample in cell] == texts
    assert [one["variant"].settings.strength for one in wrote[1:3]] == [1.0, 2.0]
    assert [tuple(sample["tokens"]) for sample in samples["controls"]] == [text.ids for text in control["texts"]]
    (note,) = json.loads((out / "study.json").read_text())["notes"]
    assert note.startswith("vLLM ") and " wrote the texts (fused). " in note and note in said
    # Again: no engine is started.
    del wrote[:]
    assert call("study", *words)[0] == 0 and wrote == []
