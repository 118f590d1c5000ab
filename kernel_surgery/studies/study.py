"""A study: try declared settings on dev, freeze the best, report it on test.

`kernel_surgery.study` shows the declaration, a TOML file: a grid, or a search.

Bases are fitted on the fit split. Of a grid, the setting with the highest accuracy on dev (mean over languages; ties go
to the first declared) is chosen; a search has a rule of its own (`studies.space`). The choice's hash is written to
frozen.json before any test problem is asked. A cell here is one setting.

Each finished set of texts is stored at once (dev.jsonl, test.jsonl), and every setting of a search too, so the same
command continues an interrupted study. trials.json holds every setting of a search, also if none keeps its limits.
study.json holds everything else.

Of several processes (`common.ranks`) each answers a share of the problems, and measures a share of a search's figures.
The first one fits, draws, chooses and writes; the others are given its subspaces, so all edit with the same bits.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_surgery.common.environment import environment_record, now
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.progress import waiting
from kernel_surgery.common.ranks import ALONE, Ranks
from kernel_surgery.damage.measure import headline, measure_damage
from kernel_surgery.damage.measure import table as damage_table
from kernel_surgery.evaluation.controls import run_controls
from kernel_surgery.evaluation.controls import table as control_table
from kernel_surgery.evaluation.options import check_engine_controls
from kernel_surgery.evaluation.samples import digest
from kernel_surgery.evaluation.summary import pair, power
from kernel_surgery.evaluation.tables import strict_table
from kernel_surgery.files.hashing import sha256
from kernel_surgery.studies import front
from kernel_surgery.studies.declaring import cells_of, check_cells, layers_of
from kernel_surgery.studies.opening import Settings, Study, begin
from kernel_surgery.studies.page import write_page
from kernel_surgery.studies.reporting import Reporting
from kernel_surgery.studies.searching import Measure, Row, require_optuna, search_settings, search_together
from kernel_surgery.studies.searching import choose as choose_row
from kernel_surgery.studies.settings import Setting
from kernel_surgery.studies.space import ASKED, BASELINE, check_space
from kernel_surgery.subspace.artifact import Subspace
from kernel_surgery.subspace.fitting import fit_subspace

if TYPE_CHECKING:
    pass

FROZEN, CHOSEN = "frozen.json", "chosen.safetensors"


def frozen_digest(setting: dict[str, Any], declared: dict[str, Any]) -> str:
    """Return the SHA-256 of a chosen setting with everything else that its texts depend on."""
    rest = {key: value for key, value in declared.items() if key not in ("grid", "search")}
    return hashlib.sha256(json.dumps([setting, rest], sort_keys=True).encode()).hexdigest()


def choose(dev: dict[str, dict[str, Any]], names: list[str]) -> str:
    """Return the name of the cell with the highest mean accuracy on dev. Ties go to the first declared."""
    return max(names, key=lambda name: sum(r["accuracy"] for r in dev[name].values()))


def table(dev: dict[str, dict[str, Any]], chosen: str) -> str:
    """Return the table of all cells on dev, with the chosen one marked."""
    width = max(map(len, dev))
    lines = ["dev problems, on which the setting with the highest accuracy is chosen:"]
    for name, by in dev.items():
        rates = "  ".join(f"{lang} {r['accuracy']:.3f} FAT {r['fat_tokens']:6.1f}" for lang, r in by.items())
        lines.append(f"  {name:<{width}}  {rates}{'  <- chosen' if name == chosen else ''}")
    return "\n".join(lines)


def run_study(
    declared: dict[str, Any],
    folder: Path,
    *,
    controls: str | None = None,
    command: str | None = None,
    say: Callable[[str], object] = print,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Run a study: fit, measure on dev, choose, freeze, ask on test, compare. Return the contents of study.json.

    declared: the result of `read_grid`.
    folder: of the study. Whatever is finished in it is not done again.
    controls: such as "haar:20", random subspaces beside the chosen one, on test.
    command: the command line, for the record.
    say: called with a line of text that says what is done already, or what is about to be asked.
    ranks: the processes that share the study (`common.ranks.current`). All call this; process 0 calls `say` and writes.

    Raises KernelSurgeryError for settings that cannot be used. Raises UserError if dev now gives another choice than
    frozen.json holds, if no setting keeps a search's limits, and if a search lacks Optuna.
    """
    declared, controls = ranks.agreed((declared, controls))
    say = say if ranks.first else lambda line: None
    check_engine_controls(controls, declared["engine"])
    if "search" in declared:
        under_way, best, settings, found = _by_search(declared, folder, ranks, say)
    else:
        under_way, best, settings, found = _by_grid(declared, folder, ranks)
    context, texts = under_way.ask("test", settings)
    paired, mode = pair(texts), declared["mode"]
    subspace, strength = settings[best]
    control_results = None
    if controls:
        own = {(mode if name == best else name, lang): cell for (name, lang), cell in texts.items()}
        context = replace(context, budget=declared["budget"])
        control_results = run_controls(
            *(context, own, folder, subspace, controls, mode, strength, declared["seed"], None, say, ranks),
            **under_way.for_controls(context, subspace),
        )
    if not ranks.first:
        ranks.wait()
        return dict(json.loads((folder / "study.json").read_text(encoding="utf-8")))
    about = (under_way.model, under_way.tokenizer, under_way.languages, [mode], subspace)
    damage = measure_damage(*about, strength=strength)
    study = {
        "damage_in_words": headline(damage),
        "notes": under_way.notes(),
        **{"schema": 1, "command": command, "declared": under_way.named},
        "environment": environment_record(under_way.device) | {"date": now()} | ranks.record(),
        **found,
        "test": under_way.figures(texts, ["original", *settings]),
        **{"paired": paired, "power": power(paired), "controls": control_results, "damage": damage},
    }
    write_atomic(folder / "study.json", json.dumps(study, indent=2, ensure_ascii=False) + "\n")
    with waiting("writing the page"):
        write_page(study, folder)
    ranks.wait()
    return study


def _by_grid(declared: dict[str, Any], folder: Path, ranks: Ranks) -> tuple[Study, str, Settings, dict[str, Any]]:
    """Ask all cells the dev problems and freeze the best. Return its name, what is to be asked on test, and figures."""
    cells = cells_of(declared["grid"])
    study = begin(declared, folder, lambda config: check_cells(cells, declared["mode"], config), ranks)

    def fitted() -> dict[str, tuple[Subspace, float]]:
        fitter, found = study.fitter(range(study.layers)), dict[str, tuple[Subspace, float]]()
        for name, cell in cells.items():
            held, layers = fitter.activations(cell["site"], cell["pool"]), layers_of(cell["layers"], study.layers)
            found[name] = fit_subspace(held, cell["rank"], method="deviations", layers=layers), cell["strength"]
        return found

    settings = ranks.by_first(fitted)
    dev = study.figures(study.ask("dev", settings)[1], ["original", *cells])
    best = choose(dev, list(cells))

    def chosen() -> dict[str, Any]:
        frozen = freeze(folder, best, cells[best], study.declared, len(cells))
        settings[best][0].save(folder / CHOSEN)
        return frozen

    frozen = ranks.by_first(chosen)  # no process asks a test problem before
    reported = {best: settings[best]} if declared["test"] == "chosen" else settings
    return study, best, reported, {"dev": dev, "frozen": frozen}


def _by_search(
    declared: dict[str, Any], folder: Path, ranks: Ranks, say: Callable[[str], object]
) -> tuple[Study, str, Settings, dict[str, Any]]:
    """Measure the settings of a search on dev, freeze the choice, and measure it on test beside the baseline.

    Returns what `_by_grid` does.
    """
    search, mode = declared["search"], declared["mode"]
    require_optuna()
    study = begin(declared, folder, lambda config: check_space(search, config["num_hidden_layers"], mode), ranks)
    base = search.baseline_setting(study.layers)
    asked = bool(set(ASKED) & set(search.objectives))
    fitter, reporting = study.fitter(search.reach(study.layers)), Reporting.of(study, search, base)

    def fit(setting: Setting) -> Subspace:
        return ranks.by_first(lambda: fitter.fit(setting))

    def measure(setting: Setting) -> dict[str, Any]:
        subspace = fit(setting)
        figures = reporting.dev.measure(subspace).as_json()
        if asked:
            name = f"{setting.name} {digest(setting.as_json())[:8]}"  # names round
            by = study.figures(study.ask("dev", {name: (subspace, 1.0)})[1], [name])[name].values()
            figures["accuracy"] = sum(r["accuracy"] for r in by) / len(by)
            figures["fidelity"] = sum((r["language_fidelity"] or 0.0) * r["coverage"] for r in by) / len(by)
        return figures

    def searched(measure: Measure) -> list[Row]:
        rows = search_settings(search, study.layers, mode, folder, declared["seed"], measure, say)
        write_atomic(folder / "trials.json", json.dumps([row.as_json() for row in rows], indent=1) + "\n")
        return rows

    rows = search_together(ranks, measure, searched)
    best = choose_row(rows, search)

    def chosen() -> tuple[Subspace, dict[str, Any]]:
        subspace = _chosen(study, best.name, lambda: fitter.fit(Setting.of(best.setting)))
        return subspace, freeze(folder, best.name, best.setting, study.declared, len(rows), sha256(folder / CHOSEN))

    subspace, frozen = ranks.by_first(chosen)  # no process reads the test half before
    found = {"search": front.record(rows, search, best), "frozen": frozen}
    baseline = fit(base)
    found |= reporting.on_test(subspace, baseline, best.name)
    settings = {"chosen": (subspace, 1.0)} | ({BASELINE: (baseline, 1.0)} if asked else {})
    return study, "chosen", settings, found


def _chosen(study: Study, name: str, fit: Callable[[], Subspace]) -> Subspace:
    """Return the chosen subspace: the one that was frozen, or a new one, which is saved. Raises UserError."""
    file, frozen = study.folder / CHOSEN, study.folder / FROZEN
    if file.is_file() and frozen.is_file():
        held = json.loads(frozen.read_text(encoding="utf-8"))
        if held.get("cell") == name and held.get("subspace_sha256") == sha256(file):
            return Subspace.load(file)
        raise UserError(f"{str(file)!r} is not the subspace that {str(frozen)!r} names. Choose another --out.")
    subspace = fit()
    subspace.save(file)
    return subspace


def freeze(
    folder: Path,
    chosen: str,
    setting: dict[str, Any],
    declared: dict[str, Any],
    count: int,
    subspace: str | None = None,
) -> dict[str, Any]:
    """Write the choice to frozen.json, before any test problem is asked. Return its contents.

    count: of the settings that it was chosen from. subspace: SHA-256 of its file, if that is frozen too.

    A continued study writes the same file again. Raises UserError if the file holds another choice.
    """
    frozen = {"cell": chosen, "setting": setting, "sha256": frozen_digest(setting, declared), "of": count}
    frozen |= {"subspace_sha256": subspace} if subspace else {}
    file = folder / FROZEN
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != frozen:
        raise UserError(f"{str(file)!r} holds another choice than dev gives now. Choose another --out.")
    write_atomic(file, json.dumps(frozen, indent=2) + "\n")
    return frozen


def shown(study: dict[str, Any]) -> str:
    """Return the text that the command prints about a study."""
    frozen = study["frozen"]
    lines = [study["damage_in_words"]]
    lines.append(front.table(study["search"]) if "search" in study else table(study["dev"], frozen["cell"]))
    count = next(iter(study["test"]["original"].values()))["n"]
    lines.append(f"choice frozen: {frozen['sha256'][:16]}, one of {frozen['of']} settings")
    if "search" in study:
        lines.append(front.reported_table(study))
    lines.append(f"test problems, {count} per language:")
    lines += study["notes"]
    lines.append(strict_table(study["test"], study["paired"]))
    if study["controls"]:
        lines.append(control_table(study["controls"]))
    lines.append(damage_table(study["damage"]))
    return "\n".join(lines)
