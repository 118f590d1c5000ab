"""Make the pictures of README.md: python -m bench.pictures

docs/pictures/report-light.png and report-dark.png are the first screen of the report of the evaluation that README.md
shows, as Chromium draws it. docs/pictures/places.svg is the edit in its four places.

    --check    write nothing; print a line for each picture that is not up to date, and return 1

A screenshot carries the SHA-256 of the page that it shows, so the check needs no browser.
"""

import argparse
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path

from bench.pages import ANSWERS, ROOT
from bench.parsing import bench_parser
from kernel_surgery.common.command import main
from kernel_surgery.common.errors import UserError
from kernel_surgery.common.files import write_atomic
from kernel_surgery.common.page import document
from kernel_surgery.common.plotting import standalone
from kernel_surgery.evaluation.report import first_screen, title

FOLDER = ROOT / "docs" / "pictures"
WIDTH, HEIGHT = 1180, 830  # of the screenshot, in CSS pixels; it has twice as many
SCHEMES = {"light": 1, "dark": 0}  # as Chromium counts them
PAGE = "page-sha256"


def report_page() -> str:
    """The first screen of the stored evaluation, as a page."""
    results = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return document(title(results), first_screen(results))


# One edit, in four places: (name, what is edited, in words).
PLACES = {
    "baked": ("W becomes W - a U(UᵀW)", "in the weights"),
    "fused": ("norm(r + y - a U(Uᵀy)), one kernel", "in one operator"),
    "lora": ("B A h, with B = -U, A = a UᵀW", "in an adapter beside W"),
    "hook": ("y - a U(Uᵀy), in PyTorch", "in a forward hook"),
}


def places() -> str:
    """The edit in its four places, as an SVG file: the end of an MLP, four times."""
    wide, high = 400, 145
    drawn = "".join(
        f'<g transform="translate({(i % 2) * wide + 10} {(i // 2) * high + 10})">{_place(mode)}</g>'
        for i, mode in enumerate(PLACES)
    )
    size = f'width="{2 * wide}" height="{2 * high}" viewBox="0 0 {2 * wide} {2 * high}"'
    label = "Four drawings of the end of an MLP: the edit in the weights, in an operator, in an adapter, in a hook"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{label}">'
    return standalone(f'{head}<g font-family="system-ui, sans-serif" font-size="15">{drawn}</g></svg>') + "\n"


def _place(mode: str) -> str:
    """One drawing: h -> W -> y -> + -> norm, with what `mode` edits in its colour."""
    formula, where = PLACES[mode]
    colour = f"var(--{mode})"

    def box(x: int, width: int, text: str, edited: bool) -> str:
        style = f"fill:{colour};stroke:{colour}" if edited else "fill:var(--card);stroke:var(--line)"
        ink = ' style="fill:var(--ground)"' if edited else ""
        middle = f'x="{x + width / 2}" y="75" text-anchor="middle"'
        shape = f'<rect x="{x}" y="52" width="{width}" height="36" rx="6" style="{style}"/>'
        return f"{shape}<text {middle}{ink}>{text}</text>"

    def line(x: int, to: int) -> str:
        return f'<line x1="{x}" x2="{to}" y1="70" y2="70" style="stroke:var(--quiet);stroke-width:1.5"/>'

    flow = f'<text x="0" y="75">h</text>{line(14, 40)}{box(40, 60, "W", mode == "baked")}{line(100, 150)}'
    if mode == "hook":
        flow += box(150, 60, "edit", True) + line(210, 232) + box(232, 36, "+", False) + line(268, 290)
        flow += box(290, 70, "norm", False)
    elif mode == "fused":
        flow += box(150, 210, "edit, + and norm", True)
    else:
        flow += line(150, 232) + box(232, 36, "+", False) + line(268, 290) + box(290, 70, "norm", False)
    if mode == "lora":
        way = "M 26 70 L 26 112 L 50 112 M 150 112 L 176 112 L 176 70"
        flow += f'<path d="{way}" style="fill:none;stroke:{colour};stroke-width:1.5"/>'
        flow += f'<rect x="50" y="96" width="44" height="30" rx="6" style="fill:{colour}"/>'
        flow += f'<rect x="106" y="96" width="44" height="30" rx="6" style="fill:{colour}"/>'
        flow += '<text x="72" y="116" text-anchor="middle" style="fill:var(--ground)">A</text>'
        flow += '<text x="128" y="116" text-anchor="middle" style="fill:var(--ground)">B</text>'
        flow += f'<line x1="94" x2="106" y1="112" y2="112" style="stroke:{colour};stroke-width:1.5"/>'
    head = f'<text x="0" y="18" font-weight="700" style="fill:{colour}">{mode}</text>'
    head += f'<text x="58" y="18" style="fill:var(--quiet)">{where}</text>'
    return head + flow + f'<text x="0" y="40" font-size="14">{formula}</text>'


def screenshot(page: str, scheme: str, file: Path) -> None:
    """Write what Chromium shows of a page, with the page's SHA-256 in the file. Raises UserError without Chromium."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from tests.support.browser import found

    if (browser := found()) is None:
        raise UserError("the screenshots need Chromium, which was not found. The other pictures were not changed.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page, encoding="utf-8")
        shot = Path(folder) / "shot.png"
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2"),
            *(f"--user-data-dir={folder}/user", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"),
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        ]
        address = (Path(folder) / "page.html").as_uri()
        subprocess.run([browser, *options, address], check=True, capture_output=True, timeout=120)
        about = PngInfo()
        about.add_text(PAGE, hashlib.sha256(page.encode()).hexdigest())
        with Image.open(shot) as picture:
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, pnginfo=about, optimize=True)


def outdated() -> list[str]:
    """The pictures that are not those of the stored results and of this code, one line each."""
    from PIL import Image

    digest, out = hashlib.sha256(report_page().encode()).hexdigest(), []
    for scheme in SCHEMES:
        file = FOLDER / f"report-{scheme}.png"
        if not file.is_file():
            out.append(f"{file.relative_to(ROOT)} is missing")
            continue
        with Image.open(file) as picture:
            if picture.info.get(PAGE) != digest:
                out.append(f"{file.relative_to(ROOT)} shows another page")
    drawing = FOLDER / "places.svg"
    if not drawing.is_file() or drawing.read_text(encoding="utf-8") != places():
        out.append(f"{drawing.relative_to(ROOT)} is not up to date")
    return out


def parser() -> argparse.ArgumentParser:
    """The command line parser."""
    p = bench_parser("pictures", __doc__)
    p.add_argument("--check", action="store_true", help="write nothing; return 1 if a picture is not up to date")
    return p


def run(argv: list[str] | None = None) -> int:
    """Make the pictures, or check them."""
    args = parser().parse_args(argv)
    if args.check:
        found = outdated()
        print("\n".join(found) or "all pictures are up to date")
        return int(bool(found))
    FOLDER.mkdir(parents=True, exist_ok=True)
    page = report_page()
    for scheme in SCHEMES:
        screenshot(page, scheme, FOLDER / f"report-{scheme}.png")
    write_atomic(FOLDER / "places.svg", places())
    print(f"{FOLDER.relative_to(ROOT)}: report-light.png, report-dark.png, places.svg")
    return 0


if __name__ == "__main__":
    main(run)
