"""What linear and recurrent mixers do, head by head, beside the softmax heads of the same model on the same windows."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

import lens
from lens.common.head_ids import head_columns
from lens.common.results import Sentence, ends
from lens.figures.mixers import mixer_heads
from lens.mixers.capturing import MixerCapture
from lens.models.loaded import LoadedModel
from lens.runs.headlines import Headline
from lens.runs.sections import Section
from lens.stats.intervals import columns, known_mean
from lens.stats.verdicts import mean_told
from lens.traces.trace import AttentionTrace
from lens_analyses.steps.columns import defined
from lens_analyses.steps.subject import Subject, block_of

_MOST_CELLS = 1_000_000  # in the tables of maps and of profiles
_MEANS = ("mass", "negative_share", "entropy", "distance", "first_share")
_HEAD = ["layer", "head", "name", "mixer"]


def mixers(subject: Subject) -> Section:
    """Every mixer head and every softmax head in one table, maps of their blocks, and how weights fall with distance."""
    return measured(
        subject.model, subject.text_windows, subject.length, subject.settings.block, subject.seed
    )


def measured(
    model: LoadedModel, windows: Sequence[list[int]], length: int, block: int, seed: int
) -> Section:
    """The section of a model on these windows, whose softmax heads stand beside where it has any.

    Raises:
        LensError: as `lens.mixers.capture`.
    """
    size = block_of(length, block)
    found: list[MixerCapture] = []
    traces: list[AttentionTrace | None] = []
    for ids in windows:
        found.append(lens.mixers.capture(model, ids, block=size, progress=False))
        attends = bool(model.info.attending)
        traces.append(
            lens.capture(model, ids, block_size=size, progress=False) if attends else None
        )
    pairs = list(zip(found, traces, strict=True))
    each = [one.table(trace, seed=seed) for one, trace in pairs]
    heads = _over_windows(each, seed)
    tables = {"heads": heads}
    limits = [
        "Phi is over what a scan reads: behind the short convolution and its activation, where there is one, so that "
        "key j stands for the tokens j - K + 1 to j; gate and norm behind the scan are not in it.",
        f"Windows of {length} tokens: a decay that is slower than a window shows in half_life alone.",
        "A share of negative mass says nothing of its use: entropy, distance and first_share are of absolute values.",
    ]
    for name, made in (("maps", _maps), ("profiles", _profiles)):
        table = made(found[0], traces[0])
        if len(table) <= _MOST_CELLS:
            tables[name] = table
        else:
            limits.append(f"The table of {name} is left out: {len(table):,} rows.")
    return Section(
        name="mixers",
        title="Linear and recurrent mixers"
        + " beside softmax attention" * bool(model.info.attending),
        summary=_said(heads, each, length, seed),
        limits=tuple(limits),
        columns=defined(tables.values(), _COLUMNS),
        configuration={
            "block_size": size,
            "length": length,
            "windows": len(found),
            "check": {f"L{one.layer}": one.check for one in found[0].measures},
            "seed": seed,
        },
        tables=tables,
        figures={"heads": mixer_heads(heads, (length - 1) / 4)},
        headlines=tuple(_headlines(heads, (length - 1) / 4)),
    )


def _over_windows(tables: list[pd.DataFrame], seed: int) -> pd.DataFrame:
    """One row per head: means over windows with intervals; a half-life, which may be infinite, is a median."""
    first = tables[0]
    table: dict[str, Any] = {name: first[name] for name in _HEAD}
    for name in _MEANS:
        table |= columns(name, np.stack([one[name].to_numpy(float) for one in tables], 1), seed)
    for name, of in (("half_life", np.median), ("rank", np.mean), ("check", np.max)):
        table[name] = of(np.stack([one[name].to_numpy(float) for one in tables]), 0)
    return pd.DataFrame(table).assign(n=len(tables))


def _maps(found: MixerCapture, trace: AttentionTrace | None) -> pd.DataFrame:
    """Block maps of the first window, with sign and of absolute values."""
    parts = [_cells(one.layer, one.kind, one.block_mass, one.block_size) for one in found.measures]
    for layer in () if trace is None else trace.layers:
        assert trace is not None
        masses = trace.block_mass.sel(layer=layer).values.astype(float)
        parts.append(_cells(layer, "softmax", masses, masses))
    return pd.concat(parts, ignore_index=True)


def _cells(layer: int, kind: str, mass: np.ndarray, size: np.ndarray) -> pd.DataFrame:
    """[heads, blocks, blocks] as rows of the blocks that a causal head sees."""
    heads, blocks = mass.shape[:2]
    at = np.tril_indices(blocks)
    return _of_heads(layer, kind, heads, len(at[0])).assign(
        query_block=np.tile(at[0], heads),
        key_block=np.tile(at[1], heads),
        signed=mass[:, at[0], at[1]].ravel(),
        absolute=size[:, at[0], at[1]].ravel(),
    )


def _profiles(found: MixerCapture, _: AttentionTrace | None) -> pd.DataFrame:
    """Mean of Phi and of its absolute value at each distance, of the first window."""
    parts = []
    for one in found.measures:
        heads, length = one.profile.shape
        parts.append(
            _of_heads(one.layer, one.kind, heads, length).assign(
                tokens_back=np.tile(np.arange(length), heads),
                signed=one.profile.ravel(),
                absolute=one.profile_size.ravel(),
            )
        )
    return pd.concat(parts, ignore_index=True)


def _of_heads(layer: int, kind: str, heads: int, times: int) -> pd.DataFrame:
    """The columns that say whose a row is, of so many rows a head."""
    named = pd.DataFrame(head_columns((layer, head) for head in range(heads))).assign(mixer=kind)
    return named.loc[named.index.repeat(times), _HEAD].reset_index(drop=True)


def _said(
    heads: pd.DataFrame, each: list[pd.DataFrame], length: int, seed: int
) -> tuple[Sentence, ...]:
    """Which mixers there are, whether Phi is what they do, and how they differ from softmax heads.

    Args:
        heads: over windows; each: of each window, whose means over heads have an interval over windows.
    """

    def told(column: str, form: str, of: pd.Series) -> str:
        members = of.to_numpy()
        means = [known_mean(one[column].to_numpy(float)[members]) for one in each]
        return mean_told(np.array(means, float), seed, form)

    is_soft = heads["mixer"] == "softmax"
    own, soft = heads[~is_soft], heads[is_soft]
    kinds = own.groupby("mixer", sort=False).agg(
        layers=("layer", "nunique"), heads=("name", "size")
    )
    named = "; ".join(
        f"{kind}: {row['heads']} heads in {row['layers']} layer{'s' * bool(row['layers'] > 1)}"
        for kind, row in kinds.iterrows()
    )
    said = [
        Sentence(
            f"{named}{f'; beside {len(soft)} softmax heads' if len(soft) else ''}. Phi v is each layer's own output to "
            f"{own['check'].max():.0e} of its largest value.",
            kind="check",
        )
    ]
    for kind in kinds.index:
        of = heads["mixer"] == kind
        half = heads.loc[of, "half_life"].median()
        decay = "" if np.isnan(half) else f", half-life {_tokens(half)} in the median head"
        beside = f"softmax heads {told('distance', '.1f', is_soft)}, " if len(soft) else ""
        said.append(
            Sentence(
                f"{kind} looks {told('distance', '.1f', of)} tokens back on average, {beside}"
                f"uniform attention {(length - 1) / 4:.1f}; {told('negative_share', '.1%', of)} "
                f"of its absolute mass is negative{decay}.",
                kind="distance",
            )
        )
    uniform = float(np.mean(1 / np.arange(1, length + 1)))
    beside = f" and {told('first_share', '.1%', is_soft)} of softmax heads" if len(soft) else ""
    said.append(
        Sentence(
            f"The first key holds {told('first_share', '.1%', ~is_soft)} of the absolute mass of mixer heads"
            f"{beside}; uniform attention gives it {uniform:.1%}.",
            kind="sink",
        )
    )
    if len(each) == 1:
        said.append(Sentence("One window has no interval.", kind="limit"))
    return tuple(said)


def _headlines(heads: pd.DataFrame, uniform: float) -> Iterator[Headline]:
    """Of each kind of mixer the head that looks least far, beside uniform attention."""
    of_kind = dict(iter(heads.groupby("mixer", sort=False)))
    soft = of_kind.pop("softmax", heads.iloc[:0])["distance"].min()
    also = "" if np.isnan(soft) else f", the nearest softmax head {soft:.3g}"
    for kind, rows in of_kind.items():
        if rows["distance"].isna().all():
            continue
        row: dict[Any, Any] = rows.loc[[rows["distance"].idxmin()]].to_dict("records")[0]
        yield Headline(
            f"{row['name']} ({kind}) looks least far: {row['distance']:.3g}"
            f"{ends(row['distance_low'], row['distance_high'])} tokens back, uniform attention {uniform:.1f}{also}.",
            row["distance"],
            row["distance_low"],
            row["distance_high"],
            uniform,
            "uniform attention",
            unit="tokens",
            figure="heads",
            many=len(rows),
            units=int(row.get("n", 0)),
        )


def _tokens(count: float) -> str:
    return "without end (no decay)" if np.isinf(count) else f"{count:.1f} tokens"


_COLUMNS = {
    "layer": "Layer, by the model's own number.",
    "head": "Head of the mixer, from 0; of Mamba, RG-LRU, RWKV-4 and short convolutions the channel.",
    "name": "Layer and head.",
    "mixer": "What the head is: softmax, or the kind of mixer.",
    "n": "Windows of text.",
    "mass": "Mean over rows of the sum of Phi, with its sign; 1 of softmax.",
    "negative_share": "Of all absolute mass, the share below 0.",
    "entropy": "Of |Phi| with rows divided by their sum, nats, mean over rows.",
    "distance": "Tokens back, weighted by |Phi|, mean over rows.",
    "first_share": "Share of |Phi| on the first key, mean over rows: the sink share.",
    "half_life": "Tokens after which a weight has halved by decay alone, median; infinite without decay, NaN where there is none.",
    "rank": "Effective rank of tiles below the diagonal: exp of the entropy of their singular values; NaN of softmax.",
    "check": "Largest difference of Phi v from the layer's own output, over its largest value.",
    "query_block": "Block of queries of the first window, from 0.",
    "key_block": "Block of keys, from 0.",
    "signed": "Mass of the block with its sign, mean over its queries; of a profile the mean of Phi at that distance.",
    "absolute": "The same of absolute values.",
    "tokens_back": "Distance of key and query.",
}
