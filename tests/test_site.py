"""The documentation as a site: it builds without a network, every link leads somewhere, and nothing is fetched."""

import functools
import importlib
from pathlib import Path

import pytest

from bench import site

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The site, and what is wrong with it."""
    out = tmp_path_factory.mktemp("built") / "site"
    return out, site.build(ROOT, out)


def project(root: Path, **pages: str) -> Path:
    """A small project with these pages, all in its navigation."""
    (root / "docs").mkdir(parents=True)
    nav = ", ".join(f'"{name}.md"' for name in pages)
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    head, tail = settings[: settings.index("nav = [")], settings[settings.index("\n]\n") + 3 :]
    (root / "zensical.toml").write_text(f"{head}nav = [{nav}]\n{tail}")
    (root / "docs" / "site.css").write_text("")
    for name, text in pages.items():
        (root / "docs" / f"{name}.md").write_text(text)
    return root


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched(built):
    out, found = built
    assert found == []
    for page in PAGES:
        assert (out / page).with_suffix(".html").is_file()


def test_the_plots_and_the_files_that_pages_link_to_are_in_the_site(built):
    out, _ = built
    assert (out / "files/bench/plots/counted.svg").read_bytes() == (ROOT / "bench/plots/counted.svg").read_bytes()
    assert (out / "files/kernel_surgery/models/table.py.txt").is_file()
    assert not list(out.rglob("*.md"))


@functools.cache
def written(text: str) -> str:
    """A text in the site's Markdown, as HTML."""
    markdown, extension = importlib.import_module("markdown"), importlib.import_module("bench.mathml")
    return markdown.markdown(text, extensions=["toc", "tables", extension.makeExtension()])


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("$x_1 + y_2$", "<math><msub><mi>x</mi><mn>1</mn></msub>"),
        (r"$$\begin{aligned} a &= b \\ c &= d \end{aligned}$$", '<div class="formula"><math display="block"><mtable'),
        ("`$x$`", "<code>$x$</code>"),
        ("$5 and $6", "<p>$5 and $6</p>"),
        (r"\$x\$", "<p>$x$</p>"),
        ("| a |\n|---|\n| $k$ |", "<td><math><mi>k</mi></math></td>"),
        ("## `fit`, exact: 2 - 1", 'id="fit-exact-2---1"'),
        ("## Größe", 'id="größe"'),
    ],
)
def test_dollars_are_mathematics_and_anchors_are_those_of_the_code_host(text, held):
    assert held in written(text)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What zensical says of a broken link and a broken anchor."""
    root = project(tmp_path_factory.mktemp("planted"), index="# One\n\n[a](two.md) [b](#nowhere) [c](../gone.py)\n")
    return root, site.build(root, root / "site")


def test_a_broken_link_and_a_broken_anchor_are_refused(planted):
    root, found = planted
    text = "\n".join(found)
    assert "page does not exist" in text and "[a](two.md)" in text
    assert "anchor does not exist" in text
    assert found[0] == "docs/index.md links to ../gone.py, which is not a file of the project"
    assert "Traceback" not in text and not (root / "site").exists()


def test_a_formula_an_image_from_elsewhere_and_a_page_outside_the_navigation_are_refused(tmp_path):
    text = "# One\n\n$\\nonsense$ $x$\n\n![a](https://example.org/a.png)\n\n[b](https://example.org)\n"
    root = project(tmp_path, index=text, two="# Two\n")
    settings = (root / "zensical.toml").read_text()
    (root / "zensical.toml").write_text(settings.replace('"two.md"', '"three.md"'))
    found = site.build(root, root / "site")
    assert {
        "docs/two.md is not in nav of zensical.toml",
        "nav of zensical.toml names three.md, which is not in docs/",
        "index.html: https://example.org/a.png would be fetched from elsewhere",
    } <= {*found}
    assert any(line.startswith("index.html: cannot read the formula '\\\\nonsense'") for line in found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('<a href="gone.html">x</a>', "index.html: the link gone.html leads nowhere"),
        ('<a href="#gone">x</a>', "index.html: the link #gone leads nowhere"),
        ('<a href="two.html#gone">x</a>', "index.html: the link two.html#gone leads nowhere"),
        ('<a href="../outside.html">x</a>', "index.html: the link ../outside.html leads nowhere"),
        ('<img src="gone.png">', "index.html: gone.png is not there"),
        ('<script src="//e.org/x.js"></script>', "index.html: //e.org/x.js would be fetched from elsewhere"),
        ('<img srcset="two.html 1x, //e.org/2 2x">', "index.html: //e.org/2 would be fetched from elsewhere"),
        ("<style>@import 'https://e.org/f';</style>", "index.html: https://e.org/f would be fetched from elsewhere"),
        ('<p style="background: url(https://e.org/b)">', "index.html: https://e.org/b would be fetched from elsewhere"),
        ('<use href="two.html#x"/><a href="two.html#x">y</a><a href="https://e.org">z</a><img src="data:,">', None),
    ],
)
def test_each_kind_of_fault_in_a_built_page_is_named(tmp_path, change, said):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "index.html").write_text(change)
    (folder / "two.html").write_text('<p id="x">')
    (tmp_path / "outside.html").write_text("")
    assert site.complaints(folder) == ([said] if said else [])


def test_a_style_sheet_that_fetches_is_named(tmp_path):
    (tmp_path / "a.css").write_text("@font-face { src: url('https://fonts.example/f') }")
    assert site.complaints(tmp_path) == ["a.css: https://fonts.example/f would be fetched from elsewhere"]


def test_a_folder_that_is_not_a_site_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(site.UserError, match=r"exists and is not a site\. Nothing was written\."):
        site.run(["--out", str(tmp_path)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
