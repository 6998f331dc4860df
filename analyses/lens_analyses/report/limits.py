"""What a report does not show, and on what its numbers depend: said for this very run."""

from collections.abc import Collection, Mapping
from typing import Any

from lens.common.errors import LensError
from lens.runs import Run
from lens.traces.profiles import SINK_EPSILON

_OF_FIRST = (
    "Sinks named here are on the first token and depend on which token that is: with another one, or "
    "after a chat template, heads can have them elsewhere or not at all."
)
_UNTOUCHED = "Nothing was changed inside the model, so nothing here is about cause: a score says"

_MEASURED_BY = {
    "the effect of removing heads": {
        "importance",
        "classes",
        "pruning",
        "effects",
        "retrieval_kinds",
    },
    "circuits": {"edges", "circuit"},
    "the norm of what a head writes": {"roles", "mixing"},
    "attention after changing the prompt's first token": {"first_token"},
    "attention in another precision": set(),
}
"""What a report may lack -> the sections that measure it."""


def limits(run: Run, config: Mapping[str, Any], sections: Collection[str]) -> list[str]:
    """One or two sentences each, most important first; `sections`: names of those that the run has."""
    if run.meta["model"].get("attending") == []:
        phi = "What a head makes of its values is not what the model would do without it; lens.mixers.Ablate takes one out."
        return [
            *([phi] if "mixers" in sections else []),
            "Brackets are 95 % bootstrap intervals over "
            + (
                "prompts."
                if "edges" in sections
                else "windows. They do not cover the choice of the text."
            ),
        ]
    return [
        ("Scores of attention are not about cause: they say" if sections else _UNTOUCHED)
        + " where a head looks, not what the model would do without it. Heads with high scores can be "
        "redundant, and heads with low ones important.",
        *_first_token(run),
        *_prompts(run, config.get("prompts")),
        "Brackets are 95 % bootstrap intervals: over prompts where there are several, else over "
        "contiguous stretches of the one prompt. They do not cover the choice of the text.",
        "Heads are counted above uniform attention, which is exact for these prompts, and above the highest "
        "head of the same architecture with random weights, which is one draw (seed "
        f"{run.meta['seed']}): another draw has another highest head.",
        "Thresholds only sort heads for reading; the scores themselves are in the table, the grid and "
        "report.json.",
        f"Not measured: {', '.join(what for what, by in _MEASURED_BY.items() if not by & {*sections})}.",
    ]


def _first_token(run: Run) -> list[str]:
    lengths = sorted(set(run.prompts["tokens"]))
    if not lengths:
        return []
    span = f"{lengths[0]:,}" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,}"
    begins = _begins(run)
    return [
        *begins,
        *([_OF_FIRST] if begins else []),
        f"Sink rates depend on the threshold (ε = {SINK_EPSILON}) and on the prompts' length ({span} tokens "
        "here), so they compare only between runs that share both (Gu et al., arXiv 2410.10781).",
    ]


def _begins(run: Run) -> list[str]:
    """With which token the prompts of each kind begin, and whether it is the tokenizer's BOS; nothing of those of no tokens."""
    kinds: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for kind, prompts in run.prompts.groupby("kind", sort=False):
        firsts = tuple(dict.fromkeys(strings[0] for strings in prompts["token_strings"]))
        try:
            trace = run.trace(str(prompts.iloc[0]["prompt_id"]))
            if not (trace.dataset["token_id"].values >= 0).any():  # latents, patches, a sound
                continue
            bos = trace.attrs["bos"]
        except LensError:
            bos = run.meta["bos"]
        kinds.setdefault((bos == "added", firsts), []).append(str(kind))
    said = []
    for (has_bos, firsts), names in kinds.items():
        which = " and ".join(names)
        tokens = ", ".join(map(repr, firsts[:3])) + (" and others" if len(firsts) > 3 else "")
        said.append(
            f"Each {which} prompt begins with the tokenizer's BOS token, {tokens}."
            if has_bos
            else f"No {which} prompt begins with a BOS token, as the tokenizer puts none there; "
            f"they begin with {tokens}."
        )
    return said


def _prompts(run: Run, config: Any) -> list[str]:
    prompts = run.prompts.to_dict("records")
    texts = [prompt for prompt in prompts if prompt["kind"] == "text"]
    config = config if isinstance(config, dict) else {}
    said = []
    if texts:
        titles = {prompt["title"].partition(":")[0] for prompt in texts}
        source = titles.pop() if len(titles) == 1 else f"{len(titles)} texts"
        source = "the prompt itself" if config.get("prompt") else source
        tokens = sum(prompt["tokens"] for prompt in texts)
        said.append(
            f"The text is {source}, {tokens:,} tokens: what heads do on other kinds of text, on code or in "
            "other languages was not looked at."
        )
    if config.get("windows"):
        said.append(
            f"The text was cut into pieces of {config['tokens']} tokens; no head could look beyond its piece."
        )
    elif config.get("tokens"):
        said.append(f"Each text was cut after {config['tokens']:,} tokens, on request.")
    if any(prompt["kind"] == "copied" for prompt in prompts):
        said.append(
            "Copied prompts are uniform random tokens, which no text looks like: they show that a head can "
            "copy, not how often it does."
        )
    return said
