"""Which heads may be made sparse, how far, and what it costs: policies measured and run on the run's text."""

import math

import lens
from lens.common.results import of_kind
from lens.policies.scores import COLUMNS
from lens.runs.sections import Section
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject


def policies(subject: Subject) -> Section:
    """What every policy keeps in every head, and the loss when all heads follow it."""
    length = subject.length
    size = _block(subject)
    near, few = max(1, length // 8), max(1, length // 32)
    kinds = lens.policies
    offered = [
        kinds.AShape(min(64, few), near),
        kinds.VerticalSlash(few, near, first=few, last=few),
        kinds.BlockSparse(share=0.25),
        kinds.FlexPrefill(least=near),
        kinds.XAttention(stride=math.gcd(8, size)),
        kinds.Sparge(),
        kinds.Oracle(share=0.25),
        kinds.RandomBlocks(share=0.25, ends=True, seed=subject.seed),
    ]
    found = kinds.evaluate(
        subject.model,
        subject.text_windows,
        offered,
        block_size=size,
        loss=True,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"policies": found.summary().drop(columns="block_size"), "heads": found.table()}
    return Section(
        name="policies",
        title="Sparse attention: what policies keep and cost",
        summary=of_kind(found.findings(), "best", "loss", "limit"),
        limits=(
            "Recall says how much attention is kept, not whether it matters: the loss of the run does.",
            f"Policies have the published rules with sizes in shares of the {length} tokens of a window; longer "
            "prompts are sparser.",
        ),
        columns=defined(tables.values(), _COLUMNS),
        configuration={"block_size": size, "policies": list(found.policies), "seed": subject.seed},
        tables=tables,
        figures={"recall": found.plot()} | {"heads": found.plot(found.policies[0])},
    )


def search(subject: Subject) -> Section:
    """The cheapest policy of each head within the loss that is allowed, and what that promises."""
    size, allowed = _block(subject), float(subject.settings.loss)
    found = lens.policies.search(
        subject.model,
        subject.text_windows,
        loss=allowed,
        block_size=size,
        seed=subject.seed,
        progress=subject.progress,
    )
    tables = {"heads": found.table(), "curve": found.curve()}
    return Section(
        name="search",
        title="Sparse attention: a policy for each head",
        summary=found.findings(),
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
        figures={"curve": found.plot()},
    )


def _block(subject: Subject) -> int:
    """The block size that is asked for, or one of which a window has sixteen."""
    return subject.settings.block or max(8, min(64, 2 ** ((subject.length // 16).bit_length() - 1)))


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
    "tolerance": "Error of a head, as a share of what its layer writes, up to which it got a policy.",
}
