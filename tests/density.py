"""How dense the code is: three figures of the product code, for a commit or the present tree.

    python tests/density.py [COMMIT] [--files]

    comments       own-line comments, as a share of the lines of code and comments
    tuples         assignments `a, b = x, y` of unrelated things, as a share of all assignments
    conditionals   conditional expressions (`x if c else y`) per 1000 lines of code

Lines of code are lines that are not blank, not a docstring and not a comment. An assignment counts
as one of unrelated things where both sides are written-out tuples; a swap, and a tuple whose
elements all call the same function, do not count: there one line says one thing.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_PRODUCT = ("tests/", "experiments/", "benchmarks/", "findings/")


def sources(commit: str | None) -> dict[str, str]:
    """Path -> text of each product file, in the working tree or at a commit."""
    if commit is None:
        command = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    else:
        command = ["git", "-C", str(ROOT), "ls-tree", "-r", "--name-only", commit]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    names = [n for n in names if n.endswith(".py") and not n.startswith(NOT_PRODUCT)]
    if commit is None:
        return {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    show = ["git", "-C", str(ROOT), "show"]
    return {
        name: subprocess.run(
            [*show, f"{commit}:{name}"], capture_output=True, text=True, check=True
        ).stdout
        for name in names
    }


def is_unrelated(node: ast.AST) -> bool:
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    left, right = node.targets[0], node.value
    if not isinstance(right, ast.Tuple) or len(left.elts) != len(right.elts):
        return False
    if any(isinstance(x, ast.Starred) for x in (*left.elts, *right.elts)):
        return False
    names = sorted(ast.unparse(x) for x in left.elts)
    if names == sorted(ast.unparse(x) for x in right.elts):
        return False  # a swap
    called = {ast.unparse(x.func) if isinstance(x, ast.Call) else None for x in right.elts}
    return len(called) > 1 or called == {None}


def measure(text: str) -> dict[str, int]:
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            comments += not token.string.startswith("# ----")  # a headline says no why
    lines = text.splitlines()
    code = sum(
        bool(line.strip()) and not line.strip().startswith("#") and i not in docstrings
        for i, line in enumerate(lines, 1)
    )
    nodes = list(ast.walk(tree))
    return {
        "code": code,
        "comments": comments,
        "assignments": sum(isinstance(n, ast.Assign) for n in nodes),
        "tuples": sum(is_unrelated(n) for n in nodes),
        "conditionals": sum(isinstance(n, ast.IfExp) for n in nodes),
    }


def figures(m: dict[str, int]) -> str:
    comments = 100 * m["comments"] / max(1, m["code"] + m["comments"])
    tuples = 100 * m["tuples"] / max(1, m["assignments"])
    conditionals = 1000 * m["conditionals"] / max(1, m["code"])
    return f"{m['code']:6} {comments:9.1f} % {tuples:9.1f} % {conditionals:9.1f}"


def main(argv: list[str]) -> None:
    commits = [word for word in argv if not word.startswith("--")]
    found = {n: measure(text) for n, text in sources(commits[0] if commits else None).items()}
    print("  code    comments      tuples  conditionals/1000")
    if "--files" in argv:
        for name, m in sorted(found.items()):
            print(figures(m), "", name)
    total = {key: sum(m[key] for m in found.values()) for key in next(iter(found.values()))}
    print(figures(total), "  all product code")


if __name__ == "__main__":
    main(sys.argv[1:])
