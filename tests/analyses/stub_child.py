"""Stands in for a job's process where the model is not the point: a run folder as `lens run` writes it.

python stub_child.py PID run -c CONFIG --out RUNS --json [--dry-run]

With a FIFO named by STUB_TELLS it says there "half" when one of its two prompts is done, and then waits to be
ended; the FIFO is closed when the process is gone. A seed of 13 fails.
"""

import json
import os
import signal
import sys
import tomllib
from pathlib import Path

from lens_analyses.console import ERROR, OK, PARTIAL, stoppable
from lens_analyses.jobs.child import end_with


def tell_and_wait(fifo):
    """The FIFO stays open until the process is gone."""
    os.write(os.open(fifo, os.O_WRONLY), b"half\n")
    while True:
        signal.pause()


def compute(config, runs):
    """Two prompts, or the one that an earlier try left; the exit code."""
    from lens.runs.writer import RunWriter  # takes a second, and a job that fails needs none
    from tests.lens.made_runs import meta

    writer = RunWriter.start(runs, config, meta(title="stub", model={"name": "stub"}))
    print("resumed" if writer.resumed else "begun", file=sys.stderr)
    status = "success"
    try:
        writer.update(prompts={"total": 2, "done": 1})
        if "STUB_TELLS" in os.environ:
            tell_and_wait(os.environ["STUB_TELLS"])
        writer.update(prompts={"total": 2, "done": 2})
    except KeyboardInterrupt:
        status = "partial"
    writer.finish(status, None)
    print(json.dumps({"id": writer.path.name}))
    return OK if status == "success" else PARTIAL


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    words = sys.argv[2:]
    given = tomllib.loads(Path(words[words.index("-c") + 1]).read_text())
    if given["seed"] == 13:
        print(json.dumps({"status": "error", "error": {"message": "no luck"}}))
        raise SystemExit(ERROR)
    if "--dry-run" in words:
        print(json.dumps({"prompts": 2, "seconds": 1.5}))
        raise SystemExit(OK)
    with stoppable():
        raise SystemExit(compute(given, words[words.index("--out") + 1]))
