"""A command whose output nobody reads any more, as with `| head`, ends quietly."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
FILES = [
    path
    for folder in (ROOT, *FOLDERS)
    for path in sorted(folder.glob("*.py"))
    if folder.name != "examples"  # to be read and copied
]
# bench.py starts it, and reads it.
PARTS = {"benchmarks/gpu.py"}
# Their main() is experiments.protocol's: two of them stand for all.
EXPERIMENTS = {"all", "moe"}
ENDS = ("command(", "reader_may_leave(", "protocol.main(")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="without pipes of this kind")


# ---- every command -------------------------------------------------------------------------------
def main_block(text: str) -> str:
    """What stands under `if __name__ == "__main__"`, or ""."""
    blocks = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
    ]
    return "\n".join(ast.unparse(block) for block in blocks)


def is_command(block: str) -> bool:
    """Does it read the words typed? If not, it prints an example of a few lines."""
    return "main(" in block or "sys.argv" in block or any(end in block for end in ENDS)


BLOCKS = {
    path.relative_to(ROOT).as_posix(): main_block(path.read_text(encoding="utf-8"))
    for path in FILES
}
COMMANDS = sorted(name for name, block in BLOCKS.items() if is_command(block))


def test_every_command_lets_its_reader_leave():
    assert len(COMMANDS) > 30 and {"train.py", "memory/known.py", "parity/__main__.py"} < {
        *COMMANDS
    }
    bare = {name for name in COMMANDS if not any(end in BLOCKS[name] for end in ENDS)}
    assert bare - PARTS == set()


def left(*words: str, buffered: bool = True) -> tuple[int, str]:
    """(exit status, stderr) of Python with these words, whose stdout has no reader."""
    env = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, *words],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=env,
        timeout=60,
    )
    os.close(writer)
    return run.returncode, run.stderr


TRIED = [
    name
    for name in COMMANDS
    if not name.startswith("experiments/") or Path(name).stem in EXPERIMENTS
]


@pytest.mark.parametrize(
    "name", [n if n == "bench.py" else pytest.param(n, marks=pytest.mark.slow) for n in TRIED]
)
def test_the_help_of_a_command_has_no_traceback_where_nobody_reads(name):
    if name in PARTS:
        return
    module = name.removesuffix("/__main__.py").removesuffix(".py").replace("/", ".")
    status, error = left("-m", module, "--help")
    # 2: it has no --help, and says what to type.
    assert (status == 0 and error == "") or (status == 2 and error.count("\n") == 1), error
    assert "Broken" not in error


# ---- how -----------------------------------------------------------------------------------------
CODE = """
import sys
from metrics.outlets import command
def main(words):
    BODY
command("tool", main, OSError)
"""


@pytest.mark.parametrize(
    "body, buffered, status, says",
    [
        ("print('a line')", True, 0, ""),
        ("print('a line')", False, 0, ""),
        ("while True: print('a line')", True, 0, ""),
        ("print('a line'); return 3", True, 3, ""),
        ("print('a line'); raise ValueError('no such word')", True, 2, "tool: no such word\n"),
        ("raise FileNotFoundError('no such file')", True, 2, "tool: no such file\n"),
    ],
)
def test_how_a_command_ends_that_nobody_reads(body, buffered, status, says):
    code = CODE.replace("BODY", body)
    assert left("-c", code, buffered=buffered) == (status, says)


def test_another_broken_pipe_is_a_fault():
    code = CODE.replace("BODY", "raise BrokenPipeError('a socket')")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and "BrokenPipeError: a socket" in run.stderr
