"""Which heads may be made sparse, how far, and what it costs: policies measured and run on the run's text."""

import math
from collections.abc import Iterator

import pandas as pd

import lens
from lens.common.results import Sentence, few, of_kind, with_ends
from lens.figures.policies import policy_runs, stability_bars
from lens.policies import Policy
from lens.policies.policy_search import PolicySearch
from lens.policies.running import PolicyRuns
from lens.policies.scores import COLUMNS
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import NATS, beside, change
from lens_analyses.steps.subject import Subject, block_of, published_heads


def policies(subject: Subject) -> Section:
    """What every policy keeps in every head, and the loss when all heads follow it."""
    length, size = subject.length, block_of(subject.length, subject.settings.block)
    found = lens.policies.evaluate(
        subject.model,
        subject.text_windows,
        _offered(subject),
        block_size=size,
        loss=True,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"policies": found.summary().drop(columns="block_size"), "heads": found.table()}
    limits = (
        "Recall says how much attention is kept, not whether it matters: the loss of the run does.",
        f"Policies have the published rules with sizes in shares of the {length} tokens of a window; longer "
        "prompts are sparser.",
    )
    shown = lens.policies.maps(
        subject.model, subject.text_windows[0], _offered(subject), block_size=size
    )
    if shown.visible.sum() <= _MOST_BLOCKS:
        tables["maps"] = shown.table()
    else:
        limits += (f"The maps of kept blocks are left out: {int(shown.visible.sum()):,} blocks.",)
    return Section(
        name="policies",
        title="Sparse attention: what policies keep and cost",
        summary=of_kind(found.findings(), "best", "loss", "limit"),
        limits=limits,
        columns=defined(tables.values(), _COLUMNS),
        configuration={"block_size": size, "policies": list(found.policies), "seed": subject.seed},
        tables=tables,
        headlines=tuple(_of_rules(tables["policies"])),
        figures={"recall": found.plot()} | {"heads": found.plot(found.policies[0])},
    )


def stability(subject: Subject) -> Section:
    """Whether a pattern of one prompt, layer or decoding step serves another, and what published claims come to."""
    size, length = block_of(subject.length, subject.settings.block), subject.length
    found = lens.policies.stability(
        subject.model,
        subject.text_windows[:_PAIRED],
        steps=tuple(step for step in (1, 4, 16) if 2 * step + 2 <= length),
        block_size=size,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"claims": found.claims(), "conditions": found.summary(), "heads": found.table()}
    return Section(
        name="stability",
        title="Sparse attention: does a pattern serve elsewhere",
        summary=found.findings(),
        limits=(
            "Blocks are chosen by their exact mass: this is what reusing a choice costs, not what finding it costs.",
            f"Windows of one text and one length ({length} tokens); a claim that holds here need not hold on longer "
            "prompts. Steps of denoising are not measured: a causal model has none.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"block_size": size, "share": found.share, "seed": subject.seed},
        tables=tables,
        headlines=tuple(_of_reuse(tables["conditions"])),
        figures={"conditions": stability_bars(found)},
    )


_PAIRED = 6  # windows that are compared pair by pair


def search(subject: Subject) -> Section:
    """The cheapest policy of each head within the loss that is allowed, and what that promises."""
    size, allowed = block_of(subject.length, subject.settings.block), float(subject.settings.loss)
    found = lens.policies.search(
        subject.model,
        subject.text_windows,
        loss=allowed,
        block_size=size,
        levels=subject.settings.levels or None,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"heads": found.table(), "curve": found.curve()}
    summary = found.findings()
    if subject.settings.published is not None:
        tables["published"] = found.beside(
            published_heads(subject.settings.published, subject.model)
        )
        summary += (_disagreement(tables["published"]),)
    return Section(
        name="search",
        title="Sparse attention: a policy for each head",
        summary=summary,
        limits=(
            "Heads are chosen one by one by their error; what they do together is measured, not searched.",
            "lens.policies.read(section.json of this section) gives the policies; lens.policies.write makes "
            "files for serving engines of them.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={
            "loss": allowed,
            "block_size": size,
            "seed": subject.seed,
            "policies": lens.policies.as_json(found, subject.model),
        },
        tables=tables,
        headlines=tuple(_of_found(found)),
        figures={"curve": found.plot()},
    )


def running(subject: Subject) -> Section:
    """The text, and needles, under every policy and dense: all rows sparse, and from the question on."""
    length, size, model = (
        subject.length,
        block_of(subject.length, subject.settings.block),
        subject.model,
    )
    tail = max(1, length // 4)
    needle = max(1, min(8, length // 8))
    trials = lens.tasks.needles.copied(
        model, n=_NEEDLES, length=length - needle - 2, needle=needle, seed=subject.seed
    )
    tasks = {"text": (subject.windows, tail), "needles": (trials, 1)}
    found = []
    for name, (task, question) in tasks.items():
        for start in (None, question):
            runs = lens.policies.run(
                model,
                task,
                _offered(subject),
                block_size=size,
                question=start,
                seed=subject.seed,
                progress=subject.progress,
            )
            rows = runs.table()
            rows.insert(0, "rows", "all" if start is None else "question")
            rows.insert(0, "task", name)
            found.append((runs, rows))
    table = pd.concat([rows for _, rows in found], ignore_index=True)
    return Section(
        name="running",
        title="Sparse attention: text and needles, run",
        summary=tuple(said for one in found for said in _told(*one)),
        limits=(
            f"A needle is {needle} random tokens that were said before, of which the first is said again; the answer "
            "is generated greedily. A model that brings back little without a policy shows little here.",
            f"From the question on: the last {tail} tokens of a window, the last one of a needle's prompt, and every "
            "decoding step; the context before them is dense. Policies without a form for decoding decode dense.",
        ),
        columns=defined([table], _COLUMNS),
        configuration={
            "block_size": size,
            "question": {"text": tail, "needles": 1},
            "seed": subject.seed,
        },
        tables={"runs": table},
        figures={"runs": policy_runs(table)},
    )


def _of_rules(table: pd.DataFrame) -> Iterator[Headline]:
    """What block-sparse attention costs in all heads, beside as many blocks drawn at random."""
    rows = [table[table["policy"].str.startswith(kind)] for kind in ("BlockSparse", "RandomBlocks")]
    if any(part.empty for part in rows):
        return
    one, chance = (part.to_dict("records")[0] for part in rows)
    yield beside(
        f"With {one['density']:.0%} of the blocks, those that {one['policy']} picks, in all heads the loss changes by "
        f"{change(one, 'loss_change')} nats a token; with as many at random by {change(chance, 'loss_change')}.",
        "loss_change",
        one,
        chance,
        "as many blocks at random",
        unit=NATS,
        figure="recall",
    )


def _of_reuse(table: pd.DataFrame) -> Iterator[Headline]:
    """What the pattern of another prompt or layer keeps, beside random blocks."""
    words = {"prompt": "another prompt", "layer": "the layer before"}
    for row in table[table["condition"].isin(list(words))].to_dict("records"):
        chance = {
            f"efficiency{end}": row[f"random_recall{end}"] / row["own_recall"]
            for end in ("", "_low", "_high")
        }
        yield beside(
            f"The blocks of {words[row['condition']]} keep {with_ends(row, 'efficiency', '.2f')} of what a prompt's own "
            f"best blocks keep, as many at random {with_ends(chance, 'efficiency', '.2f')}.",
            "efficiency",
            row,
            chance,
            "as many blocks at random",
            figure="conditions",
        )


def _of_found(found: PolicySearch) -> Iterator[Headline]:
    """What the chosen policies cost on held-out prompts, beside as many blocks at random; nothing where none is."""
    table = found.table()
    sparse = int((table["policy"] != "Full()").sum())
    if not sparse:
        return
    one, chance = found.row("chosen"), found.row("random")
    yield beside(
        f"{sparse} of {len(table)} heads can run sparse, with {table['density'].mean():.0%} of all blocks: on held-out "
        f"prompts the loss changes by {change(one, 'loss_change')} nats a token; with as many blocks at random by {change(chance, 'loss_change')}.",
        "loss_change",
        one,
        chance,
        "as many blocks at random",
        unit=NATS,
        figure="curve",
    )


_NEEDLES = 8
_MOST_BLOCKS = 1_000_000  # of all heads, in the table of maps


def _told(runs: PolicyRuns, rows: pd.DataFrame) -> list[Sentence]:
    """What the best and the worst policy that could be served change, and as many blocks at random."""
    served = rows[[not name.startswith(("Oracle", "RandomBlocks")) for name in rows["policy"]]]
    better = served.sort_values("change", ascending=runs.sign < 0)["policy"]
    said = dict(zip(runs.policies, of_kind(runs.findings(), "change"), strict=True))
    one = {"text": "Text", "needles": "Needles"}[rows["task"].iloc[0]]
    where = "all rows sparse" if rows["rows"].iloc[0] == "all" else "sparse from the question on"
    chosen = {better.iloc[-1]: "the worst"} | {better.iloc[0]: "the best"}  # of one: that
    named = [(f"{which} of {len(served)}", said[name]) for name, which in reversed(chosen.items())]
    named += [("at random", own) for name, own in said.items() if name.startswith("RandomBlocks")]
    return [Sentence(f"{one}, {where}, {which}: {own}", kind="change") for which, own in named]


def _offered(subject: Subject) -> list[Policy]:
    """Policies by their published rules, with sizes in shares of a window, and a bound and a draw."""
    length = subject.length
    near, few = max(1, length // 8), max(1, length // 32)
    kinds = lens.policies
    return [
        kinds.AShape(min(64, few), near),
        kinds.VerticalSlash(few, near, first=few, last=few),
        kinds.BlockSparse(share=0.25),
        kinds.FlexPrefill(least=near),
        kinds.XAttention(stride=math.gcd(8, block_of(subject.length, subject.settings.block))),
        kinds.Sparge(),
        kinds.Oracle(share=0.25),
        kinds.RandomBlocks(share=0.25, ends=True, seed=subject.seed),
    ]


def _disagreement(table: pd.DataFrame) -> Sentence:
    """Which heads a published table calls streaming and this search does not."""
    alone = table[table["streams"] == "published"].sort_values("layer_error", ascending=False)
    both = int((table["streams"] == "both").sum())
    said = f"The published table streams {len(alone) + both} of {len(table)} heads, of which this search streams {both}"
    if len(alone):
        first = alone.iloc[0]
        said += (
            f"; not {few(alone['name'].tolist())}: under {first['a_shape']} {first['name']} keeps {first['recall']:.1%} of "
            f"its attention and is off by {first['layer_error']:.2%} of what its layer writes"
        )
    return Sentence(f"{said}.", kind="published")


_COLUMNS = {name: f"{text[0].upper()}{text[1:]}." for name, text in COLUMNS.items()} | {
    "policy": "The policy with the numbers that are not its defaults.",
    "layer": "Layer, by the model's own number.",
    "head": "Head of the layer, from 0.",
    "name": "Layer and head.",
    "n": "Prompts.",
    "gap": "Recall of the best choice of as many blocks for each row, less that of the policy.",
    "calibration": "Recall less what the policy expected.",
    "loss_change": "Of the next-token loss against the dense model, nats per token.",
    "kind": "chosen; oracle: as many blocks, the best by the exact masses; random: the first, the query's own and "
    "random ones.",
    "query_block": "Block of queries of the first window, from 0.",
    "key_block": "Block of keys, from 0.",
    "mass": "Exact mass that a query of the block gives to the keys of the block, mean over queries.",
    "kept": "Bit i (from 0, of value 2 ** i): policy number i of the configuration keeps the block.",
    "published": "What the published table gives the head.",
    "streams": "Who gives the head an A-shape: both, published (alone), here (alone), neither.",
    "a_shape": "The widest A-shape that was tried here; recall and layer_error are those under it.",
    "condition": "repeat: the same prompt again; prompt: another one; length: the first half alone and inside the whole; "
    "layer: the mean map of a layer in the next one; step n: n decoding steps later.",
    "claim": "What is published or believed.",
    "measure": "The measure that decides.",
    "value": "Of that measure, mean over heads and units.",
    "low": "Lower end of its 95 % interval over units.",
    "high": "Upper end.",
    "verdict": "Whether the claim holds here: above 0.9 of what the own best blocks keep serves; an LSE varies where fewer than 0.9 of the heads "
    "can use it. Not told apart: the interval holds 0.9, or there is none.",
    "overlap": "Overlap of the two choices, 0 as by chance, 1 the same.",
    "own_recall": "Attention kept by as many blocks of its own.",
    "efficiency": "recall / own_recall.",
    "cached_efficiency": "What blocks keep that are searched with the LSE of the other condition, over own_recall's blocks.",
    "usable_lse": "Share of heads in which 99 % of the rows have an LSE within 5 % of the other one.",
    "lse_error": "99th percentile over rows of |exp(change of LSE) - 1|; NaN for layers.",
    "task": "text: predicting it; needles: random tokens that should come back.",
    "rows": "Which ran sparse: all, or those from the question on.",
    "metric": "What is measured: loss in nats, or the share of the needle that comes back.",
    "dense": "The metric without a policy, mean over prompts.",
    "sparse": "The metric under the policy.",
    "change": "sparse - dense, paired by prompt.",
    "kl": "Divergence of the predictions from the dense ones, nats; not measured for needles.",
    "tolerance": "Error of a head, as a share of what its layer writes, up to which it got a policy.",
}
