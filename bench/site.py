"""Build the documentation as a site and check it: python -m bench.site

    --out DIR    the folder of the site (default: site/, which git ignores). It is replaced
    --serve      then serve it at http://localhost:8000 until Ctrl-C

zensical builds it, from docs/ and zensical.toml, and refuses a link to a page or an anchor that is not there. Pages
also link to files outside docs/, as a code host shows them: those are copied into the site first. The built pages are
then read once more. Each link must lead somewhere, each page must be in the navigation, and nothing may be fetched
from another place: the site works without a network.
"""

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bench.parsing import bench_parser
from kernel_surgery.common.command import Parser, main
from kernel_surgery.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
# A link's target in Markdown: [text](target), or [name]: target.
TARGET = re.compile(r"(\]\(|^\[[^\]]+\]:[ ]+)([^)\s#]+)", re.MULTILINE)
CODE = re.compile(r"^ *(```+).*?^ *\1 *$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
# Browsers show these; any other file gets the ending .txt, so that it is shown and not downloaded.
SHOWN = {".html", ".json", ".png", ".svg", ".txt"}
# The class of a formula that could not be read (bench/mathml.py).
UNREAD = "unread-formula"
# What a browser fetches by itself when it shows a page: {element: attributes}. A link that a reader follows is none.
SOURCES = ("audio", "embed", "iframe", "img", "input", "script", "source", "track", "video")
FETCHED = {
    **{name: {"src", "srcset"} for name in SOURCES},
    **{"link": {"href"}, "object": {"data"}, "image": {"href", "xlink:href"}, "use": {"href", "xlink:href"}},
}
STYLE_URL = re.compile(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""")

# ------------------------------------------------------------------------------------------------ building


def staged(root: Path, stage: Path) -> list[str]:
    """Copy the pages, and the files that they link to, into `stage`. Returns a sentence for each file that is missing.

    A link out of docs/ becomes one into docs/files/. Code is left as it is.
    """
    docs, missing = root / "docs", []
    shutil.copy(root / "zensical.toml", stage)
    for page in [*docs.rglob("*.md"), *docs.rglob("*.css")]:
        held, place = page.read_text(encoding="utf-8"), stage / page.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        code = [found.span() for found in CODE.finditer(held)]

        def moved(found: re.Match[str], page: Path = page, code: list[tuple[int, int]] = code) -> str:
            before, target = found[1], found[2]
            if urlsplit(target).scheme or any(start <= found.start() < end for start, end in code):
                return found[0]
            file = Path(os.path.normpath(page.parent / target))
            if file.is_relative_to(docs) and file.suffix == ".md":
                return found[0]  # zensical says where it is missing
            if not file.is_file() or not file.is_relative_to(root):
                missing.append(f"{page.relative_to(root)} links to {target}, which is not a file of the project")
                return found[0]
            inside = file.is_relative_to(docs)
            new = file.relative_to(root) if inside else Path("docs", "files", file.relative_to(root))
            new = new if new.suffix in SHOWN else new.with_name(new.name + ".txt")
            (stage / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, stage / new)
            return before + os.path.relpath(root / new, page.parent)

        place.write_text(TARGET.sub(moved, held) if page.suffix == ".md" else held, encoding="utf-8")
    return missing


def build(root: Path, out: Path) -> list[str]:
    """Build the site of the project in `root` in the new folder `out`. Returns what is wrong, in sentences.

    If zensical finds something, that is its whole report.
    """
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder).resolve()
        missing = staged(root, stage)
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        # The extension bench.mathml is ours.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
        done = subprocess.run(command, cwd=stage, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            said, _, trace = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr).partition("Traceback (most")
            return [*missing, said.strip(), *trace.strip().splitlines()[-1:]]
        shutil.copytree(stage / "site", out)
    return [*missing, *not_in_nav(root), *complaints(out)]


# ------------------------------------------------------------------------------------------------ checking


def entries(nav: object) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(part)


def not_in_nav(root: Path) -> list[str]:
    """Pages without an entry in the navigation, entries without a page, and pages with two."""
    named = list(entries(tomllib.loads((root / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]))
    there = {page.relative_to(root / "docs").as_posix() for page in (root / "docs").rglob("*.md")}
    return [
        *(f"docs/{name} is not in nav of zensical.toml" for name in sorted(there - {*named})),
        *(f"nav of zensical.toml names {name}, which is not in docs/" for name in sorted({*named} - there)),
        *(f"nav of zensical.toml names {name} twice" for name in sorted({n for n in named if named.count(n) > 1})),
    ]


class Page(HTMLParser):
    """What a page has and asks for: anchors, links that a reader follows, and what a browser fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {"", "top"}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.unread: list[str] = []
        self.in_style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.anchors |= {held[name] for name in ("id", "name") if held.get(name)}
        self.in_style = tag == "style"
        if held.get("class") == UNREAD:
            self.unread.append(held["title"])
        if tag in ("a", "area") and "href" in held:
            self.links.append(held["href"])
        for name in FETCHED.get(tag, set()) & held.keys():
            self.fetched += [part.split()[0] for part in held[name].split(",")] if name == "srcset" else [held[name]]
        self.fetched += style_urls(held.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.in_style:
            self.fetched += style_urls(data)

    def handle_endtag(self, tag: str) -> None:
        self.in_style = False


def style_urls(text: str) -> list[str]:
    """What a style sheet makes a browser fetch."""
    return [found[1] or found[2] for found in STYLE_URL.finditer(text)]


def complaints(site: Path) -> list[str]:
    """What is wrong in a built site, in sentences: links that lead nowhere, unread formulas, what would be fetched."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    styles = {file: style_urls(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.css"))}
    found = []

    def leads(file: Path, target: str) -> bool:
        parts = urlsplit(target)
        base = site if parts.path.startswith("/") else file.parent
        place = Path(os.path.normpath(base / unquote(parts.path).lstrip("/"))) if parts.path else file
        place = place / "index.html" if place.is_dir() else place
        anchors = pages[place].anchors if place in pages else {""}
        return place.is_file() and place.is_relative_to(site) and unquote(parts.fragment) in anchors

    for file, page in pages.items():
        name = file.relative_to(site)
        found += [f"{name}: {said}" for said in page.unread]
        local = [link for link in page.links if not urlsplit(link).scheme and not link.startswith("//")]
        found += [f"{name}: the link {link} leads nowhere" for link in local if not leads(file, link)]
    for file, targets in [*((file, page.fetched) for file, page in pages.items()), *styles.items()]:
        for target in targets:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                found.append(f"{file.relative_to(site)}: {target} would be fetched from elsewhere")
            elif not target.startswith(("data:", "#")) and not leads(file, target.partition("#")[0]):
                found.append(f"{file.relative_to(site)}: {target} is not there")
    return found


# ---------------------------------------------------------------------------------------------- the command


def parser() -> Parser:
    """The command line."""
    p = bench_parser("site", "Build the documentation as a site, and check it.")
    p.add_argument("--out", type=Path, default=ROOT / "site", help="the folder, which is replaced (default: site/)")
    p.add_argument("--serve", action="store_true", help="then serve it at http://localhost:8000")
    return p


def run(argv: list[str] | None = None) -> int:
    """Build and check. Returns 1 if something is wrong, and then leaves the earlier site as it was."""
    args = parser().parse_args(argv)
    if lacking := [name for name in ("zensical", "math_core") if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(lacking)} is not installed: pip install -c constraints.txt -e '.[docs]'.")
    if args.out.exists() and not (args.out / "sitemap.xml").is_file():
        raise UserError(f"{str(args.out)!r} exists and is not a site. Nothing was written.")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder).resolve() / "site"
        if found := build(ROOT, made):
            print("\n".join(found), file=sys.stderr)
            return 1
        shutil.rmtree(args.out, ignore_errors=True)
        shutil.copytree(made, args.out)
    print(f"{len(list(args.out.rglob('*.html')))} pages in {args.out}. Open {args.out / 'index.html'}")
    if args.serve:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=args.out)
        print("Serving at http://localhost:8000 until Ctrl-C")
        http.server.ThreadingHTTPServer(("localhost", 8000), handler).serve_forever()
    return 0


if __name__ == "__main__":
    main(run)
