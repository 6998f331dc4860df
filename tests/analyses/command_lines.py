"""Command lines, valid, wrong and hostile: each ends with its code and at most one line of error.

`command_lines.txt` has one a line, after the exit code and, where it computes, the word `slow`.

    python -m tests.analyses.command_lines      runs them all, and prints those that do not
"""

import contextlib
import io
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lens_analyses.cli import main

_LIST = Path(__file__).with_suffix(".txt")
_FILES = {
    "empty.txt": b"",
    "empty.jsonl": b"",
    "bad.jsonl": b'{"a": 1}\n[',
    "latin.txt": b"\xe9t\xe9",
    "ctl.txt": b"a\x00b\x1b[31m c\r\n",
    "bad.toml": b"a = ",
    "deep.toml": b"a = " + b"[" * 100_000,
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
    "digits.toml": b"seed = " + b"9" * 5000,
    "list.toml": b"models = [1]\nanalyses = [[2]]\n",
}


@dataclass(frozen=True)
class Line:
    """A command line: its words with places in braces, the exit code, and whether it computes."""

    text: str
    code: int
    slow: bool

    def words(self, places: dict[str, Path]) -> list[str]:
        """With the places filled in; LONG and HUGE are names of 300 and 5,000 characters, NINES a number of as many."""
        text = self.text.format(**places)
        return shlex.split(
            text.replace("LONG", "x" * 300).replace("HUGE", "y" * 5000).replace("NINES", "9" * 5000)
        )


def lines() -> list[Line]:
    """All of them."""
    found = []
    for line in _LIST.read_text().splitlines():
        code, _, text = line.partition(" ")
        slow = text.startswith("slow ")
        found.append(Line(text.removeprefix("slow "), int(code), slow))
    return found


def make_places(folder: Path, run: Path, other: Path) -> dict[str, Path]:
    """The places that the lines name, with files that are wrong in many ways."""
    files = folder / "files"
    files.mkdir()
    for name, content in _FILES.items():
        (files / name).write_bytes(content)
    return {"files": files, "out": folder / "out", "runs": run.parent, "run": run, "other": other}


def problem(line: Line, places: dict[str, Path]) -> str:
    """What is wrong with what the command does; "" if nothing is."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(line.words(places))
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException as raw:
            return f"raised {type(raw).__name__}: {raw}"
    return "; ".join(_faults(line, int(code), err.getvalue()))


def _faults(line: Line, code: int, said: str) -> Iterator[str]:
    told = [text for text in said.splitlines() if text.lower().startswith("error:")]
    if code != line.code:
        yield f"ended with {code} and not {line.code} ({said[-300:].strip()})"
    if "Traceback" in said or "not foreseen" in said:
        yield f"is raw: {said[-300:].strip()}"
    if len(told) != (code in (1, 2)) and "validate" not in line.text:
        yield f"tells {len(told)} errors"


def run_all() -> int:
    """Run every line; how many have a problem."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder, "runs")
        for seed in (1, 2):
            quiet = ["--model", "induction-2l", "--seed", str(seed), "--quiet", "--json"]
            with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
                main(["run", "--copied", "1", *quiet, "--out", str(runs)])
        first, second = sorted(path.parent for path in runs.glob("*/run.json"))
        places = make_places(Path(folder), first, second)
        with contextlib.chdir(folder):
            for line in lines():
                if found := problem(line, places):
                    wrong += 1
                    sys.stdout.write(f"{line.text}: {found}\n")
    sys.stdout.write(f"{wrong} of {len(lines())} command lines have a problem\n")
    return wrong


if __name__ == "__main__":
    raise SystemExit(bool(run_all()))
