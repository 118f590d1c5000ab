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

# A module imports only from those before it. Where a new one goes is a decision: write it here.
# fmt: off
ORDER = (
    "cli", "wordings", "problems", "sites", "subspace", "reference", "ops", "edit", "decoder", "collect", "fit",
    "hook", "bake", "fuse", "aot", "stream", "provenance", "checkpoint", "lora", "modes", "layerwise", "checks",
    "certify", "plots", "certificate", "verify", "plain", "scoring", "language", "statistics", "generate", "results",
    "runs", "neutral", "damage", "controls", "report", "eval", "score", "study", "reproduce", "polyglot",
)
# fmt: on
# Against the order, and only inside a function, when it is called: `parse_languages` asks problems which languages
# there are, and the command `bake` hands the streaming of files to checkpoint, which edits with bake's `bake_weight`.
LATE = {("cli", "problems"), ("bake", "checkpoint")}


def imported(source: str, package: str) -> Iterator[tuple[str, bool]]:
    """Everything imported in `source`, a module of `package`: (absolute dotted name, whether inside a function)."""

    def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", late) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((arg.value, late) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, late)

    return walk(ast.parse(source), False)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted([*root.glob("kernel_surgery/**/*.py"), *root.glob("kernels/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[:2] == ("kernel_surgery", "kernels"):
            continue  # the link: the same files again
        in_kernels = parts[0] == "kernels"
        package = "kernel_surgery.kernels" if in_kernels else ".".join(parts[:-1])
        module = "kernels" if in_kernels else parts[1]
        where = "/".join(parts) + ".py"
        for name, late in imported(path.read_text(encoding="utf-8"), package):
            top, _, rest = name.partition(".")
            if top == "kernels":
                found.append(f"{where}: imports {name}, the PyPI package; ours is kernel_surgery.kernels")
            if top != "kernel_surgery" or not rest:
                continue
            target = rest.split(".")[0]
            if in_kernels:
                if target != "kernels":
                    found.append(f"{where}: kernels/ imports nothing of ours, but {name}")
            elif module != "__init__":
                found.extend(f"{where}: {problem}" for problem in _direction(module, target, late))
    for path in sorted([*root.glob("bench/**/*.py"), *root.glob("tests/**/*.py")]):
        names = imported(path.read_text(encoding="utf-8"), "")
        if any(name.partition(".")[0] == "kernels" for name, _ in names):
            found.append(f"{path.relative_to(root)}: imports kernels; ours is kernel_surgery.kernels")
    return found


def _direction(module: str, target: str, late: bool) -> Iterator[str]:
    if target in ("kernels", "__version__"):
        return
    target = kernel_surgery._HOME.get(target, target)  # `from kernel_surgery import fused` imports fuse
    unknown = [name for name in (module, target) if name not in ORDER]
    if unknown:
        yield f"{unknown[0]} has no place in the order of tests/test_imports.py"
    elif ORDER.index(target) > ORDER.index(module) and not (late and (module, target) in LATE):
        yield f"{module} imports {target}, which comes after it"


def test_imports_run_one_way():
    found = violations(ROOT)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("kernel_surgery/sites.py", "from kernel_surgery.eval import run", "sites imports eval, which comes"),
        ("kernel_surgery/sites.py", "from kernel_surgery import fuse", "sites imports fuse, which comes"),
        ("kernel_surgery/sites.py", "from .eval import run", "sites imports eval, which comes after"),
        ("kernel_surgery/sites.py", "def f():\n    import kernel_surgery.eval", "sites imports eval"),
        ("kernel_surgery/sites.py", "from kernel_surgery import Subspace", "sites imports subspace"),
        ("kernel_surgery/cli.py", "from kernel_surgery.problems import problems", "cli imports problems"),
        ("kernel_surgery/sites.py", "from kernels.project import f", "the PyPI package; ours is"),
        ("kernel_surgery/cli.py", "from kernel_surgery.ops import project", "cli imports ops, which comes"),
        ("kernel_surgery/novelty.py", "from kernel_surgery import ops", "novelty has no place in the order"),
        ("kernels/project.py", "from kernel_surgery.ops import f", "kernels/ imports nothing of ours"),
        ("kernels/project.py", "from ..ops import project", "kernels/ imports nothing of ours"),
        ("bench/op.py", "import importlib as i\ni.import_module('kernels.project')", "bench/op.py: imports"),
        ("tests/test_op.py", "import kernels", "tests/test_op.py: imports kernels"),
    ],
)
def test_a_planted_violation_is_seen(tmp_path, path, line, message):
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) == 1 and message in found[0], found


def test_what_is_allowed_is_not_called_a_violation(tmp_path):
    (tmp_path / "kernel_surgery").mkdir()
    (tmp_path / "kernel_surgery" / "fuse.py").write_text(
        "import torch\nfrom kernel_surgery import Subspace, cli\nfrom kernel_surgery.kernels.project import f\n"
    )
    (tmp_path / "kernel_surgery" / "cli.py").write_text("def f():\n    import kernel_surgery.problems\n")
    assert violations(tmp_path) == []


def test_importing_the_package_or_its_command_line_imports_no_torch():
    code = (
        "import sys, kernel_surgery, kernel_surgery.cli\n"
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
    with pytest.raises(AttributeError, match="module 'kernel_surgery' has no attribute 'hocked'"):
        _ = kernel_surgery.hocked


TEXT = {".py", ".md", ".toml", ".txt", ".json", ".jsonl", ".html", ".svg", ".in", ".cfg", ".yml", ""}
# Written in two pieces, so that this file does not hold what it looks for.
PRIVATE = [b"/" + folder + b"/" for folder in (b"work", b"tmp", b"root", b"home")]


def private_paths(root: Path) -> list[str]:
    """Files of the project that mention a folder of the machine they were written on."""
    folders = ("kernels", "kernel_surgery", "bench", "tests", "docs", ".ci")
    files = [
        *(path for path in root.iterdir() if path.is_file()),
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
    assert private_paths(tmp_path) == [f"bench/results/op.json mentions {word}"]
