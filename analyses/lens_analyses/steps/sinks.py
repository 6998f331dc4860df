"""Where attention is parked and how a sink works: detection, mechanism, dark directions."""

import lens
from lens import sinks
from lens.common.results import of_kind
from lens.runs.sections import Section
from lens.sinks.detection.alphas import as_list
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject

_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
_BANDS, _FEW = 10, 3  # bands of the spectrum, and prompts that each is tried on


def detection(subject: Subject) -> Section:
    """Which keys are sinks, in how many heads, from which layer on; and on random tokens."""
    texts = subject.text_windows
    traces = as_list(lens.capture(subject.model, texts, statistics=["received"], progress=False))
    rate, profile = sinks.rate(traces), sinks.profile(traces)
    keys = sinks.find(traces[0])
    lengths = [length for length in _LENGTHS if length <= len(texts[0])]
    kinds = {"text": texts, **sinks.control_prompts(subject.model, texts, subject.seed)}
    emergence = sinks.emergence(subject.model, kinds, seed=subject.seed)
    growth = sinks.emergence(
        subject.model, sinks.by_length(subject.model, texts, lengths), seed=subject.seed
    )
    sensitivity = sinks.sensitivity(traces)
    tables = {
        "heads": rate.table(),
        "keys": keys.table(),
        "positions": profile.table(),
        "epsilon": sensitivity.table(),
        "layers": emergence.table(),
        "lengths": growth.table(),
    }
    (unjudged,) = of_kind(keys.findings(), "limit")
    return Section(
        name="detection",
        title="Sinks: where attention is parked",
        summary=(
            *of_kind(rate.findings(), "rate", "heads"),
            *of_kind(profile.findings(), "positions"),
            *of_kind(emergence.findings(), "rate"),
            *of_kind(growth.findings(), "rate"),
        ),
        limits=(
            f"Every number is for ε = {rate.epsilon}, T = {rate.samples.tokens} tokens, BOS "
            f"{rate.samples.bos}, n = {rate.samples.n}; rates compare only where these agree.",
            f"The table of keys is of the first prompt alone. {unjudged}",
            "Sinks hang on what comes first: another first token, or a chat template, can move them. Whether "
            "it must be the BOS token is measured with and without it, below.",
            "Where attention is parked says nothing about what it does: see the edits.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={
            "epsilon": rate.epsilon,
            "tokens": rate.samples.tokens,
            "bos": rate.samples.bos,
        },
        tables=tables,
        figures={
            "grid": rate.plot(),
            "keys": keys.plot(),
            "positions": profile.plot(),
            "epsilon": sensitivity.plot(),
            "layers": emergence.plot(),
            "lengths": growth.plot(),
        },
    )


def mechanism(subject: Subject) -> Section:
    """Why heads look there, and what they get: keys, values, massive activations, gates."""
    texts = subject.text_windows
    geometry = sinks.mechanism(subject.model, texts)
    found = sinks.massive(subject.model, texts)
    gates = sinks.effective_gate(subject.model, texts, seed=subject.seed)
    tables = {"heads": geometry.table(), "massive": found.table(), "gates": gates.table()}
    figures = {"massive": found.plot(), "mass_and_value": geometry.plot(), "gates": gates.plot()}
    return Section(
        name="mechanism",
        title="Sinks: how they work",
        summary=(*geometry.findings()[:-1], *found.findings(), *gates.findings()),
        limits=(
            "Norms and cosines are of the key and query vectors as they meet; they describe, and prove no cause.",
            "A layer's massive activations are named by thresholds; the largest value is stated where none passes.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "ratio": found.ratio, "magnitude": found.magnitude},
        tables=tables,
        figures=figures,
    )


def spectrum(subject: Subject) -> Section:
    """What the bands of the unembedding's spectrum are read and written by, and worth."""
    texts = subject.text_windows[:_FEW]
    energies = sinks.band_energies(subject.model, count=_BANDS)
    losses = sinks.band_losses(subject.model, texts, count=_BANDS, seed=subject.seed)
    mean = energies.groupby(["weight", "band"], as_index=False)["energy"].mean()
    dark = mean[mean["band"] == _BANDS - 1].set_index("weight")["energy"]
    shares = ", ".join(f"{name} {share:.1%}" for name, share in dark.items())
    tables = {"losses": losses.table(), "energies": mean}
    return Section(
        name="spectrum",
        title="Sinks: dark directions",
        summary=(
            *losses.findings(),
            f"Share of the weights in the darkest of {_BANDS} bands, mean over heads: {shares} (by "
            f"chance {1 / _BANDS:.0%}).",
        ),
        limits=(
            "Bands are of the unembedding's singular directions, strongest first (arXiv 2402.09221).",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"bands": _BANDS, "prompts": len(texts)},
        tables=tables,
        figures={"losses": losses.plot()},
    )


COLUMNS = {
    "layer": "Layer, from 0; missing: all layers together.",
    "name": "The head.",
    "head": "Head in the layer, from 0.",
    "key": "Position of the key.",
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
    "alpha": "Mean attention that the key receives from the queries that see it.",
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
    "vanishing": "First later layer whose output has it no more; missing: it stays.",
    "value": "Of the activation at its emergence, mean over prompts.",
    "ratio": "Largest size over the layer's median size.",
    "prompts": "Share of the prompts that have it.",
    "threshold_ratio": "A massive activation is at least so many medians.",
    "threshold_magnitude": "And larger than this.",
    "mechanism": "keys: the sources; learned: a sink logit of the model.",
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
