"""Where attention is parked, how a sink works, and whether it matters: detection, mechanism, edits."""

import pandas as pd

import lens
from lens import sinks
from lens.figures.sink_mechanism import mass_and_value
from lens.head_ids import HeadId
from lens.sections import Section
from lens.sinks.detection import SinkRate
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject

_LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def detection(subject: Subject) -> Section:
    """Which keys are sinks, in how many heads, from which layer on; and on random tokens."""
    texts = subject.text_windows
    traces = lens.capture(subject.model, texts, statistics=["received"], progress=False)
    rate, profile = sinks.rate(traces), sinks.profile(traces)
    lengths = [length for length in _LENGTHS if length <= len(texts[0])]
    kinds = {"text": texts, **sinks.control_prompts(subject.model, texts, subject.seed)}
    emergence = sinks.emergence(subject.model, kinds, seed=subject.seed)
    growth = sinks.emergence(
        subject.model, sinks.by_length(subject.model, texts, lengths), seed=subject.seed
    )
    sensitivity = sinks.sensitivity(traces)
    tables = {
        "heads": rate.table(),
        "positions": profile.table(),
        "epsilon": sensitivity.table(),
        "layers": emergence.table(),
        "lengths": growth.table(),
    }
    return Section(
        name="detection",
        title="Sinks: where attention is parked",
        summary=(
            _rate_in_words(rate),
            _positions(profile),
            *emergence.findings()[1:-1],
            *growth.findings()[:-1],
        ),
        limits=(
            f"Every number is for ε = {rate.epsilon}, T = {rate.samples.tokens} tokens, BOS "
            f"{rate.samples.bos}, n = {rate.samples.n}; rates compare only where these agree.",
            "The sink depends on which token comes first, and not on its being a BOS: another first token, "
            "or a chat template, can move it.",
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
            "positions": profile.plot(),
            "epsilon": sensitivity.plot(),
            "layers": emergence.plot(),
            "lengths": growth.plot(),
        },
    )


def mechanism(subject: Subject) -> Section:
    """Why heads look there, and what they get: keys, values, massive activations, gates."""
    texts = subject.text_windows
    geometry = sinks.mechanism(subject.model, texts).table()
    found = sinks.massive(subject.model, texts)
    gates = sinks.effective_gate(subject.model, texts, seed=subject.seed)
    tables = {"heads": geometry, "massive": found.table(), "gates": gates.table()}
    figures = {"massive": found.plot(), "mass_and_value": mass_and_value(geometry)}
    return Section(
        name="mechanism",
        title="Sinks: how they work",
        summary=(_drain(geometry), *found.findings(), *gates.findings()),
        limits=(
            "Norms and cosines are of the key and query vectors as they meet; they describe, and prove no cause.",
            "A layer's massive activations are named by thresholds; the largest value is stated where none passes.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "ratio": found.ratio, "magnitude": found.magnitude},
        tables=tables,
        figures=figures,
    )


def effects(subject: Subject) -> Section:
    """The sink edited away, beside controls of the same size, mass and position; where mass moves."""
    texts = subject.text_windows
    strongest = _strongest(subject)
    found = []
    for edit in (name.strip() for name in subject.settings.edits.split(",")):
        found.append(sinks.effect(subject.model, texts, edit=edit, seed=subject.seed))
    found += [
        sinks.effect(
            subject.model,
            texts,
            edit="mask",
            heads=[strongest],
            controls=("mass",),
            seed=subject.seed,
        ),
        sinks.effect(
            subject.model,
            texts,
            edit="mask",
            layers=[strongest.layer],
            controls=("mass",),
            seed=subject.seed,
        ),
        sinks.head_effect(subject.model, texts, heads=[strongest], seed=subject.seed),
    ]
    massive = sinks.massive(subject.model, texts)
    if len(massive.rows):
        found.append(sinks.massive_effect(subject.model, texts, massive, seed=subject.seed))
    tables = {
        "edits": pd.concat([one.table() for one in found], ignore_index=True),
        "migration": pd.concat(
            [one.migration.assign(edit=one.edit, scope=one.scope) for one in found],
            ignore_index=True,
        ),
    }
    return Section(
        name="effects",
        title="Sinks: do they matter?",
        summary=tuple(_in_short(one) for one in found),
        limits=(
            "A small change of loss does not prove that a sink is of no use: attention moves to the next key, "
            "as the migration table says.",
            "The mass control edits ordinary keys that hold as much attention together; where a prompt has "
            "no such keys its own column mass says how much it reached.",
        ),
        columns=defined(tables.values(), COLUMNS),
        configuration={"sources": "first", "edits": subject.settings.edits, "head": str(strongest)},
        tables=tables,
        figures={
            **{f"edit_{number}": one.plot("excess") for number, one in enumerate(found)},
            "migration": found[0].plot_migration(),
        },
    )


def dose(subject: Subject) -> Section:
    """How the effect grows with the amount that is taken from the sink."""
    amounts = subject.amounts
    found = sinks.dose_response(
        subject.model, subject.text_windows, amounts=amounts, seed=subject.seed
    )
    table = found.table()
    rows = table[table["condition"] == "sources"]
    shown = "; ".join(
        f"{row['amount']:g}: {row['delta_loss']:+.4f} [{row['delta_loss_low']:+.4f}, {row['delta_loss_high']:+.4f}]"
        for row in rows.to_dict("records")
    )
    return Section(
        name="dose",
        title="Sinks: dose and response",
        summary=(f"Change of the loss in nats a token by the share masked: {shown}.",),
        limits=("The same control keys are edited at every amount.",),
        columns=defined([table], COLUMNS),
        configuration={"amounts": list(amounts), "edit": "mask", "sources": "first"},
        tables={"curve": table},
        figures={"curve": found.plot()},
    )


def streaming(subject: Subject) -> Section:
    """What a cache of the first few and the last keys keeps, and what the windowed run costs."""
    texts = subject.text_windows
    length = len(texts[0])
    windows = sorted({max(1, length // 8), max(1, length // 4)})
    found = sinks.streaming(
        subject.model, texts, n_sink=(0, 1, 4), window=windows, seed=subject.seed
    )
    table = found.table()
    return Section(
        name="streaming",
        title="Sinks: a cache of the first and the last keys",
        summary=tuple(found.findings()[:-1]),
        limits=(found.findings()[-1],),
        columns=defined([table], COLUMNS),
        configuration={"n_sink": [0, 1, 4], "window": windows},
        tables={"policies": table},
        figures={"policies": found.plot()},
    )


def _strongest(subject: Subject) -> HeadId:
    """The head whose first token receives most."""
    table = subject.run.section("detection").tables["heads"]
    row = table.sort_values("alpha", ascending=False, kind="stable").iloc[0]
    return HeadId(int(row["layer"]), int(row["head"]))


def _in_short(effect: sinks.SinkEffect) -> str:
    """What the edit does, and whether that is more than editing as much attention elsewhere does."""
    sentences = effect.findings()
    control = [
        text for text in sentences if "the mass control" in text or "the size control" in text
    ]
    moved = [text for text in sentences if "alpha rose" in text]
    return " ".join((sentences[0], *control[-1:], *moved))


def _rate_in_words(rate: SinkRate) -> str:
    table = rate.table().sort_values("alpha", ascending=False, kind="stable")
    top = ", ".join(
        f"L{row['layer']:.0f}H{row['head']:.0f} {row['alpha']:.2f}"
        for row in table.head(3).to_dict("records")
    )
    return (
        f"The first token is a sink in {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] of heads (ε = "
        f"{rate.epsilon}, T = {rate.samples.tokens}, BOS {rate.samples.bos}, n = {rate.samples.n}); it "
        f"receives most in {top} (mean α)."
    )


def _positions(profile: sinks.SinkProfile) -> str:
    others = [key for key in profile.common() if key]
    if not others:
        return "No other position is a sink in common."
    return f"Other positions that are sinks in common: {', '.join(map(str, others[:8]))}."


def _drain(geometry: pd.DataFrame) -> str:
    heads = geometry[geometry["alpha"] > 0.3]
    if not len(heads):
        return "No head has a sink on the first token (mean α above 0.3), so there is no mechanism to explain."
    return (
        f"In the {len(heads)} heads with a sink on the first token its key is {heads['key_norm'].median():.2f} "
        f"times as long as the others' median, its cosine with the queries {heads['cosine'].median():.2f} "
        f"against {heads['cosine_others'].median():.2f}, and what it writes {heads['drain'].median():.2f} times "
        "as large as what other tokens write (medians over those heads)."
    )


COLUMNS = {
    "layer": "Layer, from 0; missing: all layers together.",
    "head": "Head in the layer, from 0.",
    "key": "Position of the key.",
    "rate": "Share of heads (and prompts) in which the key is a sink: alpha > epsilon (Gu et al., arXiv 2410.10781).",
    "low": "Low end of the 95 % interval over prompts.",
    "high": "High end of the 95 % interval over prompts.",
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
    "n_sink": "First keys kept.",
    "window": "Last keys kept.",
    "kept": "Mean mass kept, over rows that lose a key.",
    "least_kept": "Of the head that keeps least.",
    "error": "Size of the change of a head's output over its size.",
    "largest_error": "Of the head that changes most.",
}
