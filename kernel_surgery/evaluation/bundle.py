"""A bundle: everything from a model to a report in one folder that anyone can check without the model.

DIR/bundle holds the configuration, versions, subspace, certificate, results, every text, the report, and manifest.json
with the SHA-256 of each file. The activations and the baked checkpoint stay beside it, in DIR.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.command import command_line
from kernel_surgery.common.environment import environment_record
from kernel_surgery.common.errors import SubspaceError, UserError
from kernel_surgery.common.files import check_folder, write_atomic
from kernel_surgery.common.names import LANGUAGES
from kernel_surgery.common.progress import progress, waiting
from kernel_surgery.edit.modes import modes_of
from kernel_surgery.evaluation.controls import compared
from kernel_surgery.evaluation.judging import Cells, score_again, score_kept
from kernel_surgery.evaluation.options import Options
from kernel_surgery.evaluation.summary import expag_metrics, pair, power, summarize
from kernel_surgery.files.contents import weight_files
from kernel_surgery.files.folder import changed_files
from kernel_surgery.files.hashing import sha256
from kernel_surgery.models.before import check_config, check_stored
from kernel_surgery.models.load import load_tokenizer, local_folder, public_name, resolve_model
from kernel_surgery.ops.library import MAX_RANK
from kernel_surgery.problems.generator import Problem, expag_problems, problems

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLE = ("subspace.safetensors", "certificate.json", "certificate.svg", "provenance.json")
RUN = ("config.json", "results.json", "samples.jsonl", "report.html")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Recipe:
    """The options of `python -m kernel_surgery.reproduce`, by the same names."""

    model: str
    out: Path
    mode: str = "fused"
    rank: int | None = None
    languages: str = "en,zh"
    problems: int | None = None
    seed: int = 0
    controls: str | None = None

    def check(self) -> None:
        """Check what the steps would otherwise find one after the other, before the first one runs.

        Raises UserError for options of the evaluation, and for too little disk space. Raises SubspaceError for a rank
        that the model cannot have, and what `models.before.check_config` raises.
        """
        options = Options(
            mode=self.mode,
            model=self.model,
            languages=self.languages,
            problems=self.problems,
            seed=self.seed,
            controls=self.controls,
        )
        options.check()
        options.asked()
        check_folder(self.out)
        source = local_folder(resolve_model(self.model))
        config = check_config(source)
        check_stored(source)
        most = min(config["hidden_size"], MAX_RANK, len(LANGUAGES) - 1)  # what `fit` takes by default
        if self.rank is not None and not 1 <= self.rank <= most:
            raise SubspaceError(f"--rank is {self.rank}: choose 1 to {most} for this model.")
        if not (self.out / "baked").exists():
            check_folder(self.out, size=sum(file.stat().st_size for file in weight_files(source)))

    def steps(self) -> list[tuple[str, Path, list[str]]]:
        """Return the steps in order, as (command, file or folder that it creates, its arguments)."""
        out, model = self.out, self.model
        acts, space, baked, certificate = (out / name for name in ("acts.safetensors", BUNDLE[0], "baked", BUNDLE[1]))
        common = ["--problems", self.problems] if self.problems else []
        rank = [] if self.rank is None else ["--rank", self.rank]
        evaluation = ["--mode", self.mode, "--model", model, "--subspace", space, "--certificate", certificate]
        evaluation += ["--out", out / "eval", "--languages", self.languages, *common, "--seed", self.seed]
        evaluation += ["--controls", self.controls] if self.controls else []
        steps = [
            ("collect", acts, ["--model", model, "--out", acts, *common]),
            ("fit", space, ["--activations", acts, "--out", space, *rank]),
            ("bake", baked, ["--model", model, "--subspace", space, "--out", baked]),
            ("verify", certificate, ["--model", model, "--subspace", space, "--baked", baked, "--out", certificate]),
            ("eval", out / "eval" / "results.json", evaluation),
        ]
        return [(name, left, [str(word) for word in words]) for name, left, words in steps]


def make_bundle(
    recipe: Recipe, command: str, run: Callable[[str, list[str]], object], say: Callable[[str], object]
) -> bool:
    """Run the steps that are missing and write the bundle. Return whether its certificate holds.

    run: runs a command, given its name and arguments. say: called with a line of text about each step.
    """
    commands, out = [], recipe.out
    out.mkdir(parents=True, exist_ok=True)
    for name, left, words in recipe.steps():
        commands.append(command_line(name, words))
        if left.exists():
            say(f"{name}: already done, {left} exists")
            continue
        say(f"{name}: {' '.join(words)}")
        if name == "eval" and (left.parent / "config.json").exists():
            words.append("--resume")
        if name == "verify":
            words.append("--overwrite")  # a kill may have left the plot without the certificate
        run(name, words)
    bundle = out / "bundle"
    bundle.mkdir(exist_ok=True)
    shutil.copy(out / "baked" / "provenance.json", out / "provenance.json")
    files = [out / name for name in BUNDLE] + [out / "eval" / name for name in RUN]
    files += [file for file in (out / "eval" / "controls.jsonl",) if file.exists()]
    for file in files:
        shutil.copy(file, bundle / file.name)
    manifest = {
        **{"kind": "bundle", "schema": 1, "command": command, "commands": commands, "model": public_name(recipe.model)},
        **{"environment": environment_record(), "sha256": {file.name: sha256(bundle / file.name) for file in files}},
    }
    write_atomic(bundle / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    say(f"{bundle}: {len(files) + 1} files")
    # A broken certificate does not stop the evaluation. The exit status reports it.
    return not json.loads((bundle / "certificate.json").read_text(encoding="utf-8"))["faults"]


def check_bundle(folder: Path) -> list[str]:
    """Check a bundle without its model. Return faults as sentences; the list is empty if everything holds.

    folder: the bundle, or the folder that `make_bundle` wrote it into. Many faults of one kind are one sentence: the
    first of them and the number of the others.

    Checks every hash, scores every text again, and computes every figure again. Scoring uses the current code, so the
    verdicts of a bundle from another version may differ; those are reported. For the embedded model, whose tokenizer is
    available, tokens are decoded and FAT is recomputed too. `UNCHECKED` lists what texts cannot show.

    Raises UserError for a folder that is not a bundle.
    """
    folder = bundle_in(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["kind"] != "bundle":
            raise KeyError("kind")
        names = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(folder)!r} is not a bundle from kernel_surgery.reproduce: {MANIFEST} is missing or of another kind."
        ) from error
    faults = changed_files(folder, names, MANIFEST)
    if missing := [name for name in ("results.json", "samples.jsonl") if not (folder / name).is_file()]:
        return [*faults, f"without {missing[0]} nothing more can be checked"]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    config, languages = results["config"], results["config"]["languages"]
    strict = config["protocol"] == "strict"
    asked_problems = problems("test", config["problems"] // 5, seed=config["seed"]) if strict else expag_problems()
    tokenizer = load_tokenizer("polyglot") if results["model"]["id"] == "polyglot" else None
    cells, scoring_faults = scored_again(folder / "samples.jsonl", {p.id: p for p in asked_problems}, tokenizer)
    faults += scoring_faults
    expected_cells = {(mode, language) for mode in modes_of(config["mode"]) for language in languages}
    reported_cells = {(mode, language) for mode, by in results["modes"].items() for language in by}
    for mode, language in sorted(expected_cells - cells.keys()):
        faults.append(f"{mode} {language}: there are no texts, but the configuration names them")
    for mode, language in sorted((cells.keys() ^ reported_cells) - (expected_cells - cells.keys())):
        faults.append(f"{mode} {language}: is in only one of samples.jsonl and results.json")
    for (mode, language), cell in cells.items():
        if [s["id"] for s in cell] != [p.id for p in asked_problems]:
            faults.append(
                f"{mode} {language}: the {len(cell)} texts are not those of the {len(asked_problems)} problems in order"
            )
    if faults:
        return faults
    with waiting("computing the figures again"):
        return _recomputed(folder, results, cells, tokenizer)


def _recomputed(
    folder: Path, results: dict[str, Any], cells: Cells, tokenizer: "PreTrainedTokenizerBase | None"
) -> list[str]:
    """Compute every figure again from the texts of a bundle. Return faults."""
    config, faults = results["config"], list[str]()
    budget = config["max_new_tokens"]
    paired = pair(cells, (results["paired"] or [{"margin": 0.05}])[0]["margin"])
    recomputed = {
        "modes": {m: {lang: summarize(cells[m, lang], budget) for lang in by} for m, by in results["modes"].items()},
        "paired": paired,
        "power": power(paired),
        "expag_metrics": expag_metrics(cells),
    }
    for name, value in recomputed.items():
        found = differences(name, json.loads(json.dumps(value)), results[name])
        faults += first_of_each([(name, fault) for fault in found], "figures")
    if results.get("controls"):
        faults += check_controls(folder, results["controls"], cells, config, tokenizer)
    return faults


def bundle_in(folder: Path) -> Path:
    """Return the bundle in a folder of `make_bundle`, or the folder itself."""
    inner = folder / "bundle"
    return inner if not (folder / MANIFEST).exists() and (inner / MANIFEST).exists() else folder


UNCHECKED = "checked by hash only: damage and probes, the certificate, the subspace, report.html"


def scored_again(
    path: Path, known: dict[str, Problem], tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[Cells, list[str]]:
    """Score a file of samples again with the current code. Return ({(mode, language): samples}, faults).

    known: {id: problem}. tokenizer: the model's, or None. Without it, tokens and the figures counted in tokens are only
    compared with each other.
    """
    cells: Cells = {}
    faults: list[tuple[str, str]] = []
    samples = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    fields = ["extracted", "correct", "language_passed"]
    if tokenizer is not None:
        fields += ["text", "fat_tokens", "correct_at"]
    for sample in progress(samples, total=len(samples), desc="score"):
        key = sample["mode"], sample["language"]
        where = f"{' '.join(key)}: {sample['id']}"
        problem = known.get(sample["id"])
        if problem is None or sample["prompt"] != problem.prompts[sample["language"]]:
            faults.append((f"{key} prompt", f"{where} is not a problem of this test set, or has another prompt"))
            continue
        if sample["answer"] != problem.answer:
            what = f"says the answer is {sample['answer']}, but it is {problem.answer}"
            faults.append((f"{key} answer", f"{where} {what}"))
        if tokenizer is None:
            again = score_kept(problem, sample)
        else:
            text = tokenizer.decode(sample["tokens"], skip_special_tokens=True)
            again = score_again(tokenizer)(problem, sample) | {"text": text}
        for field in fields:
            if again.get(field) != sample.get(field):
                what = f"{field} was {sample.get(field)}, is {again.get(field)}"
                faults.append((f"{key} {field}", f"{where}: {what}"))
        first = sample["fat_tokens"]
        if (first is not None and not sample["correct"]) or not 0 < (first or 1) <= max(1, len(sample["tokens"])):
            what = f"an answer after {first} tokens of {len(sample['tokens'])}, correct={sample['correct']}"
            faults.append((f"{key} first", f"{where}: {what}"))
        cells.setdefault(key, []).append(again)
    return cells, first_of_each(faults, "texts")


def check_controls(
    folder: Path,
    said: dict[str, Any],
    cells: Cells,
    config: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase | None",
) -> list[str]:
    """Compute the controls' figures again from controls.jsonl. Return faults."""
    path = folder / "controls.jsonl"
    if not path.is_file():
        return ["there are figures of controls, but no controls.jsonl"]
    control_problems = problems("test", said["problems"] // 5, seed=said["seed"])
    try:
        done, faults = scored_again(path, {p.id: p for p in control_problems}, tokenizer)
        ids, mode = {p.id for p in control_problems}, said["mode"]
        more = (config["languages"], ids, config["max_new_tokens"])
        recomputed = compared(done, cells, said["kind"], said["count"], mode, *more)
    except (ValueError, KeyError, TypeError) as error:
        return [f"controls.jsonl does not hold the texts of the controls ({type(error).__name__}: {error})"]
    reported = {key: said[key] for key in recomputed}
    found = differences("controls", json.loads(json.dumps(recomputed)), reported)
    return faults + first_of_each([("controls", fault) for fault in found], "figures")


def first_of_each(faults: Sequence[tuple[str, str]], noun: str) -> list[str]:
    """Return the first sentence of each kind with the number of the others. faults: (kind, sentence)."""
    counts = Counter(kind for kind, _ in faults)
    firsts: dict[str, str] = {}
    for kind, sentence in faults:
        firsts.setdefault(kind, sentence)
    return [
        sentence + (f" (and {counts[kind] - 1} more {noun})" if counts[kind] > 1 else "")
        for kind, sentence in firsts.items()
    ]


def differences(where: str, made: Any, said: Any) -> list[str]:
    """Return the differences of two JSON values as sentences. Numbers are compared to nine digits."""
    if isinstance(made, dict) and isinstance(said, dict):
        keys = sorted(made.keys() | said.keys())
        return [d for key in keys for d in differences(f"{where}.{key}", made.get(key), said.get(key))]
    if isinstance(made, list) and isinstance(said, list) and len(made) == len(said):
        return [d for i, pair in enumerate(zip(made, said, strict=True)) for d in differences(f"{where}[{i}]", *pair)]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (made, said))
    if made == said or (numbers and abs(made - said) <= 1e-9 * max(1.0, abs(made))):
        return []
    return [f"results.json: {where} is {said}; the texts give {made}"]
