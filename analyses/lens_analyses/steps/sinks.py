"""Where attention is parked and how a sink works: detection, mechanism, dark directions."""

from dataclasses import replace

import numpy as np
import pandas as pd

import lens
from lens import sinks
from lens.common.given import given_traces
from lens.common.results import of_kind
from lens.figures.sink_mechanism import sink_origin, sink_tests
from lens.models.random_weights import random_weights
from lens.runs.sections import Section
from lens.sinks.detection.positions import SinkKeys
from lens.sinks.detection.rates import SinkRate
from lens_analyses.steps.columns import defined
from lens_analyses.steps.headlines import of_conditions, of_highest
from lens_analyses.steps.subject import Subject

PARKED = "Where attention is parked says nothing about what it does: see the edits."
_BANDS, _FEW = 10, 3  # bands of the spectrum, and prompts that each is tried on


def detection(subject: Subject) -> Section:
    """Which keys are sinks, in how many heads, from which layer on; and on random tokens."""
    texts, progress = subject.text_windows, subject.progress
    asked = {"seed": subject.seed, "progress": progress}
    traces = given_traces(
        lens.capture(subject.model, texts, statistics=["received"], progress=progress)
    )
    rate, keys = sinks.rate(traces, seed=subject.seed), sinks.find(traces, seed=subject.seed)
    published = sinks.rate(traces, seed=subject.seed, normalise="all")
    emergence = sinks.emergence(subject.model, texts, **asked)
    growth = sinks.emergence(subject.model, texts, over="length", **asked)
    differ = not np.allclose(rate.alphas, published.alphas)
    section = detected(
        rate,
        keys,
        f"Every number is for ε = {rate.epsilon}, T = {rate.samples.tokens} tokens"
        f"{rate.samples.start}, n = {rate.samples.n}; rates compare only where these agree.",
        "α is the mean over the queries that see the key. Gu et al. take all queries from it on: "
        + ("layers have windows, so that rate stands beside it." if differ else "the same here."),
        last=(
            "Sinks hang on what comes first: another first token, or a chat template, can move them. Whether "
            "it must be the BOS token is measured with and without it, below.",
            PARKED,
        ),
    )
    heads = section.tables["heads"].assign(
        rate_all=published.by_head.ravel(), alpha_all=published.alpha.ravel()
    )
    tables = {**section.tables, "heads": heads} | {
        "layers": emergence.table(),
        "lengths": growth.table(),
    }
    return replace(
        section,
        summary=(
            *of_kind(rate.findings(), "rate"),
            *(of_kind(published.findings(), "rate") if differ else ()),
            *of_kind(rate.findings(), "heads"),
            *of_kind(keys.profile.findings(), "positions"),
            *of_kind(emergence.findings(), "rate"),
            *of_kind(growth.findings(), "rate"),
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={**section.configuration, "rate_over_all_queries": published.value},
        tables=tables,
        figures={**section.figures, "layers": emergence.plot(), "lengths": growth.plot()},
        headlines=tuple(
            of_conditions(
                tables["layers"],
                "text",
                "random",
                f"The first token is a sink (α above {rate.epsilon}) in {{value}} of heads on text, in {{baseline}} "
                "on random tokens.",
                "random tokens",
                "layers",
            )
        ),
    )


def detected(rate: SinkRate, keys: SinkKeys, *limits: str, last: tuple[str, ...]) -> Section:
    """Which keys are sinks, and in how many heads; limits of the keys come before the `last` ones."""
    found = {"keys": keys, "positions": keys.profile, "epsilon": rate.curve()}
    tables = {"heads": rate.table()} | {name: one.table() for name, one in found.items()}
    said = keys.profile.findings()
    return Section(
        name="detection",
        title="Sinks: where attention is parked",
        summary=(*of_kind(rate.findings(), "rate", "heads"), *of_kind(said, "positions")),
        limits=(*limits, *of_kind(said, "limit"), *last),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "epsilon": rate.epsilon,
            "normalise": rate.normalise,
            "rate": rate.value,
            "tokens": rate.samples.tokens,
            "bos": rate.samples.bos,
        },
        tables=tables,
        figures={"grid": rate.plot()} | {name: one.plot() for name, one in found.items()},
    )


def mechanism(subject: Subject) -> Section:
    """Why heads look there, and what they get: keys, values, massive activations, gates."""
    texts, progress = subject.text_windows, subject.progress
    geometry = sinks.mechanism(subject.model, texts, seed=subject.seed, progress=progress)
    found = sinks.massive(subject.model, texts, progress=progress)
    gates = sinks.gates(subject.model, texts, seed=subject.seed, progress=progress)
    tables = {"heads": geometry.table(), "massive": found.table(), "gates": gates.table()}
    parked = tables["gates"][(tables["gates"]["mechanism"] == "keys").to_numpy()]
    figures = {"massive": found.plot(), "mass_and_value": geometry.plot(), "gates": gates.plot()}
    said = (*geometry.findings(), *found.findings(), *gates.findings())
    return Section(
        name="mechanism",
        title="Sinks: how they work",
        summary=tuple(one for one in said if one.kind != "limit"),
        limits=(
            "Norms and cosines are of the key and query vectors as they meet; they describe, and prove no cause.",
            "A layer's massive activations are named by thresholds; the largest value is stated where none passes.",
            *of_kind(gates.findings(), "limit"),
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "ratio": found.ratio, "magnitude": found.magnitude},
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_highest(
                parked.assign(
                    parked=1 - parked["gate"], low=1 - parked["high"], high=1 - parked["low"]
                ),
                "parked",
                "{name} parks most: {value} of its attention lies on the sources, the median head's {baseline}.",
                "the median head",
                figure="gates",
            )
        ),
    )


def kinds(subject: Subject) -> Section:
    """Which kind of sink each head has, what each kind is worth, where it comes from and what moves it."""
    asked = {"seed": subject.seed, "progress": subject.progress}
    texts = subject.text_windows[:_FEW]
    found = sinks.kinds(subject.model, texts, **asked)
    random = sinks.kinds(random_weights(subject.model, subject.seed), texts, **asked)
    kinds = list(dict.fromkeys((*found.counts, *random.counts)))
    counts = [{"kind": kind, "heads": found.counts.get(kind, 0)} for kind in kinds]
    counts = [row | {"random_heads": random.counts.get(row["kind"], 0)} for row in counts]
    tables = {
        "heads": found.table(),
        "counts": pd.DataFrame(counts),
        "tests": found.tests,
        "origin": found.origin,
        "moves": found.moves,
    }
    tables = {name: table for name, table in tables.items() if len(table)}
    figures = {"kinds": found.plot(), "origin": sink_origin(found.origin)}
    if len(found.tests):
        figures["tests"] = sink_tests(found.tests)
    parked = sum(count for kind, count in random.counts.items() if kind != "none")
    said = found.findings()
    return Section(
        name="kinds",
        title="Sinks: which kind",
        summary=(
            *of_kind(said, "kinds"),
            f"With random weights {parked} of {len(random.rows)} heads have a sink of any kind.",
            *of_kind(said, "test", "origin", "move"),
        ),
        limits=(
            "nop: less than 10 % of what the head writes comes from the sources; broadcast: more than half, fixed where "
            "their values vary by less than 5 % over prompts; a sink gets more than 30 % of the attention.",
            *of_kind(said, "limit"),
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "prompts": len(texts), "seed": subject.seed},
        tables=tables,
        figures=figures,
        headlines=tuple(
            of_highest(
                tables["heads"],
                "share",
                "{name} broadcasts most: {value} of what it writes comes from the first token, of what the median "
                "head writes {baseline}.",
                "the median head",
                figure="kinds",
            )
        ),
    )


def spectrum(subject: Subject) -> Section:
    """What the bands of the unembedding's spectrum are read and written by, and worth."""
    texts = subject.text_windows[:_FEW]
    asked = {"count": _BANDS, "seed": subject.seed, "progress": subject.progress}
    found = sinks.bands(subject.model, texts, **asked)
    assert found.losses is not None
    mean = found.table().groupby(["weight", "band"], as_index=False)[["energy", "chance"]].mean()
    tables = {"losses": found.losses.table(), "energies": mean}
    said = found.findings()
    return Section(
        name="spectrum",
        title="Sinks: dark directions",
        summary=(*of_kind(said, "losses"), *of_kind(said, "energies")),
        limits=(
            "Bands are of the unembedding's singular directions, strongest first (arXiv 2402.09221).",
            *of_kind(said, "limit"),
        ),
        columns=defined(tables.values(), COLUMNS | _SPECTRUM),
        configuration={"bands": _BANDS, "prompts": len(texts)},
        tables=tables,
        figures={"losses": found.losses.plot(), "energies": found.plot()},
        headlines=tuple(
            of_highest(
                tables["losses"],
                "delta_loss",
                "Without band {band} of the unembedding's spectrum the loss rises by {value} nats a token, without "
                "the median band by {baseline}.",
                "the median band",
                unit="nats a token",
                figure="losses",
            )
        ),
    )


_SPECTRUM = {
    "control": "delta_loss of as many random directions.",
    "chance": "Share of the directions that are in the band.",
}
COLUMNS = {
    "neuron_share": "Share of what an MLP writes that one neuron makes at the sources (size of activation times weights).",
    "neuron_share_others": "The same of whichever neuron is largest at each other position, median.",
    "neuron": "Which neuron that is: the largest there, mean over prompts.",
    "channels": "Dimensions that it writes through: participation of its weights.",
    "layer": "Layer, from 0; missing: all layers together.",
    "name": "The head.",
    "head": "Head in the layer, from 0.",
    "key": "Position of the key.",
    "rate_all": "The same with alpha_all.",
    "alpha_all": "Mean attention that the key receives from all queries from it on (Gu et al.), seen or not.",
    "rate": "Share of heads (and prompts) in which the key is a sink: alpha > epsilon (Gu et al., arXiv 2410.10781).",
    "low": "Low end of the 95 % interval over prompts.",
    "high": "High end of the 95 % interval over prompts.",
    "reach": "Name of the scope, or whether the text begins with BOS.",
    "domain": "Which text.",
    "activity": "1 - mean attention on the first token, of all queries but the first.",
    "loss": "Change of loss with the head's output 0, nats a token.",
    "dormant": "Activity below 0.2 and a change of loss below 0.001 with the head off (arXiv 2410.13835).",
    "band": "Of the unembedding's singular directions, 0 the strongest.",
    "energy": "Share of the weights' squared norm in the band, mean over heads.",
    "weight": "query, key and value read the residual stream, output writes it.",
    "alpha": "Mean attention that the key receives.",
    "kind": "Of the sink: nop, fixed or input broadcast, mixed, learned, gate, none.",
    "sure": "Whether the kind is the same at all ends of the intervals of mass and share.",
    "heads": "How many heads.",
    "random_heads": "As many with random weights.",
    "share": "Share of the size of what the head writes that comes from the sources.",
    "uniform_mass": "Mass that the sources would get if attention were spread evenly.",
    "uniform_share": "Share if attention were spread evenly.",
    "learned": "Mass of the model's own learned sink; missing: it has none.",
    "rank": "Stable rank of what the head writes in the rows behind the sources.",
    "rank_centred": "The same less the mean row.",
    "variation": "Variance of the sources' values over prompts, over their mean square; 0: always the same.",
    "test": "zero: the sources' values are 0; mask: the sources are hidden; mean, other: their values are those of all or of another prompt.",
    "control": "delta_loss of the same edit of random keys with as much attention.",
    "control_mass": "Attention that these random keys held.",
    "norm": "Size of the sources' state, over the median of other positions.",
    "variance": "Variance over dimensions of what all heads give at the sources, over that median.",
    "gradient": "Size of the gradient of the loss by the sources' state, over that median.",
    "value_gradient": "The same by their values.",
    "way": "What was moved: the state, its massive dimensions, or (alone) what the target sees; other: controls.",
    "target": "Position that the sink is moved to.",
    "target_before": "Its mean alpha in the heads that have a sink behind that layer.",
    "target_after": "The same after the move.",
    "sinks_after": "Share of these heads whose target is a sink then.",
    "normalise": "What alpha is a mean over; visible: queries that see the key; all: queries from it on, as Gu et al.",
    "uniform": "The rate with uniform attention.",
    "largest_alpha": "The largest alpha of any head.",
    "epsilon": "Threshold of alpha.",
    "reduce": "Per sample and then the mean, or of the mean alpha.",
    "tokens": "T, tokens of a prompt.",
    "bos": "Whether prompts begin with the tokenizer's BOS.",
    "dtype": "Of the model.",
    "n": "Number of prompts.",
    "condition": "Which prompts; of an edit: which keys, the sources or a control.",
    "key_norm": "Norm of the source's key over the median norm of the others.",
    "value_norm": "Norm of the source's value over the median norm of the others, before W_O.",
    "cosine": "Mean cosine of the source's key with the queries after it.",
    "cosine_others": "The same for all other keys.",
    "drain": "|W_O v| of the source over the mean of the other tokens.",
    "contribution": "Share of the head's output that comes from the source.",
    "dimension": "Of the residual stream.",
    "position": "Of the token.",
    "token": "What it says.",
    "emergence": "Layer whose output has it first.",
    "vanishing": "Layer behind the last whose output has it; missing: it stays.",
    "value": "Of the activation at its emergence, mean over prompts.",
    "ratio": "Largest size over the layer's median size.",
    "prompt": "Which prompt, from 0.",
    "prompts": "Share of the prompts that have it.",
    "threshold_ratio": "A massive activation is at least so many medians.",
    "threshold_magnitude": "And larger than this.",
    "mechanism": "keys: the sources; learned: a sink logit of the model; off_by_one: one that it has not; output: gates.",
    "gate": "Effective gate, 1 - mass of the sink: what is left for content.",
    "keys": "Number of keys edited.",
    "mass": "Share of the edited heads' attention that those keys held.",
    "delta_loss": "Change of the loss, nats a token; positive: worse.",
    "kl": "KL of the edited from the unedited prediction, nats.",
    "flip_rate": "Share of positions whose most likely token changed.",
    "excess": "delta_loss of the sources less that of the control, prompt by prompt.",
    "edit": "What was done to the attention.",
    "amount": "How much of it, 0 to 1.",
    "scope": "Which heads were edited.",
    "source_before": "Largest alpha among the sources.",
    "source_after": "The same after the edit.",
    "other_before": "Largest alpha among the other keys.",
    "other_after": "The same after the edit.",
    "other_key": "Position most often strongest after the edit.",
    "first": "First keys kept.",
    "last": "Last keys kept.",
    "kept": "Mean mass kept, over rows that lose a key.",
    "least_kept": "Of the head that keeps least.",
    "row_error": "Size of the change of a head's output in a row, over its size; mean over rows and heads.",
    "rms_error": "Root mean square of that change over all rows, over that of the outputs.",
    "largest_rms_error": "Of the head that changes most.",
}
