"""The wheel and the source distribution as a user gets them: built, installed in an empty environment, run there."""

import email
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

import kernel_surgery
from tests.release import changes, refusals
from tests.support.distribution import ROOT, TO_RELEASE, Distributions, copy_of_the_tree, installed, run, unpack

VERSION = kernel_surgery.__version__

# Run by the interpreter of the wheel's environment. Prints one line of JSON.
PROBE = """
import json, kernel_surgery
from importlib.metadata import distribution
from packaging.requirements import Requirement
found = distribution("kernel-surgery")
needed = [Requirement(line) for line in found.requires]
needed = [one for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
there = {one.name: distribution(one.name).version for one in needed}
print(json.dumps({
    "file": kernel_surgery.__file__,
    "version": [found.version, kernel_surgery.__version__],
    "entry points": [f"{point.group}: {point.name} = {point.load().__module__}" for point in found.entry_points],
    "requirements": len(needed),
    "unmet": [f"{one}, found {there[one.name]}" for one in needed if there[one.name] not in one.specifier],
}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Distributions:
    """Those that a release is about to publish (`tests.release`), else of a copy of the tree."""
    folder = tmp_path_factory.mktemp("distributions")
    if given := os.environ.get(TO_RELEASE):
        return Distributions.read(Path(given), folder)
    return Distributions.of(copy_of_the_tree(folder / "tree"), folder)


def metadata(wheel: Path) -> bytes:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return archive.read(name)


def page_of(wheel: Path) -> str:
    """The text that a package index shows."""
    return email.message_from_bytes(metadata(wheel)).get_payload()


def left_out(tracked: set[str], names: set[str]) -> list[str]:
    """Files of the clone that the source distribution does not hold."""
    return sorted(tracked - names - {"kernel_surgery/kernels"})


@pytest.mark.slow
def test_the_source_distribution_holds_every_file_of_the_clone(made):
    names = {path.relative_to(made.unpacked).as_posix() for path in made.unpacked.rglob("*") if path.is_file()}
    if (ROOT / ".git").exists():
        tracked = set(subprocess.check_output(["git", "-C", str(ROOT), "ls-files"], text=True).splitlines())
    else:  # this is one, and makes another
        tracked = set((ROOT / "kernel_surgery.egg-info" / "SOURCES.txt").read_text().split())
    assert len(tracked) > 400 and left_out(tracked, names) == []
    assert left_out(tracked | {"docs/new.xml"}, names) == ["docs/new.xml"], "the check can fail"
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.slow
def test_the_page_on_a_package_index_is_valid_and_stands_alone(made, capsys):
    fields = Metadata.from_email(metadata(made.wheel), validate=True)
    assert (fields.name, str(fields.version), fields.license_expression) == ("kernel-surgery", VERSION, "Apache-2.0")
    assert fields.description_content_type == "text/markdown" and fields.summary and fields.classifiers
    page = page_of(made.wheel)
    assert page.startswith("# Kernel Surgery") and not re.search(r"\]\((?!https://)", page), "a link to the clone"
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(example, "the page", "exec"), {})
    same, other = capsys.readouterr().out.split("> ")[1:]
    assert "the same text" in same and "{+" in other


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment_outside_the_clone(made, tmp_path):
    python = installed(tmp_path / "venv", str(made.wheel))
    outside = tmp_path / "outside"
    outside.mkdir()
    seen = json.loads(run([str(python), "-c", PROBE], outside).splitlines()[-1])
    assert seen["file"].startswith(str(tmp_path / "venv")), "not the clone's"
    assert seen["version"] == [VERSION, VERSION] and seen["requirements"] > 8 and seen["unmet"] == []
    assert seen["entry points"] == [
        "console_scripts: kernel-surgery = kernel_surgery.__main__",
        "vllm.general_plugins: kernel_surgery = kernel_surgery.engines.plugin",
    ]
    assert "No broken requirements" in run([sys.executable, "-m", "pip", "--python", str(python), "check"], outside)
    # The page's own command, on few problems.
    script = str(python.with_name("kernel-surgery"))
    assert "kernel-surgery eval --mode fused" in page_of(made.wheel)
    assert "compare the original and the edited model" in run([script], outside)
    few = ["--languages", "en", "--problems", "1", "--out", "results"]
    evaluated = run([script, "eval", "--mode", "fused", *few], outside)
    assert "damage, fused: " in evaluated and (outside / "results" / "report.html").is_file()
    assert json.loads((outside / "results" / "results.json").read_text())["model"]["id"] == "polyglot"


@pytest.mark.slow
def test_the_tests_run_from_the_unpacked_source_distribution(made, tmp_path):
    """As CONTRIBUTING.md says: with the link that a source distribution cannot hold, and installed in place."""
    assert "`ln -s ../kernels kernel_surgery/kernels`" in (made.unpacked / "CONTRIBUTING.md").read_text()
    (tmp_path / "unpacked").mkdir()
    unpacked = unpack(made.sdist, tmp_path / "unpacked")
    (unpacked / "kernel_surgery" / "kernels").symlink_to("../kernels")
    python = installed(tmp_path / "venv", "-e", str(unpacked))
    where = run([str(python), "-c", "import kernel_surgery.kernels.project as p; print(p.__file__)"], tmp_path)
    assert Path(where.strip()).resolve() == unpacked / "kernels" / "project.py"
    some = ["tests/test_kept.py", "tests/scoring/test_code.py", "-k", "not hook"]
    last = run([str(python), "-m", "pytest", "-q", "-n0", *some], unpacked).splitlines()[-1]
    assert re.fullmatch(r"\d+ passed.*", last) and int(last.split()[0]) > 20


# --- what `make release` refuses and prints

CHANGELOG = "# Changelog\n\nWhat a user notices.\n\n## 0.2.0, 2027-01-02\n\n- New.\n\n## 0.1.0, 2026-12-01\n\n- Old.\n"


def test_the_notes_of_a_version_are_its_part_of_the_changelog():
    assert changes(CHANGELOG, "0.2.0") == ("2027-01-02", "- New.")
    assert changes(CHANGELOG, "0.1.0") == ("2026-12-01", "- Old.")
    assert changes(CHANGELOG, "0.3.0") is None
    when, notes = changes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), VERSION)
    assert when and len(notes.splitlines()) > 10


def test_a_release_is_refused_unless_everything_is_committed_and_dated():
    about = {"status": "", "changelog": CHANGELOG, "version": "0.2.0", "there": []}
    assert refusals(**about) == []
    for changed, said in (
        ({"status": " M README.md"}, "the working tree has changes: README.md"),
        ({"version": "0.3.0"}, "CHANGELOG.md has no entry for 0.3.0"),
        ({"changelog": CHANGELOG.replace("2027-01-02", "not released yet")}, "dates 0.2.0 'not released yet'"),
        ({"there": ["kernel_surgery-0.2.0.tar.gz"]}, "dist/ holds kernel_surgery-0.2.0.tar.gz already"),
    ):
        (refusal,) = refusals(**about | changed)
        assert said in refusal
