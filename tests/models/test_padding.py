"""Padding: masked, so any id of the embedding will do; a padding token beyond it is not used."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from kernel_surgery.evaluation.generate import generate
from kernel_surgery.models.before import check_positions
from kernel_surgery.models.load import load_tokenizer
from kernel_surgery.models.padding import padded, padding_id, token_batches
from kernel_surgery.subspace.collecting import prompt_states
from tests.support.models import pico

PROMPTS = ["3 + 4 =", "a longer prompt: 17 - 5 ="]


@pytest.mark.parametrize(
    ("pad", "end", "ends", "expected"),
    [(5, 0, (), 5), (64, 0, (), 0), (None, 7, (), 7), (64, 99, (9, 3), 9), (-1, None, (), 0), (None, None, (70,), 0)],
)
def test_an_id_of_the_embedding_is_taken(pad, end, ends, expected):
    assert padding_id(pico("qwen2"), SimpleNamespace(pad_token_id=pad, eos_token_id=end), ends) == expected


def test_both_sides():
    ids, mask = padded([[1, 2, 3], [4]], 9, "left", "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = padded([[1, 2, 3], [4]], 9, "right", "cpu")
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_padding_token_beyond_the_embedding_changes_no_figure_and_no_text():
    tokenizer = load_tokenizer("polyglot")
    model = pico("qwen2", vocab_size=len(tokenizer))
    states = prompt_states(model, tokenizer, PROMPTS, [1])[1]
    texts = [made.ids for made in generate(model, tokenizer, PROMPTS, max_new_tokens=6)]
    tokenizer.add_special_tokens({"pad_token": "<a new one>"})
    assert tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]
    assert torch.equal(prompt_states(model, tokenizer, PROMPTS, [1])[1], states)
    assert [made.ids for made in generate(model, tokenizer, PROMPTS, max_new_tokens=6)] == texts


def test_positions_are_counted_with_the_new_tokens():
    tokenizer = load_tokenizer("polyglot")
    lengths = [len(ids) for ids in tokenizer(PROMPTS).input_ids]
    longest = max(lengths)
    check_positions(longest, lengths)
    check_positions(longest + 10, lengths, 10)
    check_positions(None, lengths, 10_000)
    with pytest.raises(ValueError, match=rf"longest prompt has {longest} tokens, but the model has {longest - 1} pos"):
        check_positions(longest - 1, lengths)
    with pytest.raises(ValueError, match=r"and 11 new ones are longer than .* positions\. Use --max-new-tokens 10 at"):
        check_positions(longest + 10, lengths, 11)
    model = pico("qwen2", vocab_size=len(tokenizer), max_position_embeddings=longest + 3)
    with pytest.raises(ValueError, match="Use --max-new-tokens 3 at most"):
        generate(model, tokenizer, PROMPTS, max_new_tokens=4)


@pytest.mark.parametrize("budget", [1, 7, 12, 20, 1000])
def test_batches_hold_every_prompt_once_within_the_budget_longest_first(budget):
    lengths = [3, 5, 1, 5, 2, 2, 9, 1, 4]
    batches = token_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    inside = [lengths[i] for batch in batches for i in batch]
    assert inside == sorted(lengths, reverse=True)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
        assert batch == sorted(batch, key=lambda i: (-lengths[i], i))  # equal lengths in their order
    # No batch could take the first prompt of the next one.
    for batch, after in itertools.pairwise(batches):
        assert (len(batch) + 1) * lengths[batch[0]] > budget, after
    assert token_batches([], budget) == []
