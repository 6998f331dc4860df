"""What published tables of heads say: how many stream, are block-sparse, vertical-slash or full.

    python tests/benchmarks/published_policies.py FILE_OR_FOLDER [...] [--heads 32] [--full 0.5]

A MInference JSON (its `minference/configs`) or a folder of DuoAttention (its `attn_patterns/MODEL/RUN`), which knows KV
heads alone: `--heads` is the number of query heads of a layer, `--full` the share that stays full when it is run.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from lens import policies
from lens.policies.files import format_of


def main() -> None:
    """One row per table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--full", type=float)
    asked = parser.parse_args()
    sys.stdout.write("| table | heads | policies |\n|---|---|---|\n")
    for path in asked.paths:
        if format_of(path) == "duo":
            name = path.parent.name
            found = policies.read(path, format="duo", heads=asked.heads, full=asked.full)
        else:
            name = path.name.split("_kv_out")[0].removesuffix(".json") + path.stem[
                -3:
            ] * path.stem.endswith("_v2")
            found = policies.read(path, format="minference", as_searched=True)
        counts = Counter(map(str, found.policies.values()))
        told = ", ".join(f"{one} {count}" for one, count in counts.most_common())
        sys.stdout.write(f"| {name} | {len(found.policies):,} | {told} |\n")


if __name__ == "__main__":
    main()
