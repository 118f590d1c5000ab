"""The reference of the public names, in Markdown, from the source: signatures as they are written, and docstrings.

Nothing is imported. `bench.pages` writes the result to docs/api.md, so the page reads the same on a code host.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In the order of a user's steps. {heading: names of kernel_surgery}.
SECTIONS = {
    "Load": ("load_model", "load_tokenizer", "POLYGLOT_SUBSPACE", "__version__"),
    "Measure and fit": ("collect_activations", "collect_moments", "fit_subspace", "Subspace"),
    "Edit a model in memory": ("hooked", "fused", "baked", "adapted", "project"),
    "Edit a checkpoint on disk": ("bake_checkpoint", "write_adapter"),
    "Check and compare": ("certify_model", "verify_checkpoint", "evaluate", "measure_damage", "compare_texts"),
    "Errors": ("KernelSurgeryError",),
}
# The decorators that change how a name is used.
SHOWN = ("classmethod", "contextmanager", "dataclass", "property", "staticmethod")
# `name: what it is` at the start of a line of a docstring.
ARGUMENT = re.compile(r"([A-Za-z_]\w*(?:, [A-Za-z_]\w*)*): (?=\S)")
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign


def homes() -> dict[str, str]:
    """{public name: its module}, as kernel_surgery/__init__.py has it."""
    tree = ast.parse((ROOT / "kernel_surgery" / "__init__.py").read_text(encoding="utf-8"))
    (table,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_HOME")
    return {**ast.literal_eval(table), "__version__": "common.names"}


def definition(name: str, module: str) -> tuple[Definition, str, str]:
    """Where a name is defined: its syntax, the text of the file, and the file's path in the project."""
    file = ROOT / "kernel_surgery" / f"{module.replace('.', '/')}.py"
    text = file.read_text(encoding="utf-8")
    word = "VERSION" if name == "__version__" else name
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == word:
            return node, text, file.relative_to(ROOT).as_posix()
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == word:
            return node, text, file.relative_to(ROOT).as_posix()
    raise ValueError(f"{file.relative_to(ROOT)} does not define {word}")


def docstring(node: Definition, text: str) -> str:
    """The docstring; of a constant, the comment above it."""
    if not isinstance(node, ast.Assign):
        return ast.get_docstring(node) or ""
    above = []
    for line in reversed(text.splitlines()[: node.lineno - 1]):
        if not line.startswith("#"):
            break
        above.insert(0, line.removeprefix("#").strip())
    return " ".join(above)


def parameters(node: ast.FunctionDef, text: str) -> list[str]:
    """The parameters as they are written."""
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [*[None] * (len(plain) - len(a.defaults)), *a.defaults]
    found = [one(*pair, text) for pair in zip(plain, defaults, strict=True)]
    if a.vararg:
        found.append("*" + one(a.vararg, None, text))
    elif a.kwonlyargs:
        found.append("*")
    found += [one(*pair, text) for pair in zip(a.kwonlyargs, a.kw_defaults, strict=True)]
    return found + (["**" + one(a.kwarg, None, text)] if a.kwarg else [])


def written(node: ast.AST, text: str) -> str:
    """The source of an expression; a type that is imported late has no quotes."""
    return " ".join((ast.get_source_segment(text, node) or "").strip('"').split())


def one(arg: ast.arg, default: ast.expr | None, text: str) -> str:
    """One parameter with its type and default."""
    kind = f": {written(arg.annotation, text)}" if arg.annotation else ""
    return arg.arg + kind + (f" = {ast.get_source_segment(text, default)}" if default else "")


def signature(node: Definition, name: str, text: str) -> str:
    """The head of a definition, as code. A class has its fields."""
    if isinstance(node, ast.Assign):
        return f"{name} = {ast.get_source_segment(text, node.value)}"
    marks = [written(mark, text) for mark in node.decorator_list]
    above = "".join(f"@{mark}\n" for mark in marks if mark.startswith(SHOWN))
    if isinstance(node, ast.ClassDef):
        bases = f"({', '.join(written(base, text) for base in node.bases)})" if node.bases else ""
        fields = [f"    {written(part, text)}" for part in node.body if isinstance(part, ast.AnnAssign)]
        return above + "\n".join([f"class {node.name}{bases}" + (":" if fields else ""), *fields])
    words, returns = parameters(node, text), f" -> {written(node.returns, text)}" if node.returns else ""
    line = f"def {node.name}({', '.join(words)}){returns}"
    if len(line) > 88:
        line = f"def {node.name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"
    return above + line


def prose(text: str, names: set[str], public: dict[str, str]) -> str:
    """A docstring as Markdown: `name: ...` becomes a list, and the public names that it mentions are links.

    names: the parameters or fields that it can describe.
    """
    blocks = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines: list[list[str]] = []  # what stands before the text, and the text
        # Two on a line are two.
        words = "|".join(map(re.escape, sorted(names)))
        for line in re.sub(rf"(?<=\.) (?=(?:{words}): )", "\n", paragraph).splitlines():
            found = ARGUMENT.match(line)
            if found and {*found[1].split(", ")} <= names:
                lines.append([f"- **{found[1]}**: ", line[found.end() :]])
            elif line.startswith('    "'):
                lines.append(["    - " if any(begin.startswith("- **") for begin, _ in lines) else "- ", line.strip()])
            elif lines:
                lines[-1][1] += " " + line.strip()
            else:
                lines.append(["", line.strip()])
        for begin, said in lines:
            # Python-Markdown wants an empty line before a list.
            between = "\n" if begin and blocks and blocks[-1].lstrip().startswith("- ") else "\n\n"
            blocks.append(between + begin + marked(said, public))
    return "".join(blocks).strip()


def marked(text: str, public: dict[str, str]) -> str:
    """A text with what Markdown would read as a mark escaped outside code, and with links to the public names."""

    def code(found: re.Match[str]) -> str:
        path, _, name = found[1].rpartition(".")
        return f"[`{name}`](#{name.lower()})" if name in public and path in ("", public[name]) else found[0]

    parts = re.split(r"(`[^`]+`)", text)
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return re.sub(r"(?<!\[)`([\w.]+)`", code, "".join(parts))


def members(node: ast.ClassDef) -> Iterator[ast.FunctionDef]:
    """The public methods and properties of a class."""
    return (part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"))


def entry(name: str, public: dict[str, str]) -> str:
    """One public name: heading, where it is defined, signature, docstring; of a class its members too."""
    node, text, path = definition(name, public[name])
    others = {key: value for key, value in public.items() if key != name}
    parts = [("###", name, node, docstring(node, text))]
    if isinstance(node, ast.ClassDef):
        parts += [("####", f"{name}.{part.name}", part, ast.get_docstring(part) or "") for part in members(node)]
    made = ""
    for mark, shown, part, said in parts:
        head = signature(part, name, text)
        said = prose(said, {*re.findall(r"\w+", head)}, others)
        made += f"{mark} `{shown}`\n\n```python\n{head}\n```\n\n{said}\n\n"
    return made + f"Source: [{path}](../{path})\n"


def errors() -> str:
    """The classes below KernelSurgeryError, as a table."""
    tree = ast.parse((ROOT / "kernel_surgery" / "common" / "errors.py").read_text(encoding="utf-8"))
    rows = ["| class | is also | when |", "|---|---|---|"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name != "KernelSurgeryError":
            said = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            rows.append(f"| `{node.name}` | {', '.join(f'`{ast.unparse(base)}`' for base in node.bases)} | {said} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """The reference: every public name, in sections."""
    public = homes()
    parts = []
    for heading, names in SECTIONS.items():
        parts.append(f"## {heading}\n\n" + "\n".join(entry(name, public) for name in names))
    return "\n" + "\n".join(parts) + "\nThe classes below it, in `kernel_surgery.common.errors`:\n\n" + errors()
