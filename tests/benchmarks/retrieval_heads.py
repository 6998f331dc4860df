"""Retrieval heads by three definitions on needles in real text, and recall without the first of each list.

    python tests/benchmarks/retrieval_heads.py [--model smollm2-135m] [--tokens 1024 2048] [--write]

prints RETRIEVAL_HEADS.md, and writes it with `--write` after every length; lengths that stand there of the same command but for its
lengths are kept, so that what stopped goes on. A needle stands at each depth of a book, which the next one follows where
it is too short, and its first words end the prompt; every length is scored and masked by itself. Of one length a needle takes
3 passes over the prompt and 3 + draws for each number of masked heads, each some 4 s of one core at 1,024 tokens and, at
8,000, over a minute.
"""

from __future__ import annotations

import argparse
import re
from itertools import combinations
from pathlib import Path

import lens
from lens.models.loaded import LoadedModel
from lens.reading.retrieved import KINDS, RetrievalKinds
from lens.stats.intervals import columns

_TABLE = Path(__file__).with_name("RETRIEVAL_HEADS.md")
_LISTED = 10
BOOKS = ("moby-dick", "pride-and-prejudice", "sherlock-holmes")
NEEDLES = (
    (" The best thing to do in San Francisco is", " eat a sandwich in Dolores Park"),
    (" The secret word that opens the garden gate is", " purple elephant lantern"),
    (" The name of the captain's youngest brother is", " Bartholomew Greenfield"),
    (" The pass key is", " 68423"),
    (" The number of the red house is", " 2958"),
)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--depths", nargs="+", type=float, default=[0.2, 0.8])
    parser.add_argument("--masked", nargs="+", type=int, default=[10])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    model = lens.load(given.model)
    depths = " ".join(map(str, given.depths))
    head = f"""# Retrieval heads on needles in real text

`python tests/benchmarks/retrieval_heads.py --model {given.model} --tokens {" ".join(map(str, given.tokens))} --depths {depths}`: `{model.name}`, float32,
CPU. {len(NEEDLES)} needles in {", ".join(BOOKS)}, each at {len(given.depths)} depth{"s" * (len(given.depths) > 1)}. **literal** (Wu), **query** (QRHead), **output** (LOCOS): `lens.reading.retrieval`.
Masked heads give nothing; random ones are drawn from those in no list ({given.draws} draws). Recall: share of the needle's tokens, with a 95 %
interval over needles."""
    print(head)
    known = standing(head) if given.write else {}
    for length in given.tokens:
        if length not in known:
            known[length] = of_length(model, length, given)
            if given.write:
                sections = [known[one] for one in given.tokens if one in known]
                _TABLE.write_text("\n".join([head, *sections]) + "\n", encoding="utf-8")
        print(known[length], flush=True)


def standing(head: str) -> dict[int, str]:
    """Length -> its section, of a page of the same command but for its lengths."""
    old = _TABLE.read_text(encoding="utf-8") if _TABLE.exists() else ""
    first, *parts = re.split(r"\n(?=## )", old.rstrip("\n"))
    of_command = re.compile(r"--tokens [\d ]+")
    if of_command.sub("", first.strip()) != of_command.sub("", head.strip()):
        return {}
    return {int(part.split()[1].replace(",", "")): f"\n{part.rstrip()}" for part in parts}


def of_length(model: LoadedModel, length: int, given: argparse.Namespace) -> str:
    """One length: recall, the first heads of each list, and how far the lists agree."""
    trials = [
        trial
        for number, (question, needle) in enumerate(NEEDLES)
        for trial in lens.tasks.needles.text(
            model,
            "\n".join(map(lens.tasks.text, BOOKS[number % 3 :] + BOOKS[: number % 3])),
            needle=needle,
            question=question,
            lengths=[length],
            depths=given.depths,
        )
    ]
    question = min(len(model.encode(one)) for one, _ in NEEDLES)
    found = lens.reading.retrieval(
        model, trials, question=question, masked=given.masked, draws=given.draws, progress=False
    )
    return f"""
## {length:,} tokens

{len(found.clean)} of {len(trials)} needles come back; the others count for nothing.

{recalls(found)}

{lists(found)}"""


def recalls(found: RetrievalKinds) -> str:
    """Recall by list and number of masked heads."""
    table = found.recall()
    lines = ["| masked | " + " | ".join([*KINDS, "random"]) + " |", "|--:" + "|--:" * 4 + "|"]
    (mean,), (low,), (high,) = columns("clean", found.clean[None], found.seed, trials=True).values()
    clean = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    lines.append(f"| 0 | {' | '.join([clean] * 4)} |")
    for count in found.masked:
        cells = [
            f"{row['recall']:.2f} [{row['recall_low']:.2f}, {row['recall_high']:.2f}]"
            for by in (*KINDS, "random")
            for row in table[(table["by"] == by) & (table["masked"] == count)].to_dict("records")
        ]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lists(found: RetrievalKinds) -> str:
    """The first heads of each list with their score, common ones, and rank correlations."""
    rows = found.table().set_index("name")
    lines = ["| place | " + " | ".join(KINDS) + " |", "|--:" + "|---" * len(KINDS) + "|"]
    tops = {kind: [str(head) for head in found.heads(kind, _LISTED)] for kind in KINDS}
    for place in range(_LISTED):
        cells = [f"{tops[kind][place]} {rows.loc[tops[kind][place], kind]:.2f}" for kind in KINDS]
        lines.append(f"| {place + 1} | {' | '.join(cells)} |")
    correlations = found.agreement().set_index(["a", "b"])["correlation"]
    said = [
        f"{one} and {other} {len(set(tops[one]) & set(tops[other]))} (rank correlation of all {len(rows)} heads "
        f"{correlations[one, other]:.2f})"
        for one, other in combinations(KINDS, 2)
    ]
    return "\n".join(lines) + f"\n\nOf the first {_LISTED}, in common: {'; '.join(said)}."


if __name__ == "__main__":
    main()
