"""A study under way: the loaded model, the problems of each split, the folder, and how they are asked."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.errors import UserError
from kernel_surgery.common.names import BEFORE_CHAT
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.edit.modes import applied
from kernel_surgery.engines.offline import EngineOptions, require_vllm
from kernel_surgery.engines.texts import TRANSFORMERS
from kernel_surgery.engines.variants import variants
from kernel_surgery.evaluation.answering import Asking, Context, EditBlock, answer_cells
from kernel_surgery.evaluation.controls import in_model
from kernel_surgery.evaluation.generate import end_tokens
from kernel_surgery.evaluation.judging import Cells, Generation, score, score_again, text_of
from kernel_surgery.evaluation.options import OF_ENGINES
from kernel_surgery.evaluation.samples import check_run, digest, open_run
from kernel_surgery.evaluation.served import EngineAsking, in_engine, writing
from kernel_surgery.evaluation.shares import answer_together, refuse_other_shares, take_up_together
from kernel_surgery.evaluation.summary import summarize
from kernel_surgery.files.problems import Source, problem_source
from kernel_surgery.models.architectures import decoder_layers
from kernel_surgery.models.before import load_checked
from kernel_surgery.models.chat import OFF, Chat, choose_chat
from kernel_surgery.models.load import local_folder, parse_device, parse_dtype, public_name, resolve_model
from kernel_surgery.problems.generator import Problem
from kernel_surgery.studies.settings import Fitter
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fingerprint import fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = ("dev.jsonl", "test.jsonl", "controls.jsonl")
# {name of a setting: (its subspace, the strength of the edit)}.
Settings = Mapping[str, tuple[Subspace, float]]


@dataclass(frozen=True)
class Study:
    """A study that is under way: the loaded model, the problems of each split, and the folder.

    declared: as `read_grid` returns it, without what left no trace. named: the same as the record has it.
    engine: how vLLM is started, which then writes the texts; None if the loaded model does. engine_name: in words.
    ranks: the processes that share the study.
    """

    declared: dict[str, Any]
    named: dict[str, Any]
    folder: Path
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    source: Source
    splits: dict[str, tuple[Problem, ...]]
    languages: tuple[str, ...]
    chat: Chat
    device: "torch.device"
    engine: EngineOptions | None = None
    engine_name: str = TRANSFORMERS
    ranks: Ranks = ALONE
    done: dict[str, Cells] = field(default_factory=dict)  # {split: the texts that were made}

    @property
    def layers(self) -> int:
        return len(decoder_layers(self.model))

    def fitter(self, layers: range) -> Fitter:
        """Return what fits the settings, at these layers."""
        about = (self.source, self.folder, self.declared["model"], self.declared["seed"], self.chat)
        return Fitter(self.model, self.tokenizer, layers, *about)

    @property
    def checkpoint(self) -> Path:
        """The folder of the model's files, which an engine loads."""
        return local_folder(resolve_model(self.declared["model"]))

    def asking(self, split: str) -> Context | EngineAsking:
        """Return what is asked on a split, of the loaded model or of the engine."""
        about = (self.splits[split], self.languages, self.declared["max_new_tokens"])
        if self.engine is not None:
            return EngineAsking(self.tokenizer, *about, self.chat, end_tokens(self.model, self.tokenizer))
        return Context(self.model, self.tokenizer, *about, self.declared["batch_size"], self.chat)

    def blocks(self, asking: Context | EngineAsking, settings: Settings) -> dict[str, EditBlock]:
        """Return the edits to ask: the original's, and one for every setting. In an engine, each starts one."""
        mode = self.declared["mode"]
        if isinstance(asking, Context):
            return edit_blocks(self.model, mode, settings)
        blocks: dict[str, EditBlock] = {"original": partial(self._served, asking, "original", None, 1.0)}
        return blocks | {name: partial(self._served, asking, mode, *setting) for name, setting in settings.items()}

    @contextmanager
    def _served(
        self, asking: EngineAsking, mode: str, subspace: Subspace | None, strength: float
    ) -> Iterator[tuple[()]]:
        assert self.engine is not None  # `asking` is an engine's
        about = ([mode], self.checkpoint, subspace, strength)
        with variants(*about, beside=self.folder) as (found, _), writing(asking, found[mode], self.engine):
            yield ()

    def for_controls(self, asking: Context | EngineAsking, subspace: Subspace) -> dict[str, Any]:
        """Return the last arguments of `run_controls`. asking: of `ask`, perhaps at another budget."""
        if isinstance(asking, Context):
            return in_model(asking, self.declared["mode"], subspace)
        assert self.engine is not None  # `asking` is an engine's
        return in_engine(partial(writing, asking, engine=self.engine), self.checkpoint)

    def notes(self) -> list[str]:
        """Return what a reader must know of the figures' origin."""
        notes = [note] if (note := self.source.note("test")) else []
        if self.engine is not None:
            mode = self.declared["mode"]
            notes.append(
                f"{self.engine_name} wrote the texts ({mode}). The fits and the damage are those of the model that "
                "transformers loaded"
            )
        return notes

    def ask(self, split: str, settings: Settings) -> tuple[Context | EngineAsking, Cells]:
        """Ask the problems of a split, of the original and of every edit. Return the texts at the budget.

        All processes must call this; each answers its share (`evaluation.shares`).
        """
        declared, asking = self.declared, self.asking(split)
        samples, rescore = self.folder / f"{split}.jsonl", score_again(self.tokenizer, self.chat)
        if split not in self.done:
            self.done[split] = take_up_together(self.ranks, samples, self.splits[split], rescore)
        blocks = self.blocks(asking, settings)

        def answer(asking: Asking, done: Cells, samples: Path) -> Cells:
            return answer_cells(asking, blocks, done, samples)

        texts = answer_together(self.ranks, asking, self.done[split], samples, answer, rescore)
        self.done[split] |= texts
        return asking, at_budget(texts, declared["budget"], self.tokenizer, self.chat)

    def figures(self, cells: Cells, names: list[str]) -> dict[str, dict[str, Any]]:
        """Return {name: {language: summary}}."""
        budget = self.declared["budget"]
        return {name: {lang: summarize(cells[name, lang], budget) for lang in self.languages} for name in names}


def begin(
    declared: dict[str, Any], folder: Path, check: Callable[[dict[str, Any]], object], ranks: Ranks = ALONE
) -> Study:
    """Load what a study needs, and open its folder. check: called with the model's configuration, before it loads.

    ranks: the processes that share the study; all call this, and process 0 writes.

    Raises UserError if the texts are declared to come from an engine that is not installed or of several processes, if
    the folder holds shares of another number of processes or is not one for all, and what `load_checked` and
    `check_run` raise.
    """
    served = declared["engine"] != TRANSFORMERS
    if served and ranks.size > 1:
        raise UserError(
            f'engine = "{declared["engine"]}" answers all problems itself, so its study runs in one process, not '
            f"{ranks.size}. Start it without a launcher; tensor_parallel is for more devices."
        )
    name = require_vllm() if served else TRANSFORMERS
    source = problem_source(declared["problems"], seed=declared["seed"])
    languages = source.languages(",".join(declared["languages"]))
    source.split("fit")
    if source.own:  # the place of a file is not recorded: records travel
        declared = declared | {"problems": source.record["problems_file"]} | source.record
    device = parse_device(declared["device"])
    dtype = parse_dtype(declared["dtype"], device)
    chat = choose_chat(declared["model"], declared["chat"], thinking=declared["thinking"])
    # Off leaves no trace: the hash of a choice that was frozen before there was a chat or an engine stays the same.
    of_engine = {key: value for key, value in declared.items() if key in OF_ENGINES}
    declared = {key: value for key, value in declared.items() if key not in (*BEFORE_CHAT, *of_engine)}
    declared |= chat.record() if chat.on else {}
    declared |= of_engine if served else {}
    named = declared | {"model": public_name(declared["model"])}
    if "search" in named:
        named["search"] = asdict(named["search"])
    config = named | {"resolved_dtype": str(dtype)} | ({"engine_version": name} if served else {})
    resume = os.path.exists(folder / "config.json")  # False for a name that no folder can have: check_run says so
    check_run(folder, config, resume=resume)
    for file in TEXTS:
        refuse_other_shares(folder / file, ranks)
    splits = {split: tuple(source.split(split)) for split in ("dev", "test")}
    prompts = [p.prompts[language] for split in splits.values() for p in split for language in languages]
    model, tokenizer = load_checked(
        *(declared["model"], (dtype, device), prompts, declared["max_new_tokens"]),
        lambda _, found: check(found),
        chat=chat,
    )
    config["weights"] = digest(fingerprint(model))
    open_together(ranks, folder, config, resume=resume)
    engine = None
    if served:
        longest = max(len(chat.ids(tokenizer, prompt)) for prompt in prompts)
        devices, more = of_engine["tensor_parallel"], of_engine["engine_args"]
        engine = EngineOptions(longest + declared["max_new_tokens"], dtype, devices, more)
    about = (source, splits, tuple(languages), chat, device, engine, name, ranks)
    return Study(declared, named, folder, model, tokenizer, *about)


def open_together(ranks: Ranks, folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Open the folder: process 0 writes, when all have seen what was there before. Raises UserError."""
    check_run(folder, config, resume=resume)
    ranks.wait()
    if ranks.first:
        open_run(folder, config, resume=resume)
    ranks.wait()
    if not (folder / "config.json").exists():
        raise UserError(
            f"process {ranks.rank} does not find {str(folder / 'config.json')!r}, which process 0 has written. All "
            "processes must share the folder --out."
        )
    check_run(folder, config, resume=True)  # a process that has another model, or another dtype, stops here


def edit_blocks(model: "PreTrainedModel", mode: str, settings: Settings) -> dict[str, EditBlock]:
    """Return the edits to ask: the original's, and one for every subspace."""
    blocks: dict[str, EditBlock] = {"original": partial(applied, "original", model, None, 1.0)}
    for name, (subspace, strength) in settings.items():
        blocks[name] = partial(applied, mode, model, subspace, strength)
    return blocks


def at_budget(cells: Cells, budget: int, tokenizer: "PreTrainedTokenizerBase", chat: Chat = OFF) -> Cells:
    """Return the cells as a budget of `budget` tokens would have left them, scored again. chat: as in `text_of`."""
    decode = text_of(tokenizer, chat)
    shortened: Cells = {}
    for (name, language), cell in cells.items():
        shortened[name, language] = []
        for sample in cell:
            if len(sample["tokens"]) <= budget:
                shortened[name, language].append(sample)
                continue
            ids = tuple(sample["tokens"][:budget])
            problem = Problem(
                sample["id"], sample["category"], "", "", {}, sample["answer"], {language: sample["prompt"]}
            )
            sample_at_budget = score(problem, language, name, Generation(ids, decode(ids), "length"), decode)
            shortened[name, language].append(sample_at_budget)
    return shortened
