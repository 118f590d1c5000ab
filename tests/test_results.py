"""docs/results.md names what a run writes: every field of the golden run is there, and nothing else is."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "tests" / "golden" / "run" / "eval"
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
MEASURE = r"accuracy|fat_tokens|language_fidelity|mean_tokens|repetition"
VARIES = {
    "MODE": r"original|hook|baked|fused|lora",
    "LANG": r"en|zh|unknown",
    "LAYER": r"\d+",
    "SITE": r"mlp_out|resid_post",
    "CATEGORY": r"arithmetic|combinatorics|modular|geometry|sequences",
    "YARDSTICK": r"other precision|[48]-bit|haar|matched|no context",
}
# Of probe.json, below these names.
VARIES_THERE = {
    "measured.": {"EDIT": r"original|edit|\w+:\d+"},
    "difference.": {"EDIT": r"original|edit|\w+:\d+"},
    "beside.": {"KIND": r"haar|matched|energy|pca|all", "FIGURE": r"probe|means|damage|stream \d+"},
    "controls.": {"MEASURE": MEASURE, "CONTROL": r"\w+:\d+", "KIND": r"haar|matched|energy|pca"},
}


def paths(value: object, at: str = "") -> set[str]:
    """The paths of all values, with the page's words for what varies. Of a list, those of all its rows."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(row, f"{at}[]") for row in value))
    if not isinstance(value, dict) or not value:
        return {at}
    found = set()
    for name, held in value.items():
        there = (held for start, held in VARIES_THERE.items() if f"{at}.".startswith(start))
        varies = next(there, {}) | VARIES
        word = next((word for word, form in varies.items() if re.fullmatch(form, name)), name)
        if f"{at}.{word}" == "controls.MODE":
            word = "original"
        found |= paths(held, f"{at}.{word}" if at else word)
    return found


def rows(heading: str) -> dict[str, set[str]]:
    """{path: the names that its row adds} of the tables below a heading."""
    found = {}
    for line in PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines():
        if not line.startswith("| `"):
            continue
        first, _, meaning = line.strip("| ").partition(" | ")
        path = ""
        for name in re.findall(r"`([^`]+)`", first):
            path = path.rpartition(".")[0] + name if name.startswith(".") else name
            found[path] = set(re.findall(r"`(\w+)[`.]", meaning))
    return found


def unnamed(made: set[str], named: dict[str, set[str]]) -> set[str]:
    """The paths that no row names, itself or by what it adds. A row that adds no names stands for all below it."""

    def has(path: str) -> bool:
        parts = re.split(r"(?=\.)", path)
        for cut in range(len(parts), 0, -1):
            if (row := named.get("".join(parts[:cut]))) is not None:
                return cut == len(parts) or not row or parts[cut].lstrip(".") in row
        return False

    return {path for path in made if not has(path)}


def absent(made: set[str], named: dict[str, set[str]]) -> set[str]:
    """The paths that the page names and the run has not."""
    return {path for path in named if not any(re.match(rf"{re.escape(path)}(?:[.\[]|$)", one) for one in made)}


def test_the_page_names_every_field_of_a_run_and_no_other():
    made = paths(json.loads((RUN / "results.json").read_text(encoding="utf-8")))
    assert not unnamed(made, rows("results.json")) and not absent(made, rows("results.json"))
    sample = json.loads((RUN / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    fields, named = set(sample), rows("samples.jsonl")
    assert fields == set(named)
    for name in ("config.json", "controls.jsonl", "results.json", "samples.jsonl", "report.html"):
        assert name in PAGE


def test_the_page_names_every_field_of_a_probe_and_no_other():
    """The first fields are those of results.json, and the first part of the page has them."""
    made = json.loads((RUN.parent / "probe" / "probe.json").read_text(encoding="utf-8"))
    shared = ("schema", "command", "config", "environment", "model", "subspace", "notes")
    assert set(shared) <= set(made)
    found = paths({name: held for name, held in made.items() if name not in shared})
    assert not unnamed(found, rows("probe.json")) and not absent(found, rows("probe.json"))


def test_a_field_that_is_not_named_and_a_name_of_nothing_are_found():
    named = {"a.b": set(), "a.c": {"x"}, "d": set()}
    assert unnamed({"a.b.y", "a.c.x", "a.c.z", "e", "d"}, named) == {"a.c.z", "e"}
    assert absent({"a.b.y", "a.c.x"}, named) == {"d"}
