"""What is installed, and whose `kernels` an import finds.

`python -m` and `python -c` put the current folder on sys.path. Our Triton kernels live in the top-level
folder `kernels/`, and `kernels` is also a PyPI package that transformers imports when it finds it. What
keeps the two apart is that `kernels/` has no `__init__.py`: a folder without one is at most a namespace
package, and a regular package anywhere on sys.path wins over it. Where the PyPI package is absent,

  - in a clone, `import kernels` may give that namespace (no `__file__`): transformers sees no version and
    no file and takes the package for absent, which is right;
  - installed from a wheel or in editable mode, there must be no `kernels` at all.

Everything is built and installed in temporary folders, offline, from a copy of the tree. An installation
here is what pip does with a wheel: its files unpacked into the site-packages of a new virtual environment.
A stand-in with a marker and the version transformers asks for plays the PyPI package.
"""

import importlib.metadata
import json
import os
import re
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kernel_surgery
from tests.support.distribution import build, copy_of_the_tree, run, unpack
from tests.support.marks import everyday

ROOT = Path(__file__).resolve().parent.parent
MARKER = "stands for the PyPI package"

# Run by every interpreter under test, as `-c` and as a module under `-m`. Prints one line of JSON.
PROBE = f"""
import importlib.util, json, os, sys
report = {{}}
try:
    import kernels
    report["kernels"] = [getattr(kernels, "MARKER", None), getattr(kernels, "__file__", None)]
except ModuleNotFoundError:
    report["kernels"] = None
spec = importlib.util.find_spec("kernel_surgery.kernels.project")
report["ours"] = spec and os.path.realpath(spec.origin)
if "transformers" in os.environ["PROBE"]:
    sys.path.extend({[path for path in sys.path if path.endswith("-packages")]!r})
    from transformers.utils.import_utils import is_kernels_available
    report["transformers"] = is_kernels_available()
if "hub" in os.environ["PROBE"]:
    try:
        import transformers.integrations.hub_kernels
        report["hub"] = "ok"
    except ImportError as error:
        report["hub"] = str(error)
if "import" in os.environ["PROBE"]:
    import kernel_surgery.kernels.project as project
    report["imported"] = os.path.realpath(project.__file__)
print(json.dumps(report))
"""


class Places:
    """A clone, an editable installation and an installed wheel, with and without the stand-in, made once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clone = copy_of_the_tree(folder / "clone")
        self.source = copy_of_the_tree(folder / "source")
        self.built = build(self.source, "sdist", "wheel", "editable")
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def python(self, kind: str, with_stand_in: bool) -> Path:
        home = self.folder / f"venv-{kind}-{with_stand_in}"
        python = home / "bin" / "python"
        if python.exists():
            return python
        venv.create(home, with_pip=False, symlinks=True)
        site = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        if kind in ("wheel", "editable"):
            zipfile.ZipFile(self.built[kind]).extractall(site)
        if with_stand_in:
            stand_in(site)
        (site / "trap_probe.py").write_text(PROBE)
        return python

    def probe(self, kind: str, with_stand_in: bool, *, clone: Path | None = None, module=False, what="") -> dict:
        python = self.python(kind, with_stand_in)
        cwd = self.elsewhere if kind in ("wheel", "editable") else clone or self.clone
        command = [str(python), *(["-m", "trap_probe"] if module else ["-c", PROBE])]
        return json.loads(run(command, cwd, PROBE=what).splitlines()[-1])


def stand_in(site: Path) -> None:
    from transformers.utils import import_utils

    package = site / "kernels"
    package.mkdir()
    # transformers takes a dozen names from it, whichever they are in this release.
    (package / "__init__.py").write_text(
        f"from unittest.mock import MagicMock\nMARKER = {MARKER!r}\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return MagicMock(name=name)\n"
    )
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.2")
    info = site / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")


def complaints(report: dict, with_stand_in: bool, clone: bool, project: str) -> list[str]:
    """What is wrong with the imports of one place; an empty list where each name finds its own."""
    found = []
    marker, file = report["kernels"] or (None, None)
    if with_stand_in and marker != MARKER:
        found.append(f"import kernels finds {file}, not the installed package")
    if not with_stand_in and file is not None:
        found.append(f"import kernels finds {file}, but no package of that name is installed")
    if not with_stand_in and not clone and report["kernels"] is not None:
        found.append("a top-level `kernels` was installed")
    if not (report["ours"] or "").endswith(project):
        found.append(f"kernel_surgery.kernels.project is {report['ours']}, expected {project}")
    if with_stand_in and report.get("transformers") is False:
        found.append("transformers does not see the installed package")
    if not with_stand_in and report.get("transformers") and not _really_installed("kernels"):
        found.append("transformers takes our folder for the package")
    if report.get("hub", "ok") != "ok":
        found.append(f"transformers cannot import the package: {report['hub']}")
    if report.get("imported", report["ours"]) != report["ours"]:
        found.append(f"kernel_surgery.kernels.project was imported from {report['imported']}")
    return found


def _really_installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Places:
    before = {path.name for path in ROOT.iterdir()}
    places = Places(tmp_path_factory.mktemp("places"))
    appeared = {path.name for path in ROOT.iterdir()} - before
    assert not appeared & {"build", "dist", "kernel_surgery.egg-info"}, "building wrote into the working tree"
    return places


# -- the kernels trap


@pytest.mark.parametrize("with_stand_in", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("module", everyday([False, True], True), ids=["-c", "-m"])
def test_in_a_bare_clone_each_name_finds_its_own(places, module, with_stand_in):
    # The whole of it once: transformers imports the package, and our module runs beside it.
    deep = " hub import" if with_stand_in and module else ""
    report = places.probe("clone", with_stand_in, module=module, what="transformers" + deep)
    print(report)
    assert complaints(report, with_stand_in, True, "clone/kernels/project.py") == []


@pytest.mark.parametrize("with_stand_in", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("kind", everyday(["editable", "wheel"], "wheel"))
def test_installed_each_name_finds_its_own(places, kind, with_stand_in):
    # What transformers makes of each answer is seen in the clone; once more here, where the package is there.
    report = places.probe(kind, with_stand_in, what="transformers import" if with_stand_in else "")
    print(report)
    project = {
        "editable": "source/kernels/project.py",
        "wheel": "site-packages/kernel_surgery/kernels/project.py",
    }
    assert complaints(report, with_stand_in, False, project[kind]) == []


@pytest.mark.parametrize("with_stand_in", everyday([False, True], False), ids=["without", "with"])
def test_a_planted_init_file_is_caught(places, tmp_path, with_stand_in):
    """The same check, on the same tree with the one file that must not be there."""
    trapped = tmp_path / "clone"
    shutil.copytree(places.clone, trapped, symlinks=True)
    (trapped / "kernels" / "__init__.py").touch()
    report = places.probe("clone", with_stand_in, clone=trapped, what="transformers hub" if with_stand_in else "")
    found = "\n".join(complaints(report, with_stand_in, True, "clone/kernels/project.py"))
    print(found)
    assert "import kernels finds" in found and "kernels/__init__.py" in found
    if with_stand_in:
        assert "transformers cannot import the package: cannot import name" in found


def test_the_folder_has_no_init_file_and_the_link_is_relative():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for folder in ("tests", "bench"):
        assert not (ROOT / folder / "kernels").exists()
    if not (ROOT / "PKG-INFO").is_file():
        assert os.readlink(ROOT / "kernel_surgery" / "kernels") == os.path.join("..", "kernels")


# -- what the wheel and the source distribution hold


def wheel_complaints(wheel: Path, source: Path) -> list[str]:
    names = zipfile.ZipFile(wheel).namelist()
    inside = [name for name in names if ".dist-info/" not in name]
    found = [f"{name} is outside kernel_surgery/" for name in inside if not name.startswith("kernel_surgery/")]
    data = {".safetensors", ".json", ".md", ".txt"}
    polyglot = source / "kernel_surgery" / "polyglot"
    expected = [
        *(f"kernel_surgery/kernels/{path.name}" for path in (source / "kernels").glob("*.py")),
        *(f"kernel_surgery/{path.name}" for path in (source / "kernel_surgery").glob("*.py")),
        *(path.relative_to(source).as_posix() for path in (source / "kernel_surgery").glob("[!k]*/*.py")),
        "kernel_surgery/py.typed",
        "kernel_surgery/problems/neutral.json",
        *(f"kernel_surgery/lmeval/{path.name}" for path in (source / "kernel_surgery" / "lmeval").glob("*.yaml")),
        *(f"kernel_surgery/polyglot/model/{path.name}" for path in polyglot.glob("model/*") if path.suffix in data),
        *(f"kernel_surgery/polyglot/{path.name}" for path in polyglot.glob("*.*") if path.suffix in data | {".jsonl"}),
    ]
    found += [f"{name} is there {names.count(name)} times" for name in expected if names.count(name) != 1]
    return found


def test_the_wheel_holds_everything_once_and_no_top_level_kernels(places):
    assert wheel_complaints(places.built["wheel"], places.source) == []


def test_a_wheel_with_top_level_kernels_is_caught(tmp_path):
    source = copy_of_the_tree(tmp_path / "source")
    setup = (source / "setup.py").read_text()
    assert setup.count("packages=[") == 1
    (source / "setup.py").write_text(setup.replace("packages=[", 'packages=["kernels", '))
    found = wheel_complaints(build(source, "wheel")["wheel"], source)
    assert "kernels/project.py is outside kernel_surgery/" in found


def test_the_source_distribution_holds_kernels_once_and_builds_the_same_wheel(places, tmp_path):
    with tarfile.open(places.built["sdist"]) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        assert names.count("kernels/project.py") == 1
        assert not [name for name in names if name.startswith("kernel_surgery/kernels")]
        assert {"LICENSE", "constraints.txt", "tests/test_packaging.py", ".ci/run"} <= set(names)
        assert {"tests/labelled.jsonl", "docs/retest.toml", "docs/site.css", "zensical.toml"} <= set(names)
    unpacked = unpack(places.built["sdist"], tmp_path)
    again = zipfile.ZipFile(build(unpacked, "wheel")["wheel"]).namelist()
    assert sorted(again) == sorted(zipfile.ZipFile(places.built["wheel"]).namelist())


# -- what is required, and the versions it was tested with


def wheel_metadata(places) -> tuple[dict[str, str], list[Requirement]]:
    archive = zipfile.ZipFile(places.built["wheel"])
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    fields = [line.split(": ", 1) for line in lines if re.match(r"[A-Z][\w-]*: ", line)]
    return dict(fields), [Requirement(value) for key, value in fields if key == "Requires-Dist"]


def constraints() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_the_requirements_admit_what_was_tested_and_the_oldest_that_is_promised(places):
    fields, requirements = wheel_metadata(places)
    assert fields["Name"] == "kernel-surgery" and fields["Version"] == kernel_surgery.__version__
    assert fields["Requires-Python"] == ">=3.11"
    needed = {canonicalize_name(r.name): r for r in requirements if not r.marker or "extra" not in str(r.marker)}
    for name, oldest in {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}.items():
        assert needed[name].specifier.contains(oldest), f"{needed[name]} refuses {oldest}"
    assert not needed["transformers"].specifier.contains("5.10.1")
    # The CPU build of torch does not bring it, and it exists for Linux alone.
    assert str(needed["triton"].marker) == 'sys_platform == "linux"'
    pins = constraints()
    for requirement in requirements:
        if not requirement.marker or requirement.marker.evaluate({"extra": "test"}):
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"constraints.txt pins {pin}, setup.py asks {requirement}"


def test_constraints_pin_everything_that_an_installation_brings(places):
    pins, seen = constraints(), set()
    tested = {name for name, version in pins.items() if _installed_version(name) == version}
    waiting = [(requirement, "test") for requirement in wheel_metadata(places)[1]]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name in seen or name.startswith(("nvidia-", "cuda-")):
            continue  # the CUDA builds of torch bring the libraries of their own release
        seen.add(name)
        if name in tested:  # what another release brings is not what is pinned here
            below = importlib.metadata.requires(name) or []
            waiting += [(Requirement(line), e) for line in below for e in (requirement.extras or {""})]
    print(f"{len(tested)} of {len(pins)} pinned versions are installed here")
    assert sorted(seen - set(pins)) == []
    if seen <= tested:
        assert sorted(set(pins) - seen) == [], "constraints.txt pins what nothing needs"


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None
