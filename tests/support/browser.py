"""A page as Chromium lays it out, where there is one."""

import re
import shutil
import subprocess


def found() -> str | None:
    """Chromium's command, or None. Which it is, is printed."""
    browser = next(
        (there for name in ("chromium", "chromium-browser", "google-chrome") if (there := shutil.which(name))), None
    )
    print(f"browser: {browser}")
    return browser


# Elements whose content is wider than they are, or that reach beyond the page. A folded part is unfolded first.
MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *:not(svg *)")].filter(e => e.scrollWidth > e.clientWidth + 1
    && getComputedStyle(e).display !== "inline" || e.getBoundingClientRect().right > innerWidth);
  document.title = `${wide.length} too wide of ${innerWidth} px: ` + wide.map(e => e.outerHTML.slice(0, 80)).join("; ");
})</script>"""


def too_wide(browser, path, text, width):
    """How many elements of a page do not fit a window of this width, as the browser measures it, and which."""
    unfolded = re.sub("<meta http-equiv[^>]*>", "", text).replace("<details>", "<details open>")
    unfolded = unfolded.replace("</head>", MEASURE + "</head>")
    path.write_text(unfolded, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    options.append(f"--user-data-dir={path.parent / 'user'}")
    # A window cannot be narrower than 500 pixels, so a frame of the width holds the page.
    frame = f"<title></title><iframe src={path.name} style='width:{width}px;height:900px;border:0' onload='"
    frame += "document.title=this.contentDocument.title'></iframe>"
    (path.parent / "frame.html").write_text(frame)
    words = ["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [browser, *options, *words, (path.parent / "frame.html").as_uri()], capture_output=True, text=True, timeout=150
    )
    found = re.search(r"<title>(\d+) too wide of (\d+) px:(.*?)</title>", done.stdout, flags=re.DOTALL)
    assert found and int(found[2]) == width, done.stdout[:500]
    return int(found[1]), found[3]


def check_width(path, text, width, pictures):
    """Fail unless a page has so many pictures, each at most a phone's width, and fits a window of this width."""
    widths = [float(points) * 96 / 72 for points in re.findall(r'<svg[^>]*? width="([\d.]+)pt"', text)]
    assert len(widths) == pictures and max(widths) <= 390 - 2 * 16, "a picture would be scaled down"
    if (browser := found()) is not None:
        count, which = too_wide(browser, path, text, width)
        assert count == 0, which
