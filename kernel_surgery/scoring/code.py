"""Source code in a text: which lines are code, fenced or not. Code is in no language, so `language` judges none of it.

A model that is asked in Chinese may answer with a few lines of Python, without a fence around them. Such a line is
found by its grammar, not by its words: Python by Python's own parser, and the C family (C, Java, JavaScript) by the
form of its statements. Markup (`<code>`, `<pre>`) and fences are removed with everything inside them.

Limits: a prompt of a shell, and a statement that is spread over several lines without a fence, are not recognised. A
formula such as `area = base * height` parses as Python and counts as code; it shows no language either way.
"""

import ast
import re
import warnings

# A longer line is prose, and the parser is slow and recursive.
MAX_LENGTH = 300
_BLOCK = re.compile(
    r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|<(code|pre)\b[^>]*>.*?</\1>|`[^`\n]*`", re.DOTALL | re.IGNORECASE
)
# What begins a block. `with` needs a call, and `class` a capital: "with care:" and "class notes:" parse too.
_PYTHON_HEADER = re.compile(
    r"(?:(?:async|if|elif|else|for|while|try|except|finally|def)\b|with\b.*\(|class [A-Z]).*:\s*(?:#.*)?$"
)
_PYTHON_HINT = re.compile(r"[\w\])]\s*(?:[-+*/%|&]|//|\*\*)?=|\w\(|^(?:import|from|return|assert|raise|yield|del)\b")
# An assignment, a call, a control statement, a declaration of a function, a preprocessor's line, a lone bracket.
_C_FAMILY = re.compile(
    r"""
      (?:(?:const|let|var|final|static|unsigned|int|long|float|double|bool|boolean|char|auto|string|String)\s+)*
        [\w.]+(?:\[[^\]]*\])?\s*[-+*/%]?=(?!=).*;
    | (?:int|long|float|double|bool|char|string|String|var|let)\s+\w+(?:\s*,\s*\w+)*;
    | [\w.:]+\(.*\);
    | (?:\}\s*else\s+)?(?:for|while|if|switch)\s*\(.*[<>=!;:].*\)\s*\{?
    | (?:\}\s*)?else\s*\{
    | (?:(?:public|private|protected|static|async|export|inline|function|fn|func
        |void|int|long|float|double|bool|char|string|String)\s+)+\w+\s*\(.*\).*\{
    | return\b.*;
    | \#include\s*[<"].*
    | using\s+namespace\s+\w+;
    | [{}]+;?
    """,
    re.VERBOSE,
)
_COMMENT = re.compile(r"(?:#|//)(?!#).*")
# A name, a number, an attribute: they stand in prose too.
_STATEMENTS = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.Assert, ast.Raise, ast.Delete)


def strip_code(text: str) -> str:
    """Return `text` without code. Each line of code becomes an empty line.

    A comment line counts as code if it is next to a line of code: alone, `# Solution` is a heading.
    """
    lines = _BLOCK.sub("\n", text).splitlines()
    code = [is_code(line) for line in lines]
    for i, line in enumerate(lines):
        if _COMMENT.fullmatch(line.strip()) and any(code[max(0, i - 1) : i + 2]):
            code[i] = True
    return "\n".join("" if found else line for line, found in zip(lines, code, strict=True))


def is_code(line: str) -> bool:
    """Return whether a line is a statement of Python or of the C family."""
    line = line.strip().removeprefix(">>>").strip()
    if not line or len(line) > MAX_LENGTH:
        return False
    return bool(_C_FAMILY.fullmatch(line)) or _is_python(line)


def _is_python(line: str) -> bool:
    header = bool(_PYTHON_HEADER.match(line))
    if not header and not _PYTHON_HINT.search(line):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a SyntaxWarning about the text, such as `5in x`
            statement = _parsed(line, header)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    if header:
        return True
    if isinstance(statement, ast.Expr):
        # A call is written without a space before its bracket. "Cost (apples)" is prose.
        value = statement.value.value if isinstance(statement.value, ast.Await) else statement.value
        return isinstance(value, ast.Call) and not re.match(r"\w+\s+\(", line)
    return isinstance(statement, _STATEMENTS)


def _parsed(line: str, header: bool) -> ast.stmt | None:
    """Parse a line: a statement, or the header of a block. Raises SyntaxError if it is neither."""
    if header:
        # Complete the block that the line begins, or that it continues.
        before = {"elif": "if 0: pass\n", "else": "if 0: pass\n", "except": "try: pass\n", "finally": "try: pass\n"}
        after = "\nfinally: pass" if line.startswith("try") else ""
        line = f"{before.get(line.rstrip(':').partition(' ')[0], '')}{line}\n    pass{after}"
    statements = ast.parse(line).body
    return statements[0] if statements else None
