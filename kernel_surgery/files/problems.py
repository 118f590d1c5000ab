"""Problems to ask: the generated ones, or anyone's own, from files.

`--problems` takes a number, which is the number of generated problems in each category, or one of these:

    FILE.jsonl           a problem per line: {"id": "7", "answer": 18, "prompts": {"en": "...", "zh": "..."}}
    DIR, or TSV files    files named NAME_{lang}.tsv, as MGSM has them: a line is a question, a tab and the answer.
                         Line n is the same problem in every language.

A language is a tag, such as de or pt-BR. `collect` and `fit` read any. Answers are judged in seven languages alone
(`scoring`), so `eval` asks in those.

The prompts are asked as they stand. An answer is one number as `scoring` reads it: 18, "1,234", 2.5 or "3/4".

A file has no splits, so a hash of each problem's id makes them: 20% test, 20% dev and 60% fit. A problem is thus in the
same split for every command, and `eval` never asks what the subspace was fitted on.
"""

import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_surgery.common.errors import MissingFileError, UserError
from kernel_surgery.common.names import LANGUAGE_TAG, LANGUAGES, SPLITS
from kernel_surgery.files.hashing import sha256
from kernel_surgery.problems.generator import Problem, parse_languages, problems
from kernel_surgery.scoring.answers import exact

OWN = "own"  # the category of every problem from a file
TEST, DEV = 20, 20  # percent of the ids; the rest is fit
_TSV = re.compile(r"(.*)_([a-z]{2})\.tsv")
_FORMS = "a number per category, a FILE.jsonl, or files NAME_{lang}.tsv or their folder"
Given = int | str | Path | Sequence[str | Path] | None


@dataclass(frozen=True)
class Source:
    """Where problems come from.

    given: of the generated problems, the number per category; else None. seed: selects the generated ones.
    own: (place, problem) of every problem of a file. record: what every record says of the files; empty for generated.
    """

    given: int | None
    seed: int = 0
    own: tuple[tuple[str, Problem], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)

    def languages(self, text: str = "all", *, judged: bool = True) -> tuple[str, ...]:
        """Parse languages as `parse_languages` does; "all" of a file are those that it has.

        judged: answers in them are judged, which is known for `LANGUAGES` alone; else any language of a file will do.
        Raises UserError for an unknown language, for a file in none that is known, and for a problem that lacks one.
        """
        if not self.own:
            try:
                return parse_languages(text)
            except UserError as error:
                raise UserError(str(error) if judged else f"{error} A file of --problems may be in others.") from error
        chosen = self._judged(text) if judged else self._any(text)
        for place, problem in self.own:
            if missing := [language for language in chosen if language not in problem.prompts]:
                raise UserError(
                    f"{place}: problem {problem.id!r} has no prompt in {missing[0]!r}. Every problem needs one in each "
                    f"of {', '.join(chosen)}; --languages chooses fewer."
                )
        return chosen

    def _held(self) -> list[str]:
        """The languages of a file: first the known ones, in their order."""
        held = dict.fromkeys(language for _, problem in self.own for language in problem.prompts)
        return [name for name in LANGUAGES if name in held] + [name for name in held if name not in LANGUAGES]

    def _judged(self, text: str) -> tuple[str, ...]:
        if (known := tuple(name for name in self._held() if name in LANGUAGES)) and text.strip() != "all":
            return parse_languages(text)
        if not known:
            raise UserError(
                f"{self.record['problems_file']} is in {', '.join(self._held())}. Answers are judged in "
                f"{', '.join(LANGUAGES)} alone. `collect`, `fit` and `probe` read any language; without --problems, "
                "`eval` asks generated problems."
            )
        return known

    def _any(self, text: str) -> tuple[str, ...]:
        held = self._held()
        names = held if text.strip() == "all" else [name.strip() for name in text.split(",") if name.strip()]
        for name in names:
            if name not in held:
                raise UserError(
                    f"{self.record['problems_file']} has no prompts in {name!r}: --languages chooses from "
                    f"{', '.join(held)}, or all."
                )
            if not re.fullmatch(LANGUAGE_TAG, name):
                raise UserError(
                    f"{self.record['problems_file']} has prompts in {name!r}. A language is a tag, such as de or pt-BR."
                )
        return tuple(dict.fromkeys(names))

    def split(self, name: str) -> list[Problem]:
        """Return the problems of a split. Raises UserError for one without any, and what `problems` raises."""
        if self.given is not None:
            return problems(name, self.given, seed=self.seed)
        found = [problem for _, problem in self.own if problem.split == name]
        if not found:
            raise UserError(
                f"{self.record['problems_file']}: none of its {len(self.own)} problems is in the {name} split. A hash "
                f"of the id puts {TEST}% into test, {DEV}% into dev and the rest into fit. Give more problems."
            )
        return found

    def note(self, split: str) -> str | None:
        """Return the line that every output shows about problems from a file, else None."""
        if not self.own:
            return None
        count, digest = len(self.split(split)), self.record["problems_sha256"][:16]
        return (
            f"problems of {self.record['problems_file']} (SHA-256 {digest}): {count} of {len(self.own)} are in the "
            f"{split} split, by a hash of their ids"
        )

    def seen(self, split: str) -> tuple[int, int]:
        """Return how many prompts of a split are worded as prompts of the fit split, numbers aside, and of how many."""

        def wordings(name: str) -> list[str]:
            return [
                re.sub(r"\d+", "#", prompt)
                for _, problem in self.own
                if problem.split == name
                for prompt in problem.prompts.values()
            ]

        asked, known = wordings(split), set(wordings("fit"))
        return sum(wording in known for wording in asked), len(asked)

    def worded_alike(self, split: str) -> str | None:
        """Return a note if prompts of a split are worded as prompts of the fit split, numbers aside, else None."""
        alike, asked = self.seen(split)
        if not alike:
            return None
        return (
            f"{alike} of the {asked} prompts of the {split} split are worded as prompts that the subspace was fitted "
            "on, but for the numbers: this says nothing of other wordings"
        )


def problem_source(given: Given, *, default: int = 40, seed: int = 0) -> Source:
    """Return where problems come from. given: as an option or a setting has it (see the module).

    Raises UserError for files that cannot be used, naming the line, and MissingFileError if there is none.
    """
    if given is None or isinstance(given, int):
        return Source(default if given is None else given, seed)
    words = [given] if isinstance(given, (str, Path)) else list(given)
    if len(words) == 1 and re.fullmatch(r"[-+]?\d+", str(words[0])):
        return Source(int(str(words[0])), seed)
    paths = [Path(word).expanduser() for word in words]
    for path in paths:
        if not path.exists():
            raise MissingFileError(f"no problems at {str(path)!r}: --problems takes {_FORMS}.")
    if len(paths) == 1 and paths[0].suffix == ".jsonl" and paths[0].is_file():
        files, rows = paths, _read_jsonl(paths[0])
    else:
        if len(paths) == 1 and paths[0].is_dir():
            paths = sorted(path for path in paths[0].iterdir() if _TSV.fullmatch(path.name))
        files = [path for path in paths if path.is_file() and _TSV.fullmatch(path.name)]
        if len(files) < len(paths) or not files:
            odd = next((path for path in paths if path not in files), Path(words[0]))
            raise UserError(f"{str(odd)!r} holds no problems that are known: --problems takes {_FORMS}.")
        rows = _read_tsv(files)
    hashes = {path.name: sha256(path) for path in files}
    digest = hashes[files[0].name] if len(files) == 1 else _digest(hashes)
    name = files[0].name if len(files) == 1 else f"{_stem(files[0])}_*.tsv"
    return Source(None, seed, tuple(rows), {"problems_file": name, "problems_sha256": digest})


def split_of_id(name: str) -> str:
    """Return the split of a problem from a file: "test", "dev" or "fit", by a hash of its id."""
    bucket = zlib.crc32(name.encode()) % 100
    return SPLITS[2] if bucket < TEST else SPLITS[1] if bucket < TEST + DEV else SPLITS[0]


def _digest(hashes: dict[str, str]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _stem(path: Path) -> str:
    match = _TSV.fullmatch(path.name)
    return match[1] if match else path.stem


def _problem(name: str, answer: int | str, prompts: dict[str, str]) -> Problem:
    return Problem(name, OWN, OWN, split_of_id(name), {}, answer, prompts)


def _answer(written: object, where: str) -> int | str:
    """Return an answer as a whole number, or else as it is written. Raises UserError if scoring cannot read it."""
    if isinstance(written, (str, int, float)):  # exact refuses true and false
        try:
            value = exact(written)
            return int(value) if value.denominator == 1 else str(written).strip()
        except (ValueError, ZeroDivisionError, OverflowError):
            pass
    shown = json.dumps(written, ensure_ascii=False)
    raise UserError(f"{where}: the answer is {shown}. It must be one number, such as 18, 1,234, 2.5 or 3/4.")


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the lines that are not blank. Raises UserError for a file that is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not UTF-8 ({error.reason} at byte {error.start}).") from error
    # Split at line feeds only: a text may contain U+2028.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    found = [(number, line) for number, line in lines if line.strip()]
    if not found:
        raise UserError(f"{str(path)!r} holds no problems: it is empty.")
    return found


def _read_jsonl(path: Path) -> list[tuple[str, Problem]]:
    rows: list[tuple[str, Problem]] = []
    ids: dict[str, int] = {}
    form = 'Expected {"id": "7", "answer": 18, "prompts": {"en": "...", "zh": "..."}}.'
    for number, line in _lines(path):
        where = f"{str(path)!r}, line {number}"
        try:
            held = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}). {form}") from error
        if not isinstance(held, dict):
            raise UserError(f"{where} is a {type(held).__name__}, not an object. {form}")
        for name in ("id", "answer", "prompts"):
            if name not in held:
                raise UserError(f"{where} has no {name!r}. {form}")
        name = held["id"]
        if not isinstance(name, (str, int)) or isinstance(name, bool) or not str(name).strip():
            raise UserError(f"{where}: the id is {json.dumps(name)}. It must be a text or a whole number.")
        if str(name) in ids:
            raise UserError(f"{where}: line {ids[str(name)]} has the id {str(name)!r} too. Ids must differ.")
        ids[str(name)] = number
        prompts = held["prompts"]
        if not isinstance(prompts, dict) or not prompts:
            raise UserError(f"{where}: 'prompts' is not an object of languages and texts. {form}")
        for language, prompt in prompts.items():
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError(f"{where}: the prompt in {language!r} is {json.dumps(prompt)}. It must be a text.")
        rows.append((where, _problem(str(name), _answer(held["answer"], where), prompts)))
    return rows


def _read_tsv(files: Sequence[Path]) -> list[tuple[str, Problem]]:
    """Return the problems of files NAME_{lang}.tsv."""
    named = {match[2]: path for path in files if (match := _TSV.fullmatch(path.name))}
    if len(named) < len(files):
        raise UserError(f"{', '.join(path.name for path in files)}: there are two files of one language.")
    tables = {language: _lines(path) for language, path in named.items()}
    first = next(iter(tables))
    for language, lines in tables.items():
        if len(lines) != len(tables[first]):
            raise UserError(
                f"{str(named[language])!r} has {len(lines)} problems, but {named[first].name} has "
                f"{len(tables[first])}. Line n must be the same problem in every language."
            )
    rows = []
    for at in range(len(tables[first])):
        prompts, answers = {}, {}
        for language, lines in tables.items():
            number, line = lines[at]
            where = f"{str(named[language])!r}, line {number}"
            question, tab, written = line.rpartition("\t")
            if not tab or not question.strip():
                raise UserError(f"{where}: expected a question, a tab and the answer.")
            prompts[language], answers[language] = question.strip(), _answer(written, where)
            if exact(answers[language]) != exact(answers[first]):
                raise UserError(
                    f"{where}: the answer is {answers[language]}, but {answers[first]} in {named[first].name}. Line n "
                    "must be the same problem in every language."
                )
        where = f"{str(named[first])!r}, line {tables[first][at][0]}"
        rows.append((where, _problem(f"{_stem(named[first])}-{at + 1:04d}", answers[first], prompts)))
    return rows
