"""Texts of the original and the edited model side by side in a terminal, with their differences marked.

A terminal's columns are counted as it draws them: two for a wide East Asian character, none for a combining one. On a
terminal a difference is coloured. Elsewhere, such as in a file, it stands in brackets: [-original-] and {+edited+}.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.progress import progress_bar
from kernel_surgery.edit.modes import applied
from kernel_surgery.evaluation.generate import generate
from kernel_surgery.evaluation.pairs import Piece, pieces_of
from kernel_surgery.models.chat import OFF, Chat
from kernel_surgery.subspace.artifact import Subspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH = 100  # columns of print(pair)
NARROW = 60  # columns below which the texts stand one above the other
_BRACKETS = (("[-", "-]"), ("{+", "+}"))
_COLOURS = (("\x1b[31;4m", "\x1b[0m"), ("\x1b[32;1m", "\x1b[0m"))
# Around a line with right-to-left letters, so that a terminal does not carry their order over the column's edge.
_ISOLATE, _END = "\u2068", "\u2069"


@dataclass(frozen=True)
class Pair:
    """One prompt and what the original and the edited model wrote. `print(pair)` shows the texts side by side."""

    prompt: str
    original: str
    edited: str

    def __str__(self) -> str:
        return shown(self, "edited", width=WIDTH, colour=False)


def compare_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    subspace: Subspace,
    *,
    mode: str = "fused",
    strength: float = 1.0,
    max_new_tokens: int = 256,
    chat: Chat = OFF,
    force: bool = False,
) -> list[Pair]:
    """Return what a loaded model writes for each prompt without and with the edit, by greedy decoding.

    mode: hook, baked, fused or lora. chat: how the prompts are put to the model. force: as in `edit.hook.hooked`.

    Raises what `generate` and the mode's context manager raise. The model is left as it was.
    """
    texts = []
    with progress_bar(2 * len(prompts), unit="text", unit_scale=True, leave=False) as bar:
        more: dict[str, Any] = {"max_new_tokens": max_new_tokens, "chat": chat, "advance": bar.update}
        for name in ("original", mode):
            bar.set_description(name)
            with applied(name, model, subspace, strength, force):
                texts.append([one.text for one in generate(model, tokenizer, prompts, **more)])
    return [Pair(*one) for one in zip(prompts, *texts, strict=True)]


def columns_of(text: str) -> int:
    """Return the columns that a terminal needs for a text without line feeds."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def printable(text: str) -> str:
    """Return a text that cannot steer a terminal: without escape sequences and marks that change the direction."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    kept = []
    for character in text:
        kind = unicodedata.category(character)
        # The two joiners are needed by some scripts and emoji.
        if character in "\n\u200c\u200d" or kind not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            kept.append(character)
        elif kind in ("Zl", "Zp"):
            kept.append("\n")
        elif kind != "Cf":
            kept.append("\ufffd")
    return "".join(kept)


def bracketed(pieces: Sequence[Piece], marks: tuple[str, str]) -> list[Piece]:
    """Return the pieces with marks around what differs, as text: they need columns, and a line may end inside them."""
    return [(f"{marks[0]}{text}{marks[1]}" if differs else text, False) for text, differs in pieces]


def wrapped(pieces: Sequence[Piece], width: int, colours: tuple[str, str] = ("", "")) -> list[str]:
    """Return lines of at most `width` columns (at least 2), with `colours` switched on and off around what differs.

    pieces: (text, differs). A line is broken at a space if it has one. A colour that a line break cuts goes on in the
    next line.
    """
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for character, differs in ((c, differs) for text, differs in pieces for c in text):
        if character == "\n":
            lines.append([])
            used = 0
            continue
        if used + _columns(character) > max(width, 2):
            if character == " ":
                lines.append([])
                used = 0
                continue
            space = next((i for i in range(len(lines[-1]) - 1, 0, -1) if lines[-1][i][0] == " "), None)
            rest = [] if space is None else lines[-1][space + 1 :]
            if space is not None:
                lines[-1] = lines[-1][:space]
            lines.append(rest)
            used = sum(_columns(c) for c, _ in rest)
        lines[-1].append((character, differs))
        used += _columns(character)
    return [_coloured(line, colours) for line in lines]


def _coloured(line: Sequence[tuple[str, bool]], colours: tuple[str, str]) -> str:
    out, inside = "", False
    for character, differs in (*line, ("", False)):
        if differs != inside:
            out, inside = out + colours[inside], differs
        out += character
    if any(unicodedata.bidirectional(character) in ("R", "AL") for character, _ in line):
        return f"{_ISOLATE}{out}{_END}"
    return out


def shown(pair: Pair, mode: str, *, width: int, colour: bool) -> str:
    """Return the prompt and both texts in `width` columns. mode: the name of the edited text. colour: on a terminal."""
    prompt = "\n".join(wrapped([(f"> {printable(pair.prompt)}", False)], width))
    if pair.original == pair.edited:
        text = "\n".join(wrapped([(printable(pair.original), False)], width))
        return f"{prompt}\noriginal and {mode}: the same text\n{text}"
    sides = pieces_of(printable(pair.original), printable(pair.edited))
    marks = _COLOURS if colour else (("", ""), ("", ""))
    if not colour:
        sides = bracketed(sides[0], _BRACKETS[0]), bracketed(sides[1], _BRACKETS[1])
    if width < NARROW:
        parts = zip(("original", mode), sides, marks, strict=True)
        texts = (f"{name}:\n" + "\n".join(wrapped(side, width, how)) for name, side, how in parts)
        return "\n".join([prompt, *texts])
    half = (width - 3) // 2
    left, right = (wrapped(side, half, how) for side, how in zip(sides, marks, strict=True))
    lines = list(_beside(["original", *left], [mode, *right], half))
    return "\n".join([prompt, *lines])


def _beside(left: Sequence[str], right: Sequence[str], half: int) -> Iterator[str]:
    for at in range(max(len(left), len(right))):
        one, other = (side[at] if at < len(side) else "" for side in (left, right))
        plain = one
        for mark in (mark for pair in _COLOURS for mark in pair):
            plain = plain.replace(mark, "")
        yield f"{one}{' ' * max(0, half - columns_of(plain))} | {other}".rstrip()
