"""The README's table of faults, made by the tests that inject them.

    python tests/fault_table.py            runs tests/test_faults.py and prints the table as Markdown
    python tests/fault_table.py --slow     with the kills and the soak

A test says what it did and what it saw with `record`, after its assertions: a row that is not true is not written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "TAU2_FAULT_TABLE"
TESTS = ["tests/test_faults.py", "tests/test_kill.py", "tests/test_soak.py", "tests/test_security.py"]


def record(stage: str, fault: str, outcome: str) -> None:
    """Add a row to the file that the environment names; without one nothing is kept."""
    if os.environ.get(VARIABLE):
        with open(os.environ[VARIABLE], "a", encoding="utf-8") as file:
            file.write(json.dumps([stage, fault, outcome]) + "\n")


def table(rows: list[list[str]]) -> str:
    """Markdown; faults with the same outcome in the same stage share a line."""
    together: dict[tuple[str, str], list[str]] = {}
    for stage, fault, outcome in rows:
        faults = together.setdefault((stage, outcome), [])
        faults += [] if fault in faults else [fault]
    lines = ["| stage | what was thrown at it | what happened |", "|---|---|---|"]
    lines += [f"| {stage} | {_joined(faults)} | {outcome} |" for (stage, outcome), faults in together.items()]
    return "\n".join(lines)


def _joined(faults: list[str]) -> str:
    """ "engine: a, b; customer: c" of "engine: a", "engine: b", "customer: c"."""
    by_part: dict[str, list[str]] = {}
    for fault in faults:
        part, _, what = fault.rpartition(": ")
        by_part.setdefault(part, []).append(what)
    return "; ".join(f"{part}: {', '.join(what)}" if part else ", ".join(what) for part, what in by_part.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--slow", action="store_true", help="with the kills and the soak (half an hour)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        marks = ["-m", "slow or not slow"] if args.slow else []
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, *marks]
        done = subprocess.run(command, env={**os.environ, VARIABLE: str(path)}, stdout=sys.stderr, check=False)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        print(table([json.loads(line) for line in lines]))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
