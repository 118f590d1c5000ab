"""The answering loop: the same problems, in every language, for the original and for every edit.

`eval`, `study` and the controls share it. A cell holds the texts of one name (a mode, a setting or a control) in one
language, in problem order. It is written to disk before the next one begins.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.plan import Edit
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.evaluation.judging import Cells, Generation, score, text_of
from kernel_surgery.evaluation.samples import append_cell
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.problems.generator import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Returns a context manager that edits the model. It yields the records of the edits; for the original there are none.
EditBlock = Callable[[], AbstractContextManager[Sequence[Edit]]]


class Asking(Protocol):
    """What is asked, and who writes the texts: a loaded model (`Context`), or an engine (`evaluation.served`).

    problems: in the order in which they are asked. budget: the maximum number of new tokens per text.
    chat: how the problems' prompts are put to the model.
    """

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...
    @property
    def problems(self) -> tuple[Problem, ...]: ...
    @property
    def languages(self) -> tuple[str, ...]: ...
    @property
    def budget(self) -> int: ...
    @property
    def chat(self) -> Chat: ...

    def write(self, prompts: Sequence[str], advance: Callable[[float], object]) -> list[Generation]:
        """Return greedy texts, in the order of `prompts`.

        advance: called with the number of texts just finished, or with fractions of it.
        """
        ...

    def about(self, problems: Sequence[Problem]) -> "Asking":
        """Return the same about other problems."""
        ...


@dataclass(frozen=True)
class Context:
    """The inputs that every text of a run depends on, apart from the edit, with the model that writes them.

    The fields are those of `Asking`.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    problems: tuple[Problem, ...]
    languages: tuple[str, ...]
    budget: int
    batch_size: int = 64
    chat: Chat = OFF

    def about(self, problems: Sequence[Problem]) -> "Context":
        """Return the same about other problems."""
        return replace(self, problems=tuple(problems))

    def write(self, prompts: Sequence[str], advance: Callable[[float], object]) -> list[Generation]:
        """Generate greedy texts (`evaluation.generate.generate`)."""
        return generate(
            *(self.model, self.tokenizer, prompts),
            max_new_tokens=self.budget,
            batch_size=self.batch_size,
            advance=advance,
            chat=self.chat,
        )


def missing_cells(context: Asking, names: Sequence[str], done: Cells) -> list[tuple[str, str]]:
    """Return the (name, language) of the cells that are not in `done`, in order."""
    return [(name, lang) for name in names for lang in context.languages if (name, lang) not in done]


def answer_cells(context: Asking, edits: Mapping[str, EditBlock], done: Cells, samples: Path) -> Cells:
    """Return the cells of every name in `edits` and every language, generating those that are not in `done`.

    edits: {name: a function that returns a context manager with that edit}.
    done: the cells that were answered before; they are not generated again.
    samples: the file to which each finished cell is appended.

    Raises RuntimeError if an edited layer did not run, because the texts would then not be the edited model's.
    """
    cells, missing = dict(done), missing_cells(context, list(edits), done)
    decode = text_of(context.tokenizer, context.chat)
    with progress_bar(len(missing) * len(context.problems), unit="text", unit_scale=True) as bar:
        for name in dict.fromkeys(name for name, _ in missing):
            with edits[name]() as records:
                for language in (lang for which, lang in missing if which == name):
                    bar.set_description(f"{name} {language}")
                    before = [dict(edit.calls) for edit in records]
                    prompts = [problem.prompts[language] for problem in context.problems]
                    texts = context.write(prompts, bar.update)
                    _refuse_idle(name, records, before)
                    pairs = zip(context.problems, texts, strict=True)
                    cell = [score(problem, language, name, text, decode) for problem, text in pairs]
                    append_cell(samples, cell)
                    cells[name, language] = cell
    return {(name, lang): cells[name, lang] for name in edits for lang in context.languages}


def _refuse_idle(name: str, edits: Sequence[Edit], before: list[dict[int, int]]) -> None:
    pairs = zip(edits, before, strict=True)
    idle = [layer for edit, calls in pairs for layer in calls if edit.calls[layer] == calls[layer]]
    if idle:
        raise RuntimeError(f"{name} never ran at layers {idle}: these texts are not of the edited model")
