"""What a kept project has beside its code: one version everywhere, a citation, a changelog, checks before a commit."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kernel_surgery.common.names import VERSION

ROOT = Path(__file__).resolve().parent.parent


def test_the_version_is_the_same_everywhere():
    assert f'version="{VERSION}"' in (ROOT / "setup.py").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    headings = re.findall(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings and headings[0] == VERSION and len(headings) == len(set(headings))


def test_the_citation_has_what_the_format_asks_for():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert citation["license"] == "Apache-2.0" and 'license_expression="Apache-2.0"' in (ROOT / "setup.py").read_text()


def test_every_link_of_the_changelog_leads_to_a_file():
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "CHANGELOG.md").read_text())
    assert targets and not [t for t in targets if not t.startswith("https://") and not (ROOT / t).is_file()]


def hooks():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"  # nothing is fetched
    return repo["hooks"]


@pytest.mark.parametrize("hook", hooks(), ids=lambda hook: hook["id"])
def test_every_hook_is_a_command_that_is_there(hook):
    words = shlex.split(hook["entry"])
    assert words[:2] == ["python", "-m"] and hook["language"] == "system"
    done = subprocess.run([sys.executable, *words[1:3], "--help"], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_an_issue_form_asks_for_something(file):
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert any(field.get("validations", {}).get("required") for field in form["body"])
    assert len({field["id"] for field in form["body"]}) == len(form["body"])
