"""The tables of docs/real.md, from what `bench.real`, `bench.sources`, `bench.texts` and `study` stored in docs/."""

import json
import statistics
from pathlib import Path

from bench import tables

DOCS = Path(__file__).resolve().parent.parent / "docs"
SMOLLM2, POLYGLOT = DOCS / "real-smollm2.json", DOCS / "real-polyglot.json"
SEARCH, SOURCES, TEXTS = DOCS / "search-smollm2.json", DOCS / "real-sources.json", DOCS / "real-texts.json"
PROBES = DOCS / "real-probes.json"
ANSWERS = tables.RESULTS / "eval-polyglot.json"
OURS, THEIRS = "our problems", "the files' problems"  # as `bench.sources` names them


def held(file: Path) -> dict | None:
    """The contents of a file, or None if nothing is stored."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


UNCOMMITTED = " with uncommitted changes"


def stamped(stored: dict, command: str | None = None) -> str:
    """Where and when something was measured: the commits of its rows, if they have their own."""
    rows = [*stored.get("rows", {})] if isinstance(stored.get("rows"), list) else [*stored.get("rows", {}).values()]
    rows += stored.get("curve", {}).values()
    made = [row for row in rows if "commit" in row] or [stored]
    commits = dict.fromkeys(f"{row['commit'][:10]}{UNCOMMITTED * bool(row.get('dirty'))}" for row in made)
    dates = sorted({row["date"][:10] for row in rows if "date" in row} or {stored["date"][:10]})
    return (
        f"\n`{command or stored['command']}` on {stored['device']}, torch {stored['torch']}, commit "
        f"{', '.join(commits)}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.\n"
    )


def kl(figures: dict) -> str:
    """A mean KL with its interval."""
    return f"{figures['kl_mean']:.3g} ({figures['kl_ci95'][0]:.3g} to {figures['kl_ci95'][1]:.3g})"


def real(file: Path = SMOLLM2) -> str:
    """Every setting: damage per language, what is left, and what a probe reads. Empty if nothing is stored."""
    stored = held(file)
    if stored is None:
        return ""
    languages = list(next(row["damage"] for row in stored["rows"] if row["damage"]))
    head = ["edit", "tokens", *(f"KL {x} (95% interval)" for x in languages), *(f"ppl {x}" for x in languages)]
    body = []
    for row in stored["rows"]:
        name = row["setting"] if row.get("yardstick") else row["setting"][0].upper() + row["setting"][1:]
        costs = [kl(figures) for figures in row["damage"].values()] or ["-"] * len(languages)
        ratio = [f"{r['perplexity_ratio']:.3g}" for r in row["damage"].values()] or ["-"] * len(languages)
        left = "-"
        if "left" in row:
            layer, most = max(row["left"].items(), key=lambda item: item[1])
            left = f"{statistics.median(row['left'].values()):.2g}, {most:.2g} (layer {layer})"
        probes = ", ".join(f"{x:.3f}" for x in row["probes"].values()) if "probes" in row else "-"
        body.append([name, str(row.get("tokens", "-")), *costs, *ratio, row["word"] or "-", left, probes])
    return tables.table([*head, "in words", "left", "probe"], body) + stamped(stored)


def two_models() -> str:
    """README.md: what edits do to the embedded model and to a real one, beside 4-bit weights."""
    from kernel_surgery.damage.words import BITS4

    small, found, study = held(ANSWERS), held(SMOLLM2), held(SEARCH)
    if small is None or found is None:
        return ""
    damage, mode = small["damage"], small["config"]["mode"]
    names = {"deviations": "`deviations`, rank {rank}", "oblique": "`oblique` (the default), rank {rank}"}
    body = [
        [
            *("embedded (knows no everyday text)", names["deviations"].format(rank=small["subspace"]["rank"])),
            *(*_costs(damage["neutral"][mode], damage["yardsticks"][BITS4]), damage["verdict"][mode]["word"]),
        ]
    ]
    rows = {row["setting"]: row for row in found["rows"]}
    fits = {"oblique": "oblique rank 6, all tokens, chat and plain, 5"}
    fits["deviations"] = "deviations rank 10, last token, 10"
    for kind, setting in fits.items():
        row = rows.get(f"{setting} problems per category")
        if row is None:
            continue
        costs = _costs(row["damage"], rows["4-bit weights"]["damage"])
        body.append(["SmolLM2-135M-Instruct", names[kind].format(rank=row["rank"]), *costs, row["word"]])
    if study is not None:
        by = study["measured"]["chosen"]
        costs = _costs(by["neutral"], rows["4-bit weights"]["damage"])
        body.insert(2, ["SmolLM2-135M-Instruct", "found by a search, with an offset", *costs, by["word"]])
    languages = ", ".join(damage["neutral"][mode])
    head = ["model", "edit", f"damage ({languages})", "times that of 4-bit weights", "in words"]
    search = " and `python -m kernel_surgery.study docs/search-smollm2.toml --out search`" * (study is not None)
    source = "SmolLM2 is read from a file whose linear layers have four bits a weight."
    return tables.table(head, body) + f"\nFrom the command above, `{found['command']}`{search}. {source}\n"


def _costs(edit: dict, rounded: dict) -> list[str]:
    """The mean KL of an edit in every language, and how many times that of rounding the weights."""
    ratios = [edit[x]["kl_mean"] / rounded[x]["kl_mean"] for x in edit]
    return [", ".join(f"{by['kl_mean']:.2g}" for by in edit.values()), ", ".join(f"{ratio:.2g}" for ratio in ratios)]


def polyglot() -> str:
    """The same for the embedded model."""
    return real(POLYGLOT)


def search() -> str:
    """The search's choice on test, beside the baseline and random edits."""
    from kernel_surgery.studies.front import difference_in_words
    from kernel_surgery.studies.settings import Setting

    study = held(SEARCH)
    if study is None:
        return ""
    found, measured = study["search"], study["measured"]
    rows = {row["number"]: row for row in found["rows"]}
    languages = list(measured["original"]["kl"])
    head = ["edit, on test", *(f"KL {x} (95% interval)" for x in languages), *(f"ppl {x}" for x in languages)]
    body = [
        [
            *(name, *(kl(by["neutral"][x]) for x in languages)),
            *(f"{by['neutral'][x]['perplexity_ratio']:.3g}" for x in languages),
            *(f"{by['probe']:.4f} ({by['probe_ci95'][0]:.4f} to {by['probe_ci95'][1]:.4f})", f"{by['means']:.3f}"),
            by["word"] if name != "original" else "-",
        ]
        for name, by in measured.items()
    ]
    chosen = Setting.of(rows[found["chosen"]]["setting"])
    return (
        f"Tried: {len(rows) - 1} settings and the baseline; on the front: {len(found['front'])}. Choice: "
        f"{found['rule']}.\n\nChosen: {chosen.name}.\n\nBeside the baseline on test: "
        f"{difference_in_words(study['difference'])}.\n\n"
        + tables.table([*head, "probe (95% interval)", "means left", "in words"], body)
        + stamped(study["environment"], "python -m kernel_surgery.study docs/search-smollm2.toml --out search")
    )


def sources() -> str:
    """The edit fitted on other problems beside ours: damage, what is read on both, and the principal angles."""
    stored = held(SOURCES)
    if stored is None:
        return ""
    names = {OURS: "our templates", THEIRS: "MGSM", "our problems, the files' languages": "our templates"}
    languages = list(next(iter(stored["rows"].values()))["damage"])
    head = ["fitted on", "languages", "rank", "tokens", *(f"KL {x} (95% interval)" for x in languages)]
    head += [f"ppl {x}" for x in languages]
    body = [
        [
            *(names[name], str(len(row["languages"])), str(row["rank"]), str(row["tokens"])),
            *(kl(row["damage"][x]) for x in languages),
            *(f"{row['damage'][x]['perplexity_ratio']:.3g}" for x in languages),
            *(f"{row['read'][where]['probe']:.3f}, {row['read'][where]['means']:.2f}" for where in (OURS, THEIRS)),
        ]
        for name, row in stored["rows"].items()
    ]
    before = stored["original"]
    columns = [f"on our unseen wordings ({before[OURS]:.3f}, 1)", f"on unseen MGSM ({before[THEIRS]:.3f}, 1)"]
    angles = stored["angles"]
    lines = []
    for side, words in (("written", "what they write (A)"), ("read", "what they read (B)")):
        middle = [statistics.median(column) for column in zip(*angles[side].values(), strict=True)]
        lines.append(f"{words} {', '.join(f'{x:.0f}' for x in middle)}")
    chance = ", ".join(f"{x:.0f}" for x in angles["random"])
    return (
        tables.table([*head, *columns], body)
        + "\nPrincipal angles between the two edits in five languages, in degrees, median over the layers:\n\n"
        + "".join(f"- {line}\n" for line in [*lines, f"two random subspaces {chance}"])
        + stamped(stored, "python -m bench.sources --problems mgsm")
    )


def curve() -> str:
    """The learning curve on MGSM: tokens, rank and order of the fit."""
    stored = held(SOURCES)
    if stored is None or not stored.get("curve"):
        return ""
    whole = stored["rows"][THEIRS]
    rows = [*stored["curve"].values(), whole | {"sequential": False}]
    rows.sort(key=lambda row: (row["sequential"], row["rank"] != whole["rank"], row["rank"], row["tokens"]))
    languages = list(whole["damage"])
    body = []
    for row in rows:
        read = row["read"][THEIRS]
        low, high = read["probe_ci95"]
        body.append(
            [
                *("layer by layer" if row["sequential"] else "one by one", str(row["rank"]), str(row["tokens"])),
                *(kl(row["damage"][x]) for x in languages),
                *(f"{read['probe']:.3f} ({low:.3f} to {high:.3f})", f"{read['means']:.2f}", row["word"]),
            ]
        )
    head = ["fitted", "rank", "tokens", *(f"KL {x} (95% interval)" for x in languages)]
    return tables.table([*head, "probe on unseen MGSM", "means left", "in words"], body)


def streams() -> str:
    """What a probe reads of the language in unseen prompts, where an edit is made and in the residual stream."""
    stored = held(SOURCES)
    if stored is None or not stored.get("streams"):
        return ""
    edited = set(stored["angles"]["read"])

    def between(by: dict) -> str:
        read = [value for layer, value in by.items() if layer in edited]
        return f"{min(read):.3f} to {max(read):.3f}"

    body = []
    for name, row in stored["streams"].items():
        for tokens, sites in row["read"].items():
            stream = sites["resid_post"]
            last = f"{stream[max(stream, key=int)]:.3f}"
            count = str(row["problems"][tokens])
            body.append([name, tokens, count, between(sites["mlp_out"]), between(stream), last])
    head = ["edit", "probe reads", "problems", "MLPs' outputs, edited layers"]
    head += ["residual stream, edited layers", "residual stream, last layer"]
    languages = stored["rows"][THEIRS]["languages"]
    guessed = "" if (chance := chance_of_tokens(stored["problems_file"])) is None else f"; of every token, {chance:.3f}"
    how = f"Unseen problems of MGSM in {', '.join(languages)}. By chance: of the last token {1 / len(languages):.3g}"
    how += f"{guessed} (always naming the language with most of them). Commit " if guessed else ". Commit "
    how += f"{row['commit'][:10]}, {row['date'][:10]}."
    return tables.table(head, body) + f"\n{how}\n"


def chance_of_tokens(file: str) -> float | None:
    """The accuracy of always naming the language that has most tokens of the files' test problems, if it is stored."""
    return next((run["asked"]["chance"] for run in probe_runs() if run["config"].get("problems_file") == file), None)


def probe_runs() -> list[dict]:
    """The stored runs of `kernel_surgery.probe`."""
    return json.loads(PROBES.read_text(encoding="utf-8")) if PROBES.is_file() else []


def of_probe(found: dict) -> dict:
    """What is stored of a run of `kernel_surgery.probe`: without the figures that no table or picture shows."""
    kept = ("command", "config", "environment", "model", "notes", "asked", "controls", "yardsticks", "beside")
    stored = {name: found[name] for name in (*kept, "difference", "verdict")}
    stored["subspace"] = {name: found["subspace"][name] for name in ("rank", "layers", "site", "fit")}
    return stored | {
        "measured": {
            name: {key: value for key, value in by.items() if key != "neutral"}
            for name, by in found["measured"].items()
        }
    }


def probes() -> str:
    """What a probe reads of the language after a fitted edit, and after random ones of the same rank.

    A column for each run: there are many figures, and few runs.
    """
    from kernel_surgery.damage.words import CONSTANT
    from kernel_surgery.studies.probe_words import EDIT, MORE, ORIGINAL, hidden, of_the_word, percent, ranged
    from kernel_surgery.studies.randoms import KINDS, SCALED

    def ranged_of(found: dict, kind: str, of: str) -> str:
        form = ".3f" if of == "probe" else ".2g"
        return ranged(found["beside"][kind][of], form) if kind in found["controls"] else "-"

    def more(found: dict) -> str:
        each = {kind: found["beside"][kind]["probe"] for kind in found["controls"] if kind != SCALED}
        kinds = "; ".join(f"{by['n']} {KINDS[kind]}, p = {by['p']:.2f}" for kind, by in each.items())
        return f"by the intervals, than {kinds}" if found["verdict"] == MORE else "not shown"

    def by_language(values: dict) -> str:
        return ", ".join(f"{language} {value:.2g}" for language, value in values.items())

    runs = probe_runs()
    kinds = list(dict.fromkeys(kind for found in runs for kind in found["controls"]))
    head, columns, commands, stamps, fits = [""], [], "", [], []
    for found in runs:
        edit, before, fit = found["measured"][EDIT], found["measured"][ORIGINAL], found["subspace"]["fit"]
        last = list(edit["streams"])[-1]
        low, high = edit["probe_ci95"]
        head.append(f"{found['model']['id']}: {fit['method']}{', layer by layer' * ('sequential' in fit)}")
        columns.append(
            {
                "rank": str(found["subspace"]["rank"]),
                "fitted on": fit.get("problems_file", "our templates"),
                "asked": found["config"].get("problems_file", "our templates, other wordings"),
                "languages": ", ".join(found["asked"]["languages"]),
                "read without an edit": f"{before['probe']:.3f}",
                "read after the edit": f"{edit['probe']:.3f} ({low:.3f} to {high:.3f})",
                "by chance": f"{found['asked']['chance']:.3f}",
                "hidden": percent(hidden(found)),
                **{f"read after random edits {KINDS[kind]}": ranged_of(found, kind, "probe") for kind in kinds},
                "more than random edits": more(found),
                "means left": f"{edit['means']:.2f}",
                "means left, random edits": ranged(found["beside"]["all"]["means"], ".2f"),
                "read in the residual stream, last layer": f"{edit['streams'][last]:.3f}",
                "the same without an edit": f"{before['streams'][last]:.3f}",
                "prompts in the chat template": "yes" if found["config"]["chat"] == "on" else "no",
                "KL": by_language(edit["kl"]),
                "KL without context": by_language(found["yardsticks"][CONSTANT]),
                **{f"largest KL, random edits {KINDS[kind]}": ranged_of(found, kind, "damage") for kind in kinds},
                "in words": f"{edit['word']}{of_the_word(found)}",
            }
        )
        environment = found["environment"]
        commands += f"    {found['command']}\n"
        stamps.append(f"{environment['device']}, commit {environment['commit'][:10]}, {environment['date'][:10]}")
        made = fit["environment"]
        fits.append(f"{made['commit'][:10]}{UNCOMMITTED * bool(made['dirty'])} on {made['device']}")
    if not columns:
        return ""
    body = [[name, *(column[name] for column in columns)] for name in columns[0]]
    fitted = f"The subspaces were fitted at commits {', '.join(fits)}."
    return f"{tables.table(head, body)}\n{commands}\n{'; '.join(dict.fromkeys(stamps))}. {fitted}\n"


def texts() -> str:
    """Texts of the original and the edited models, one block per prompt."""
    stored = held(TEXTS)
    if stored is None:
        return ""
    blocks = []
    for index, prompt in enumerate(stored["prompts"]):
        body = [
            [name, " ".join(by[index].split()).replace("|", "\\|") or "(nothing)"]
            for name, by in stored["texts"].items()
        ]
        blocks.append(f"**{prompt}**\n\n" + tables.table(["", "text"], body))
    how = f"Decoded greedily, {stored['tokens']} tokens at most{', in the chat template' * stored['chat']}."
    return "\n".join(blocks) + f"\n{how}\n" + stamped(stored)
