"""Greedy texts depend on the model and the prompt, not on the batch, and on no knob a checkpoint brings along."""

import pytest
import torch

from kernel_surgery.evaluation.generate import generate
from kernel_surgery.models.load import load_model, load_tokenizer
from kernel_surgery.problems.generator import problems
from tests.support.models import pico

BUDGET = 160


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("polyglot")


@pytest.fixture
def model():
    return load_model("polyglot", torch.float32)


def two_best(model, tokenizer, prompt, ids):
    """Gap between the two best logits after `ids`, alone in its batch."""
    full = torch.tensor([tokenizer(prompt).input_ids + list(ids)])
    with torch.no_grad():
        top = model(input_ids=full).logits[0, -1].topk(2).values
    return float(top[0] - top[1])


@pytest.mark.slow
def test_batch_1_and_batch_32_write_the_same_texts(model, tokenizer):
    """A difference is allowed only where the two best logits are within 1e-4 of each other, and it is printed."""
    asked = problems("test", 7)[:32]
    # One whole batch each; alone, where every text takes as long as that batch, some of them.
    for language, every in (("en", 4), ("zh", 8)):
        prompts = [p.prompts[language] for p in asked]
        together = generate(model, tokenizer, prompts, max_new_tokens=BUDGET, batch_size=32)[::every]
        prompts = prompts[::every]
        alone = generate(model, tokenizer, prompts, max_new_tokens=BUDGET, batch_size=1)
        for prompt, a, b in zip(prompts, together, alone, strict=True):
            if a.ids == b.ids:
                continue
            at = next(t for t, (x, y) in enumerate(zip((*a.ids, -1), (*b.ids, -1), strict=False)) if x != y)
            gap = two_best(model, tokenizer, prompt, a.ids[:at])
            print(f"{language}: {prompt!r} differs at token {at}, gap of the two best logits {gap:.1e}")
            assert gap < 1e-4


def test_the_padding_mask_is_what_makes_that_true(tokenizer, monkeypatch):
    """Teeth, on random weights (a trained model may shrug off a few pads): with padding attended to, texts change."""
    random = pico("qwen2", vocab_size=len(tokenizer))
    prompts = [p.prompts["en"] for p in problems("test", 2)]
    alone = [generate(random, tokenizer, [prompt], max_new_tokens=16)[0] for prompt in prompts]
    right = generate(random, tokenizer, prompts, max_new_tokens=16, batch_size=len(prompts))
    assert [g.ids for g in right] == [g.ids for g in alone]
    real = random.generate

    def unmasked(**kwargs):
        return real(**kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])})

    monkeypatch.setattr(random, "generate", unmasked)
    wrong = generate(random, tokenizer, prompts, max_new_tokens=16, batch_size=len(prompts))
    lengths = [len(tokenizer(p).input_ids) for p in prompts]
    padded = [i for i, n in enumerate(lengths) if n < max(lengths)]
    changed = [i for i in range(len(prompts)) if right[i].ids != wrong[i].ids]
    print(f"{len(changed)} of {len(padded)} padded texts change")
    assert len(changed) > len(padded) / 2 and set(changed) <= set(padded)


def test_a_checkpoints_own_sampling_settings_do_not_survive(model, tokenizer, monkeypatch):
    from transformers import GenerationConfig

    prompts = [p.prompts["en"] for p in problems("test", 1)]
    plain = generate(model, tokenizer, prompts, max_new_tokens=40)
    own = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "do_sample": True, "forced_eos_token_id": 5}
    own |= {"bad_words_ids": [[i] for i in plain[0].ids[:3]], "max_time": 1e-9}
    original = model.generation_config
    monkeypatch.setattr(model, "generation_config", GenerationConfig.from_dict(original.to_dict()))
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert generate(model, tokenizer, prompts, max_new_tokens=40) == plain
    assert model.generation_config.max_time == 1e-9  # put back
    # Teeth: the settings do change what the model writes when they are let in.
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    model.generation_config.do_sample = False
    model.generation_config.max_time = None
    with torch.no_grad():
        loose = model.generate(ids, max_new_tokens=40)[0, ids.shape[1] :]
    assert tuple(loose.tolist())[: len(plain[0].ids)] != plain[0].ids


def test_order_finish_and_progress(model, tokenizer):
    prompts = [p.prompts[lang] for p in problems("test", 1) for lang in ("zh", "sw")]
    ticks = []
    out = generate(model, tokenizer, prompts, max_new_tokens=BUDGET, batch_size=3, advance=ticks.append)
    assert sum(ticks) == len(prompts)
    one = generate(model, tokenizer, prompts[3:4], max_new_tokens=BUDGET)
    assert out[3].text == one[0].text and {g.finish for g in out} == {"stop"}
    assert tokenizer.eos_token_id not in out[3].ids
    short = generate(model, tokenizer, prompts[:1], max_new_tokens=5)[0]
    assert short.finish == "length" and len(short.ids) == 5


def test_bad_sizes_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="batch size must be at least 1, got 0"):
        generate(model, tokenizer, ["x"], max_new_tokens=5, batch_size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate(model, tokenizer, ["x"], max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, tokenizer, ["x", ""], max_new_tokens=2)
