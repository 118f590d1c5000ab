"""Judging one text. The result is a sample: one line of samples.jsonl.

Only what a model says counts, not what it thinks: a block `<think>...</think>` is neither an answer nor in a language.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernel_surgery.models.chat import OFF, THINK, THOUGHT, Chat
from kernel_surgery.problems.generator import Problem
from kernel_surgery.scoring.answers import Answer, exact, extract_answer, first_answer_character, first_answer_token
from kernel_surgery.scoring.language import judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, Any]
FROM_TEXT = "tokens_from_text"  # a sample has this field where it is true
Cells = dict[tuple[str, str], list[Sample]]
# Turns token ids into text.
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Generation:
    """One generated text: its token ids without the end token, the text, and "stop" or "length".

    from_text: whether the ids were made of the text again, because a server did not return them.
    """

    ids: tuple[int, ...]
    text: str
    finish: str
    from_text: bool = False


def spoken(text: str) -> str:
    """Return the end of a text after its thinking. It is empty if the text ends while it thinks."""
    if THOUGHT in text:
        return text.rpartition(THOUGHT)[2]
    return "" if text.lstrip().startswith(THINK) else text


def judged(text: str, prompt: str, language: str, answer: Answer) -> dict[str, Any]:
    """Judge a text alone: the answer it gives, whether that is right, and which languages it uses."""
    said = spoken(text)
    extraction, verdict = extract_answer(said, prompt, language=language), judge(said, language)
    return {
        **{
            "extracted": None if extraction.value is None else str(extraction.value),
            "correct": extraction.value == exact(answer),
        },
        **{"language_judged": verdict.judged, "language_passed": verdict.passed, "language_found": list(verdict.found)},
    }


def score(problem: Problem, language: str, mode: str, generation: Generation, decode: Decode) -> Sample:
    """Score one text by the strict protocol: one final answer, compared exactly. Return the sample.

    decode: turns token ids into text. It is needed for FAT, the first answer token: the number of tokens until the
    right answer is complete.
    """
    prompt = problem.prompts[language]
    verdicts = judged(generation.text, prompt, language, problem.answer)
    fat_tokens = fat_characters = None
    if verdicts["correct"]:
        fat_tokens = first_answer_token(
            generation.ids, lambda ids: spoken(decode(ids)), problem.answer, prompt, language=language
        )
        said = spoken(generation.text)
        fat_characters = first_answer_character(said, problem.answer, prompt, language=language)
        if fat_characters is not None:
            fat_characters += len(generation.text) - len(said)
    return {
        "id": problem.id,
        "mode": mode,
        "language": language,
        "category": problem.category,
        "prompt": prompt,
        "answer": problem.answer,
        "text": generation.text,
        "extracted": verdicts["extracted"],
        "correct": verdicts["correct"],
        "fat_tokens": fat_tokens,
        "fat_characters": fat_characters,
        "finish": generation.finish,
        "tokens": list(generation.ids),
        **({FROM_TEXT: True} if generation.from_text else {}),
        "language_judged": verdicts["language_judged"],
        "language_passed": verdicts["language_passed"],
        "language_found": verdicts["language_found"],
        "correct_at": correct_at(problem.answer, prompt, language, generation, decode),
    }


def text_of(tokenizer: "PreTrainedTokenizerBase", chat: Chat = OFF) -> Decode:
    """Return a function that decodes token ids to text, without special tokens.

    chat: how the prompts were put. If its template opens the thinking, the text begins with that tag too.
    """
    opener = chat.opener(tokenizer)
    return lambda ids: opener + str(tokenizer.decode(ids, skip_special_tokens=True))


def score_again(tokenizer: "PreTrainedTokenizerBase", chat: Chat = OFF) -> Callable[[Problem, Sample], Sample]:
    """Return a function that scores a stored sample again with the current code. chat: as in `text_of`."""

    def again(problem: Problem, sample: Sample) -> Sample:
        generation = Generation(tuple(sample["tokens"]), sample["text"], sample["finish"], FROM_TEXT in sample)
        return score(problem, sample["language"], sample["mode"], generation, text_of(tokenizer, chat))

    return again


def score_kept(problem: Problem, sample: Sample) -> Sample:
    """Score a stored sample again from its text alone.

    The fields that need the tokenizer keep their stored values.
    """
    return sample | judged(sample["text"], sample["prompt"], sample["language"], problem.answer)


BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def correct_at(
    answer: Answer, prompt: str, language: str, generation: Generation, decode: Decode) -> dict[str, bool]:
    """Return {budget: whether the text gives the right answer if it is cut off there}.

    Only the BUDGETS shorter than the text are included. At any longer budget the verdict is that of the whole text.
    """
    verdicts, value = {}, exact(answer)
    for budget in BUDGETS:
        if budget < len(generation.ids):
            extraction = extract_answer(spoken(decode(generation.ids[:budget])), prompt, language=language)
            verdicts[str(budget)] = extraction.value == value
    return verdicts
