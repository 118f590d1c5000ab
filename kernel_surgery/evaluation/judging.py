"""One text judged: a sample, which is one line of samples.jsonl."""

from dataclasses import dataclass

from kernel_surgery.problems.generator import Problem
from kernel_surgery.scoring.answers import Answer, extract_answer, first_answer_character, first_answer_token
from kernel_surgery.scoring.language import judge

Sample = dict
Cells = dict[tuple[str, str], list[Sample]]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt: ids without the end token, their text, and "stop" or "length"."""

    ids: tuple[int, ...]
    text: str
    finish: str


def judged(text: str, prompt: str, language: str, answer: Answer) -> dict:
    """What the text alone tells: its answer, whether that is right, and what language it is in."""
    found, verdict = extract_answer(text, prompt, language=language), judge(text, language)
    return {
        **{"extracted": None if found.value is None else str(found.value), "correct": found.value == answer},
        **{"language_judged": verdict.judged, "language_passed": verdict.passed, "language_found": list(verdict.found)},
    }


def score(problem: Problem, language: str, mode: str, generation: Generation, decode) -> Sample:
    """One text, scored by the strict protocol. `decode` turns token ids into text (for FAT)."""
    prompt = problem.prompts[language]
    verdicts = judged(generation.text, prompt, language, problem.answer)
    first = characters = None
    if verdicts["correct"]:
        first = first_answer_token(generation.ids, decode, problem.answer, prompt, language=language)
        characters = first_answer_character(generation.text, problem.answer, prompt, language=language)
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
        "fat_tokens": first,
        "fat_characters": characters,
        "finish": generation.finish,
        "tokens": list(generation.ids),
        "language_judged": verdicts["language_judged"],
        "language_passed": verdicts["language_passed"],
        "language_found": verdicts["language_found"],
        "correct_at": correct_at(problem.answer, prompt, language, generation, decode),
    }


def text_of(tokenizer):
    """Token ids to text, as samples hold it."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def score_again(tokenizer):
    """A kept sample judged by the code that runs now."""

    def again(problem: Problem, sample: dict) -> dict:
        generation = Generation(tuple(sample["tokens"]), sample["text"], sample["finish"])
        return score(problem, sample["language"], sample["mode"], generation, text_of(tokenizer))

    return again


def score_kept(problem: Problem, sample: Sample) -> Sample:
    """A kept sample judged again from its text alone: what needs the tokenizer stays as it was."""
    return sample | judged(sample["text"], sample["prompt"], sample["language"], problem.answer)


BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def correct_at(answer: int, prompt: str, language: str, generation: Generation, decode) -> dict[str, bool]:
    """{budget: whether the text, cut off there, gives the right answer}, for budgets shorter than the text.

    At any longer budget the verdict is that of the whole text.
    """
    found = {}
    for budget in BUDGETS:
        if budget < len(generation.ids):
            cut = extract_answer(decode(generation.ids[:budget]), prompt, language=language)
            found[str(budget)] = cut.value == answer
    return found
