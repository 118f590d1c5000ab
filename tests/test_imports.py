"""Imports run one way, `kernels` is never imported by its top-level name, no file says where it was written.

Read from the syntax trees, so imports inside functions and under TYPE_CHECKING count as well.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernel_surgery

ROOT = Path(__file__).resolve().parent.parent

# A room imports from itself and from the rooms before it. The commands, which lie at the top, import from all rooms.
ROOMS = (
    *("common", "numerics", "problems", "scoring", "files", "quantised", "models", "subspace", "ops", "edit", "damage"),
    *("checkpoint", "engines", "certify", "evaluation", "studies", "lmeval", "polyglot"),
)
COMMANDS = (
    *("collect", "fit", "bake", "lora", "verify", "eval", "compare", "score", "study", "reproduce", "aot"),
    *("dequantize", "probe"),
)
LINES = 400  # of a file; those that may be longer, and why:
LONGER = {
    "kernels/project.py": "the kernels, their launch table and the form they share are read together",
}
FUNCTION_LINES = 80


def imported(source: str, package: str) -> Iterator[str]:
    """The absolute dotted name of everything imported in `source`, a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def modules(root: Path) -> Iterator[tuple[str, str, str]]:
    """(path, dotted package, text) of every module of ours under `root`; not the link to kernels/, which are seen as
    kernels/ itself."""
    for path in sorted([*root.glob("kernel_surgery/**/*.py"), *root.glob("kernels/**/*.py")]):
        parts = path.relative_to(root).parts
        if parts[:2] != ("kernel_surgery", "kernels"):
            package = "kernel_surgery.kernels" if parts[0] == "kernels" else ".".join(parts[:-1])
            yield "/".join(parts), package, path.read_text(encoding="utf-8")


def violations(root: Path) -> list[str]:
    """Imports against the direction, one line each."""
    found = []
    for where, package, text in modules(root):
        parts = where.removesuffix(".py").split("/")
        for name in imported(text, package):
            top, _, rest = name.partition(".")
            if top == "kernels":
                found.append(f"{where}: imports {name}, the PyPI package; ours is kernel_surgery.kernels")
            if top == "kernel_surgery" and rest:
                found.extend(f"{where}: {problem}" for problem in _direction(parts, rest.split(".")[0], name))
    for path in sorted([*root.glob("bench/**/*.py"), *root.glob("tests/**/*.py")]):
        if any(name.partition(".")[0] == "kernels" for name in imported(path.read_text(encoding="utf-8"), "")):
            found.append(f"{path.relative_to(root)}: imports kernels; ours is kernel_surgery.kernels")
    return found


def _direction(parts: list[str], target: str, name: str) -> Iterator[str]:
    """What is wrong with `target`, the part after "kernel_surgery." of `name`, imported by the module at `parts`."""
    if parts[0] == "kernels":
        if target != "kernels":
            yield f"kernels/ imports nothing of ours, but {name}"
    elif len(parts) == 2:  # at the top: a command, __init__ or __main__
        if parts[1] not in (*COMMANDS, "__init__", "__main__"):
            yield f"{parts[1]} is no command; what is not lies in a room"
        elif target in COMMANDS:
            yield f"a command imports rooms, not the command {target}"
    elif parts[1] not in ROOMS:
        yield f"{parts[1]} has no place in the order of tests/test_imports.py"
    elif target in (*COMMANDS, *kernel_surgery.__all__):
        yield f"{parts[1]} imports {target}, which lies at the top"
    elif target in ROOMS and ROOMS.index(target) > ROOMS.index(parts[1]):
        yield f"{parts[1]} imports {target}, which comes after it"


def test_imports_run_one_way():
    found = violations(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("kernel_surgery/models/a.py", "from kernel_surgery.eval import run", "models imports eval, which lies"),
        ("kernel_surgery/models/a.py", "from kernel_surgery.edit import fused", "models imports edit, which comes"),
        ("kernel_surgery/models/a.py", "from ..edit.fused import fused", "models imports edit, which comes after"),
        ("kernel_surgery/models/a.py", "def f():\n    import kernel_surgery.edit", "models imports edit"),
        ("kernel_surgery/models/a.py", "from kernel_surgery import Subspace", "models imports Subspace, which lies"),
        ("kernel_surgery/common/a.py", "from kernel_surgery.problems import generator", "common imports problems"),
        ("kernel_surgery/models/a.py", "from kernels.project import f", "the PyPI package; ours is"),
        ("kernel_surgery/novelty/a.py", "from kernel_surgery import ops", "novelty has no place in the order"),
        ("kernel_surgery/novelty.py", "from kernel_surgery import ops", "novelty is no command"),
        ("kernel_surgery/fit.py", "from kernel_surgery.collect import run", "imports rooms, not the command collect"),
        ("kernels/project.py", "from kernel_surgery.ops import f", "kernels/ imports nothing of ours"),
        ("kernels/project.py", "from ..ops import project", "kernels/ imports nothing of ours"),
        ("bench/op.py", "import importlib as i\ni.import_module('kernels.project')", "bench/op.py: imports"),
        ("tests/test_op.py", "import kernels", "tests/test_op.py: imports kernels"),
    ],
)
def test_a_planted_violation_is_seen(tmp_path, path, line, message):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and message in found[0], found


def test_what_is_allowed_is_not_called_a_violation(tmp_path):
    (tmp_path / "kernel_surgery" / "edit").mkdir(parents=True)
    (tmp_path / "kernel_surgery" / "edit" / "fused.py").write_text(
        "import torch\nfrom kernel_surgery import ops\nfrom kernel_surgery.kernels.project import f\n"
        "from kernel_surgery.edit.plan import Edit\nfrom kernel_surgery.common import errors\n"
    )
    (tmp_path / "kernel_surgery" / "fit.py").write_text("def f():\n    import kernel_surgery.evaluation.run\n")
    assert violations(tmp_path) == []


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other in a circle, wherever the import stands."""
    sources = {
        where.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): (package, text)
        for where, package, text in modules(root)
    }
    needs: dict[str, set[str]] = {}
    for module, (package, text) in sources.items():
        names = {n for n in imported(text, package) if n.startswith("kernel_surgery.")}
        needs[module] = {n if n in sources else n.rpartition(".")[0] for n in names} & set(sources) - {module}
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(needs[module]):
                walk(other, [*path, module])
            done.add(module)

    for module in sorted(needs):
        walk(module, [])
    return found


def test_no_modules_import_each_other_in_a_circle(tmp_path):
    assert circles(ROOT) == []
    (tmp_path / "kernel_surgery" / "edit").mkdir(parents=True)
    (tmp_path / "kernel_surgery" / "edit" / "a.py").write_text("from kernel_surgery.edit.b import x\n")
    (tmp_path / "kernel_surgery" / "edit" / "b.py").write_text("def f():\n    from kernel_surgery.edit import a\n")
    assert circles(tmp_path) == [["kernel_surgery.edit.a", "kernel_surgery.edit.b", "kernel_surgery.edit.a"]]


def too_long(root: Path) -> list[str]:
    """Files and functions over their number of lines, one line each."""
    found = []
    for path in sorted(file for top in ("kernel_surgery", "kernels", "bench") for file in (root / top).rglob("*.py")):
        where, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if where.startswith("kernel_surgery/kernels/"):
            continue
        if len(text.splitlines()) > LINES and where not in LONGER:
            found.append(f"{where}: {len(text.splitlines())} lines, at most {LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                found.append(f"{where}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return found


def test_no_file_and_no_function_is_too_long(tmp_path):
    assert too_long(ROOT) == []
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("def f():\n" + "    x = 1\n" * 80 + "y = 1\n" * 320)
    assert too_long(tmp_path) == [
        "bench/a.py: 401 lines, at most 400",
        "bench/a.py: f has 81 lines, at most 80",
    ]


def test_the_top_holds_commands_alone():
    top = {path.stem for path in (ROOT / "kernel_surgery").glob("*.py")}
    assert top == {*COMMANDS, "__init__", "__main__"} and len(top) <= 15
    folders = {path.parent.name for path in (ROOT / "kernel_surgery").glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_importing_the_package_or_its_commands_imports_no_torch():
    commands = ", ".join(f"kernel_surgery.{name}" for name in (*COMMANDS, "__main__"))
    code = (
        f"import sys, kernel_surgery, {commands}\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(kernel_surgery.__all__) <= set(dir(kernel_surgery))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_what_its_module_defines():
    for name, home in kernel_surgery._HOME.items():
        module = importlib.import_module(f"kernel_surgery.{home}")
        assert getattr(kernel_surgery, name) is getattr(module, name)
    assert {"__version__", *kernel_surgery._HOME} == set(kernel_surgery.__all__)
    with pytest.raises(AttributeError, match="module 'kernel_surgery' has no attribute 'hocked'"):
        _ = kernel_surgery.hocked


TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".html", ".svg", ".in", ".cfg", ".yml", ".ipynb", ""}
# Written in two pieces, so that this file does not hold what it looks for.
PRIVATE = [b"/" + folder + b"/" for folder in (b"work", b"tmp", b"root", b"home")]


LEFT_BY_RUNS = {".json", ".jsonl", ".svg", ".html"}


def private_paths(root: Path) -> list[str]:
    """Files of the project that mention a folder of the machine they were written on."""
    folders = ("kernels", "kernel_surgery", "bench", "tests", "docs", "examples", ".ci")
    files = [
        # Records and pages at the top are what a run left there; git ignores them.
        *(path for path in root.iterdir() if path.is_file() and path.suffix not in LEFT_BY_RUNS),
        *(path for folder in folders for path in (root / folder).rglob("*")),
    ]
    found = []
    for path in sorted(files):
        relative = path.relative_to(root)
        if path.suffix not in TEXT or not path.is_file() or "__pycache__" in relative.parts:
            continue
        found.extend(f"{relative} mentions {word.decode()}" for word in PRIVATE if word in path.read_bytes())
    return found


def test_no_file_mentions_where_it_was_written():
    assert private_paths(ROOT) == []


@pytest.mark.parametrize("word", [word.decode() for word in PRIVATE])
def test_a_planted_path_is_seen(tmp_path, word):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "op.json").write_text(f'{{"file": "{word}x/y.py"}}')
    (tmp_path / "certificate.json").write_text(f'{{"of": "{word}x"}}')
    assert private_paths(tmp_path) == [f"bench/results/op.json mentions {word}"]


def test_git_ignores_what_runs_leave_at_the_top():
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"/*{suffix}" for suffix in LEFT_BY_RUNS} <= {*ignored}
