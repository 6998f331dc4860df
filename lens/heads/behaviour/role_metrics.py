"""Role metrics that need more than a trace: name, label, definition and unit, as in `lens.traces.metrics`."""

from lens.traces.metrics import METRICS, Metric

_TABLE = (
    Metric(
        "segment",
        "Same sentence",
        "Mean over queries i >= 1 of the mass on the keys of the query's own sentence, itself included; sentences end with . ! ? or a line break.",
        "probability",
        True,
    ),
    Metric(
        "confidence",
        "Largest weight",
        "Mean over queries i >= 1 of max_j P[i, j].",
        "probability",
        False,
        "Voita et al. 2019, arXiv 1905.09418",
    ),
    Metric(
        "normalized_entropy",
        "Row entropy",
        "Mean over queries that see two keys or more of -sum_j P[i, j] ln P[i, j] / ln(keys seen); 1 is uniform.",
        "probability",
        True,
        "Guo et al. 2024, arXiv 2410.13835",
    ),
    Metric(
        "first_column_entropy",
        "Column entropy of the first key",
        "Entropy of P[:, 0] / sum_i P[i, 0] over the queries, divided by ln(queries that see key 0); 1 when all look at it alike.",
        "probability",
        False,
        "Guo et al. 2024, arXiv 2410.13835",
    ),
    Metric(
        "activity",
        "Activity",
        "1 - mean over queries i >= 1 of P[i, 0]; near 0 for a head that rests on the first key.",
        "probability",
        False,
        "Guo et al. 2024, arXiv 2410.13835",
    ),
    Metric(
        "output_norm",
        "Output norm",
        "Mean over queries of the norm of what the head adds to the residual stream, o_i W_O.",
        "norm",
    ),
    Metric(
        "noop",
        "Output over input",
        "Mean of |o_i W_O| / mean of |x_i|, x the residual stream that enters the layer; near 0 for a head that does nothing.",
        "ratio",
        False,
        "after Bondarenko et al. 2023, arXiv 2306.12929",
    ),
    Metric(
        "drain",
        "Value drain",
        "|W_O v_0| of the first key / mean of |W_O v_t| over the other keys; below 1 where the sink's value is small.",
        "ratio",
        False,
        "Guo et al. 2024, arXiv 2410.13835",
    ),
    Metric(
        "drain_value",
        "Value drain (before W_O)",
        "|v_0| of the first key / mean of |v_t| over the other keys.",
        "ratio",
    ),
    Metric(
        "first_contribution",
        "First key's contribution",
        "Mean over queries i >= 1 of P[i, 0] |W_O v_0| / sum_t P[i, t] |W_O v_t|.",
        "probability",
        False,
        "Kobayashi et al. 2020, arXiv 2004.10102",
    ),
)

ROLE_METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}
COLUMNS: dict[str, Metric] = METRICS | ROLE_METRICS
"""Every metric of `lens.heads.roles`."""
