"""Distributions built and installed as pip does, offline and in temporary folders.

The source distribution is built from a copy of the tree, and the wheel from the unpacked source distribution. pip
installs the wheel into an empty environment. As dependencies, that environment sees the packages of this one: a .pth
file names their folders. Python follows no other .pth file in them, so an editable installation here is not seen there.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = (".ci", ".github", "bench", "docs", "examples", "kernel_surgery", "kernels", "tests")
LEFT_BY_RUNS = {".json", ".jsonl", ".svg", ".html"}  # at the top, where git ignores them
TO_RELEASE = "KERNEL_SURGERY_TO_RELEASE"  # variable: the folder of the distributions that are tested instead
OF_A_DISTRIBUTION = {"PKG-INFO", "setup.cfg"}


def copy_of_the_tree(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.partial")
    for name in FOLDERS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.suffix not in LEFT_BY_RUNS and path.name not in OF_A_DISTRIBUTION:
            shutil.copy2(path, target)
    if (ROOT / "PKG-INFO").is_file() and not (target / "kernel_surgery" / "kernels").exists():
        # An unpacked source distribution, which cannot hold the link: a clone would have it.
        (target / "kernel_surgery" / "kernels").symlink_to("../kernels", target_is_directory=True)
    return target


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """What a command prints, without the caller's PYTHON variables. Fails with its output if it does."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, *kinds: str) -> dict[str, Path]:
    """Run setuptools' own build hooks in `source`, as pip does; gives the files made, by kind."""
    out = source.parent / f"{source.name}-built"
    out.mkdir(exist_ok=True)
    code = (
        "import json; from setuptools import build_meta as b\n"
        f"print(json.dumps({{kind: getattr(b, 'build_' + kind)({str(out)!r}) for kind in {kinds!r}}}))"
    )
    last = run([sys.executable, "-c", code], source).splitlines()[-1]
    return {kind: out / name for kind, name in json.loads(last).items()}


def unpack(sdist: Path, folder: Path) -> Path:
    """The folder of the unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        # Python 3.11 knows filters from 3.11.4 on.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (unpacked,) = folder.iterdir()
    return unpacked


@dataclass(frozen=True)
class Distributions:
    """sdist, wheel: the files. unpacked: the folder in which the wheel was built, from the sdist alone."""

    sdist: Path
    wheel: Path
    unpacked: Path

    @classmethod
    def of(cls, tree: Path, folder: Path) -> "Distributions":
        """Build both from a tree, in `folder`."""
        sdist = build(tree, "sdist")["sdist"]
        (folder / "unpacked").mkdir()
        unpacked = unpack(sdist, folder / "unpacked")
        return cls(sdist, build(unpacked, "wheel")["wheel"], unpacked)

    @classmethod
    def read(cls, built: Path, folder: Path) -> "Distributions":
        """Those in the folder `built`; the source distribution is unpacked in `folder`."""
        (sdist,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
        return cls(sdist, wheel, unpack(sdist, folder))


def installed(folder: Path, *what: str) -> Path:
    """The interpreter of a new environment in `folder`, with `what` installed by pip and no other project."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")) + "\n")
    options = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "--python", str(python), *options, *what], folder)
    return python
