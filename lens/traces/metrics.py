"""The head metrics that the project knows: name, label, definition and unit.

One table serves the profile, the run folder, the report and the dashboard; it needs no torch.
A metric has the variant ``sink_excluded`` where a sink could dominate it: the same definition on each
row restricted to the keys from 1 on and renormalised (a share of all attention is renormalised as a
whole). Learned sinks are no keys: they take their share of raw scores and none of the sink-excluded
ones. Means run over the queries that can show the pattern within their mask (causal, sliding window);
what no query can show is NaN with a reason.
"""

from dataclasses import dataclass

from lens.common.errors import LensError


@dataclass(frozen=True)
class Metric:
    """One score of a head.

    Attributes:
        name: column name in the profile and in ``heads.parquet``.
        label: for axes and tables.
        definition: one sentence with formula; P is the attention probability matrix.
        unit: ``probability``, ``nats``, ``tokens``, ``keys`` or ``position``.
        sink_excluded: whether the variant ``sink_excluded`` exists beside ``raw``.
        source: where the definition comes from.
    """

    name: str
    label: str
    definition: str
    unit: str
    sink_excluded: bool = False
    source: str = ""


_TABLE = (
    Metric(
        "previous_token",
        "Previous token",
        "Mean over queries i >= 1 of P[i, i-1].",
        "probability",
        True,
        "TransformerLens head_detector; Olsson et al. 2022, arXiv 2209.11895",
    ),
    Metric(
        "duplicate_token",
        "Duplicate token",
        "Mean mass on earlier keys that hold the query's own token (itself excluded), over the queries that see one; on other keys, earlier or later, in models that look ahead.",
        "probability",
        True,
        "TransformerLens head_detector; Wang et al. 2022, arXiv 2211.00593",
    ),
    Metric(
        "induction",
        "Induction",
        "Mean mass on keys j <= i whose preceding token equals the query's token, over the queries that see one; not defined in models that look ahead.",
        "probability",
        True,
        "Olsson et al. 2022, arXiv 2209.11895",
    ),
    Metric(
        "current_token",
        "Current token",
        "Mean over queries i >= 1 of P[i, i].",
        "probability",
        True,
    ),
    Metric(
        "first_token",
        "First token",
        "Mean over queries i >= 1 of P[i, 0].",
        "probability",
    ),
    Metric(
        "prefix_mass",
        "Prefix mass",
        "Mean mass on the first four keys, over the queries that see more than those, all of a model that looks ahead.",
        "probability",
    ),
    Metric(
        "entropy",
        "Entropy",
        "Mean over queries i >= 1 of -sum_j P[i, j] ln P[i, j].",
        "nats",
        True,
    ),
    Metric(
        "effective_keys",
        "Effective keys",
        "Mean over queries i >= 1 of 1 / sum_j P[i, j]^2.",
        "keys",
    ),
    Metric(
        "distance",
        "Mean distance",
        "Mean over queries i >= 1 of sum_j P[i, j] (i - j); negative for a head that looks ahead.",
        "tokens",
        True,
    ),
    Metric(
        "locality",
        "Locality",
        "Share of all attention at distances |i - j| <= 8; without the sink, of that on keys from 1 on.",
        "probability",
        True,
    ),
    Metric(
        "positional",
        "Fixed distance",
        "Largest over distances d of the mean over queries of P[i, i - d], at distances that 16 queries have.",
        "probability",
    ),
    Metric(
        "positional_distance",
        "Its distance",
        "The distance d of the score before; negative for a head that looks ahead.",
        "tokens",
    ),
    Metric(
        "delimiter",
        "Delimiters",
        "Share of all attention on keys that are punctuation or a line break; without the sink, of that on keys from 1 on.",
        "probability",
        True,
        "Clark et al. 2019, arXiv 1906.04341",
    ),
    Metric(
        "sink_rate",
        "Sink rate",
        "1 if key 0 receives alpha_0 = received[0] / visible[0] > 0.3, else 0; over prompts, the share of them.",
        "probability",
        False,
        "Gu et al. 2024, arXiv 2410.10781",
    ),
    Metric(
        "sink_mass",
        "Sink mass",
        "alpha_0 = received[0] / visible[0]: mean attention that key 0 receives from the queries that see it, itself included.",
        "probability",
        False,
        "Gu et al. 2024, arXiv 2410.10781",
    ),
    Metric(
        "top_key",
        "Strongest key",
        "Position with the largest alpha_k = received[k] / visible[k] among keys seen by at least 16 queries.",
        "position",
    ),
    Metric(
        "top_key_mass",
        "Strongest key's mass",
        "alpha at the strongest key.",
        "probability",
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}


def metric_of(name: str) -> Metric:
    """The metric of that name; of a user's own what its name says, without a unit."""
    if not isinstance(name, str):
        raise LensError(f"a metric is named by its word, got {name!r}")
    return METRICS.get(name) or Metric(name, name, "", "no unit", True)


VARIANTS = ("raw", "sink_excluded")
HEADLINES = ("induction", "sink_mass", "previous_token", "duplicate_token")
"""Those by which heads are counted."""
MAIN = (
    *("previous_token", "duplicate_token", "induction", "first_token", "sink_mass"),
    *("entropy", "effective_keys", "distance", "top_key_token"),
)
"""Columns that a profile shows beside name, layer and head where not all are asked for."""
HEADLINE_STATISTICS = ("first_mass", "rest_mass", "match_mass")
"""Statistics of a trace that those need."""
