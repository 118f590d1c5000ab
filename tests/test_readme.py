"""What the README says is so: its code runs, its commands parse, its links lead somewhere, its figures are real."""

import functools
import importlib
import json
import re
import shlex

import pytest

from bench import pages, plots, store, tables
from bench import pictures as shown_pictures
from bench.pages import ANSWERS, ROOT, SECTIONS, renewed
from kernel_surgery.common.errors import UserError

WHOLE = (ROOT / "README.md").read_text(encoding="utf-8")
README = re.sub("<!--.*?-->", "", WHOLE)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def commands():
    """[module, arguments] of every `python -m` command in the README, in a block or in a line."""
    found = re.findall(r"python -m (kernel_surgery[.\w]*|bench[.\w]*)([^\n`&|]*)", README)
    return [("bench.__main__" if m == "bench" else m, shlex.split(arguments)) for m, arguments in found]


def test_the_python_example_prints_what_stands_below_it(capsys):
    """Word for word: the model is decoded greedily in float32, on any CPU."""
    at = next(i for i, (language, _) in enumerate(BLOCKS) if language == "python")
    exec(compile(BLOCKS[at][1], "README.md", "exec"), {})
    assert capsys.readouterr().out == BLOCKS[at + 1][1]
    assert "[-5-]" in BLOCKS[at + 1][1] and "{+15+}" in BLOCKS[at + 1][1], "a difference that the eye sees"


def test_it_can_be_read_in_a_few_minutes():
    assert len(WHOLE.splitlines()) < 150
    assert sum(line.startswith("| ---") for line in WHOLE.splitlines()) == 3


def test_there_are_two_set_up_commands_and_no_third():
    shell = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    assert [line for line in shell if "pip install" in line] == [
        "pip install -c constraints.txt -e . && python -m kernel_surgery.eval --mode fused",
        'pip install -c constraints.txt -e ".[test]" && python -m pytest',
    ]


@pytest.mark.parametrize("module, arguments", commands(), ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_every_command_is_one_that_its_parser_takes(module, arguments):
    parser = importlib.import_module(module).parser()
    if arguments != ["--list-models"]:  # it prints and stops, as --help does
        parser.parse_args(arguments)
    with pytest.raises(SystemExit):  # the check can fail
        parser.parse_args(["--no-such-option", *arguments])


def test_options_that_the_text_names_exist():
    named = set(re.findall(r"`(--[a-z-]+)", README))
    helps = " ".join(importlib.import_module(m).parser().format_help() for m in {m for m, _ in commands()})
    assert named and {option for option in named if option not in helps} == set()


def headings(text: str) -> set[str]:
    """What a link's fragment can name in a page, as GitHub writes it."""
    found = re.findall("^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in found}


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_every_link_leads_to_a_file_or_a_heading(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        assert not heading or heading in headings(file.read_text(encoding="utf-8")), target


@functools.cache
def pictures():
    return plots.draw()


@pytest.fixture
def drawn_once(monkeypatch):
    """The pictures take two seconds to draw, and the rows that they are drawn from do not change here."""
    made = pictures()
    monkeypatch.setattr(plots, "draw", lambda: dict(made))
    return made


def test_the_generated_pages_and_plots_are_up_to_date(drawn_once):
    assert list(pages.outdated()) == [], "run python -m bench.pages"


def test_the_readmes_pictures_are_those_of_the_stored_results(monkeypatch, tmp_path):
    assert shown_pictures.outdated() == [], "run python -m bench.pictures"
    # A change of the report's first screen, or of the results, is seen without a browser.
    monkeypatch.setattr(shown_pictures, "first_screen", lambda results: "<p>another</p>")
    assert len(shown_pictures.outdated()) == 2
    monkeypatch.setattr(shown_pictures, "places", lambda: "")
    assert len(shown_pictures.outdated()) == 3


@pytest.mark.slow
def test_the_check_names_each_page_that_is_not_up_to_date_and_writes_nothing(monkeypatch, tmp_path, capsys, drawn_once):
    for name in [*SECTIONS, *(f"bench/plots/{p.name}" for p in ROOT.glob("bench/plots/*.svg"))]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    assert pages.run(["--check"]) == 0 and capsys.readouterr().out == ""
    page = tmp_path / "docs" / "benchmarks.md"
    typed = page.read_text(encoding="utf-8").replace("<!-- measured: op -->", "<!-- measured: op -->\n0.123")
    page.write_text(typed, encoding="utf-8")
    (tmp_path / "bench" / "plots" / "models.svg").unlink()
    assert pages.run(["--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["docs/benchmarks.md", "bench/plots/models.svg"]
    assert all("is not up to date" in line for line in lines)
    assert page.read_text(encoding="utf-8") == typed and not (tmp_path / "bench" / "plots" / "models.svg").exists()
    assert pages.run([]) == 0 and pages.run(["--check"]) == 0
    with pytest.raises(UserError, match="--check writes nothing"):
        pages.run(["--check", "--study", str(tmp_path)])
    page.write_text(typed.replace("<!-- measured: op -->", ""), encoding="utf-8")
    with pytest.raises(UserError, match=r"docs/benchmarks\.md: a page must have <!-- measured: op --> exactly once"):
        pages.outdated()


@pytest.mark.parametrize("page", SECTIONS)
def test_a_typed_figure_is_replaced_and_a_lost_mark_is_refused(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    sections = {name: lambda name=name: f"table {name}\n" for name in SECTIONS[page]}
    for name in sections:
        begin = f"<!-- measured: {name} -->"
        assert f"{begin}\ntable {name}\n<!-- end -->" in renewed(text.replace(begin, f"{begin}\n0.123"), sections)
        with pytest.raises(UserError, match=r"exactly once, with <!-- end --> after it\. Nothing was written"):
            renewed(text.replace(begin, ""), sections)


def test_the_readmes_table_follows_its_file(monkeypatch, tmp_path):
    results = json.loads(ANSWERS.read_text(encoding="utf-8"))
    assert results["environment"]["dirty"] is False
    before = pages.answers()
    results["modes"]["original"]["en"]["correct"] -= 1
    (tmp_path / "kept.json").write_text(json.dumps(results))
    monkeypatch.setattr(pages, "ANSWERS", tmp_path / "kept.json")
    assert pages.answers() != before


RESULTS = sorted(file.name for file in tables.RESULTS.glob("*.json"))
NO_ROWS = {"aot.json", "eval-polyglot.json"}  # of the package's own commands


@pytest.mark.parametrize("name", [name for name in RESULTS if name not in NO_ROWS])
def test_a_kept_row_says_what_when_and_on_what_it_was_measured(name):
    found = store.read(tables.RESULTS / name)
    assert found and set(RESULTS) >= NO_ROWS
    for row in found:
        assert store.FIELDS.keys() <= row.keys(), store.FIELDS.keys() - row.keys()
        assert row["dirty"] is False and re.fullmatch("[0-9a-f]{40}", row["commit"]), "measure on a clean tree"
        assert row["run"].startswith(row["date"]) and row["device"] and row["machine"] and row["torch"]
        assert row["command"].startswith("python -m bench") and "/" not in row["command"]
        if row["us_p50"] is not None:
            assert 0 < row["us_p20"] <= row["us_p50"] <= row["us_p80"]
    # No row stands twice in a run.
    key = ("run", "case", "provider", "M", "d", "k", "dtype", "how", "size", "sequences", "tokens", "cache", "graph")
    seen = [tuple(str(row.get(k)) for k in key) for row in found]
    assert len(seen) == len(set(seen))


def test_rows_from_before_a_benchmark_was_renamed_are_read_under_its_name_of_today(tmp_path):
    file = tmp_path / "rows.json"
    old = {"bench": "counted", "command": "python -m bench.counted --case small", "run": "1"}
    file.write_text(json.dumps([old]))
    assert store.read(file) == [old | {"bench": "opcount", "command": "python -m bench.opcount --case small"}]
    store.keep(file, [old | {"bench": "opcount", "run": "2"}])
    assert json.loads(file.read_text())[0] == old  # the file itself keeps the name of its day
    (day,) = {row["bench"] for row in json.loads((tables.RESULTS / "opcount.json").read_text(encoding="utf-8"))}
    assert day == "counted" and {row["bench"] for row in tables.rows("opcount.json")} == {"opcount"}


def test_rows_are_added_run_after_run_and_a_run_replaces_its_own(tmp_path):
    file = tmp_path / "rows.json"
    one = store.record("op", "project", "copy", us_p50=1.0, run="2026-01-01T00:00:00")
    assert list(one)[: len(store.FIELDS)] == list(store.FIELDS) and one["launches"] is None and one["us_p50"] == 1.0
    store.keep(None, [one])
    store.keep(file, [])
    assert not list(tmp_path.iterdir()) and store.read(file) == store.newest(file) == []
    store.keep(file, [one])
    other = one | {"run": "2026-01-02T00:00:00"}
    store.keep(file, [other])
    store.keep(file, [other, other | {"provider": "eager"}])
    assert [r["provider"] for r in store.read(file)] == ["copy", "copy", "eager"]
    assert [r["provider"] for r in store.newest(file)] == ["copy", "eager"]


@pytest.mark.slow
def test_the_pictures_are_compared_without_their_last_digit(drawn_once):
    """The last printed digit of a coordinate depends on the machine's maths library."""
    ours = {"search-dev.svg", "search-test.svg", "curve.svg"}
    assert drawn_once.keys() == {"counted.svg", "models.svg", "growth.svg", *ours}
    picture, same_picture = drawn_once["growth.svg"], plots.same_picture
    number = re.search(r"\d+\.\d{6}", picture)[0]
    assert same_picture(picture, picture.replace(number, f"{float(number) + 1e-6:.6f}"))
    assert not same_picture(picture, picture.replace(number, f"{float(number) + 1e-3:.6f}"))
    assert not same_picture(picture, picture.replace("ms", "us", 1))


def test_a_run_on_a_gpu_gets_its_page(monkeypatch, tmp_path):
    """Rows as `make gpu` writes them, made up here."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.on_gpu() == "Nothing has been measured on a GPU yet. `make gpu` measures it.\n"
    about = {"torch": "2.11.0", "transformers": "5.17.0", "device": "A GPU", "commit": None, "dirty": None, "run": "1"}
    ratio = {"ratio": 1.005, "ratio_ci95": [1.0, 1.02], "ratio_range": [1.0, 1.02], "us_p50": 2000.0, "left_out": None}
    ratio |= {"error_over_bound": 0.5, "launches": 300, "noise": 0.01, "verdict": "within the noise", "us_added": 10.0}
    ratio |= {"detectable": 0.02, "tokens_per_s": 500.0}
    model = about | ratio | {"model": "qwen", "layers": 36, "edited": 18, "dtype": "bfloat16", "date": "2026-01-02"}
    model |= {"case": "decode", "sequences": 1, "tokens": 1024, "how": "graph", "goal_met": None}
    op = about | ratio | {"case": "project", "M": 16, "d": 2048, "k": 10, "dtype": "bfloat16", "date": "2026-01-02"}
    op |= {"of_floor": 0.9, "copy_gbps": 3000.0, "cache": "warm", "graph": True, "provider": "form row"}
    for day, met in (("20260101", False), ("20260102", True)):
        folder = tmp_path / f"{day}-a-gpu"
        folder.mkdir()
        parts = {"kernels": {"status": 0, "seconds": 60.0}, "eval": {"status": "not run: x", "seconds": 0.0}}
        (folder / "summary.json").write_text(json.dumps({"environment": about, "date": day, "parts": parts}))
        stopped = {"provider": "peft", "left_out": "graph: RuntimeError: no", "error_over_bound": None}
        kept = [model | {"provider": "original"}, model | {"provider": "fused", "goal_met": met}, model | stopped]
        (folder / "model.json").write_text(json.dumps(kept))
        host = op | {"graph": False, "provider": "as launched"}
        (folder / "op.json").write_text(json.dumps([op, host, op | {"left_out": "OutOfResources"}]))
    page = tables.on_gpu()
    assert "A GPU, torch 2.11.0, transformers 5.17.0, commit unknown, 2026-01-02." in page
    assert "0.99 met" in page and "0.99 not met" not in page and "graph: RuntimeError: no" in page
    assert "| original | 2.00 ms, 500 tokens/s |" in page and "| fused | 300 |" in page
    assert "- not run: form row at 16 x 2048, k = 10: OutOfResources\n" in page
    assert page.count("| form row |") == 1 and "as launched" not in page and "3000 GB/s" in page
