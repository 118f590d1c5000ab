"""Build and check a release: python -m tests.release (make release)

It is built from the last commit: the source distribution from the commit's files, the wheel from the source
distribution. tests/test_distribution.py installs and runs these very files. Then they are put into dist/, and the
version's part of CHANGELOG.md is printed, as the notes of the release. Nothing is published.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from kernel_surgery.common.names import VERSION
from tests.support.distribution import ROOT, TO_RELEASE, Distributions

DIST = ROOT / "dist"


def changes(changelog: str, version: str) -> tuple[str, str] | None:
    """(date, notes) of a version; None if the changelog has no entry for it."""
    entries = re.split(r"^## (\S+), (.+)\n", changelog, flags=re.M)[1:]
    found = {name: (date, notes.strip()) for name, date, notes in zip(*[iter(entries)] * 3, strict=True)}
    return found.get(version)


def refusals(status: str, changelog: str, version: str, there: list[str]) -> list[str]:
    """Why there can be no release now. status: of git, in short form. there: the names of files in dist/."""
    said, entry = [], changes(changelog, version)
    if changed := [line[3:] for line in status.splitlines()]:
        said.append(f"the working tree has changes: {', '.join(changed)}. Commit or remove them.")
    if entry is None:
        said.append(f"CHANGELOG.md has no entry for {version}. Write one.")
    elif not re.fullmatch(r"\d{4}-\d\d-\d\d", entry[0]):
        said.append(f"CHANGELOG.md dates {version} {entry[0]!r}. Write the day, such as 2027-01-31.")
    if mine := [name for name in there if f"-{version}" in name]:
        said.append(f"dist/ holds {', '.join(mine)} already. Remove it, or choose another version.")
    return said


def git(*words: str) -> bytes:
    return subprocess.check_output(["git", "-C", str(ROOT), *words])


def main() -> int:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    there = [path.name for path in DIST.glob("*")]
    if said := refusals(git("status", "--porcelain").decode(), changelog, VERSION, there):
        print("\n".join(f"error: {line}" for line in said), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with tarfile.open(fileobj=BytesIO(git("archive", "--format=tar", "HEAD"))) as archive:
            archive.extractall(folder / "tree", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        made = Distributions.of(folder / "tree", folder)
        (folder / "dist").mkdir()
        for file in (made.sdist, made.wheel):
            shutil.copy2(file, folder / "dist")
        tests = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "", "tests/test_distribution.py"]
        if subprocess.call(tests, cwd=ROOT, env=os.environ | {TO_RELEASE: str(folder / "dist")}):
            print("error: the release does not pass its tests. Nothing was put into dist/.", file=sys.stderr)
            return 1
        DIST.mkdir(exist_ok=True)
        for file in sorted((folder / "dist").iterdir()):
            shutil.move(file, DIST / file.name)
            print(f"dist/{file.name}")
    date, notes = changes(changelog, VERSION) or ("", "")
    print(f"\nNotes of {VERSION}, {date}:\n\n{notes}\n")
    print(f"Next: git tag -a v{VERSION} -m {VERSION}, push the tag, and upload dist/ with twine.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
