"""All experiments in turn: measures what is missing and writes the index, experiments/README.md.

    python -m experiments.all              what is measured already is not measured again
    python -m experiments.all --quick      each on its small grid, in a temporary folder; no index
    python -m experiments.all --index      the index alone

--jobs=N goes to each. The exit status is that of the worst.
"""

import re
import subprocess
import sys
from pathlib import Path

from metrics.outlets import command

HERE = Path(__file__).resolve().parent
# No experiments themselves.
SHARED = "__init__ all protocol findings claims budget claim_page significance".split()
HEAD = """# Experiments

Each file tries one claim of the lessons this project follows, at a scale that two CPU cores can
run. Its docstring says claim, source, protocol and what we expected, and was written before it ran.
The verdict is computed from the figures: *holds*, *holds in part*, *not at this scale* (we cannot
tell, and why), *does not hold*.

    python -m experiments.NAME             measures the rows that results/NAME.csv lacks
    python -m experiments.NAME --quick     half a minute, in a temporary folder
    python -m experiments.all              all of them, then this page

Six of them try a claim on your own text, with your budget of minutes: [claims](../docs/claims.md).

    python -m experiments.optimizers --data=FILE --optims=muon,adamw --budget=10m

"""


def experiments() -> list[Path]:
    return [path for path in sorted(HERE.glob("*.py")) if path.stem not in SHARED]


def index(results: Path) -> str:
    """A line for each experiment, from the first lines of its NAME.md."""
    lines = ["| | claim | verdict | in a number | picture |", "|---" * 5 + "|"]
    for path in experiments():
        name, page = path.stem, results / f"{path.stem}.md"
        text = page.read_text(encoding="utf-8") if page.exists() else "**Verdict.** not run yet\n"
        said = [
            re.search(rf"^\*\*{word}\.\*\* (.+)$", text, re.M)
            for word in ("Claim", "Verdict", "Number")
        ]
        claim, verdict, number = (found[1].replace("|", "\\|") if found else "" for found in said)
        link = f"[{name}](results/{name}.md)" if page.exists() else f"[{name}]({name}.py)"
        picture = f'<img src="results/{name}.png" width="240">' * (results / f"{name}.png").exists()
        lines.append(f"| {link} | {claim} | {verdict} | {number} | {picture} |")
    return "\n".join(lines) + "\n"


def main(words: list[str]) -> int:
    for word in words:
        if not re.fullmatch(r"--quick|--index|--jobs=[1-9]\d*", word):
            raise ValueError(f"{word} is not understood; there are --quick, --index and --jobs=N")
    status, given = 0, [word for word in words if word != "--index"]
    for path in experiments() if "--index" not in words else []:
        print(f"\n---- {path.name} ----", flush=True)
        command = [sys.executable, "-m", f"experiments.{path.stem}", *given]
        status = max(status, subprocess.run(command, cwd=HERE.parent).returncode)
    if "--quick" not in words:
        (HERE / "README.md").write_text(HEAD + index(HERE / "results"), encoding="utf-8")
        print(HERE / "README.md")
    return status


if __name__ == "__main__":
    command("all.py", main)
