"""A worker whose jobs are `stub_child`, and which says on stdout each time how far its job is.

python stub_worker.py RUNS
"""

import json
import sys
from pathlib import Path

from lens_analyses.jobs import worker
from lens_analyses.jobs.store import JobStore

STUB = (sys.executable, str(Path(__file__).with_name("stub_child.py")))


class TellingStore(JobStore):
    """Says what `advance` is told."""

    def advance(self, number, **how):
        super().advance(number, **how)
        print(json.dumps(how), flush=True)


if __name__ == "__main__":
    worker.JobStore = TellingStore
    worker._POLL = 0.02
    worker.work(Path(sys.argv[1]), once=True, child=STUB)
