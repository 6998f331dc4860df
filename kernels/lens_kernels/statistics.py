"""The table of statistics: name, axes, definition, what it needs, how exact it is.

`P` is the exact probability matrix, `s` the logits after scale, softcap, bias and mask, natural
logarithms. A *seen row* is a query that sees at least one key. With a learned sink, `P` has the
sink in its denominator, so a row of `P` sums to 1 minus the sink's share; every sum runs over real
keys only (the entropy too: the sink's own `-p log p` is not in it).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from lens_kernels.arguments import check_names

Exactness = Literal["exact", "lower_bound", "upper_bound", "approx"]
"""How a number stands to the true one: equal, never above it, never below it, or near it."""

_ROW = ("batch", "heads", "queries")
_KEY = ("batch", "heads", "keys")
_MAP = ("batch", "heads", "query_blocks", "key_blocks")


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    Attributes:
        name: as given in `statistics=`.
        axes: names of its dimensions.
        definition: one line.
        needs: the argument of `attention` without which it cannot be computed, or None.
        sparse_exactness: what it is for the dense attention when a `block_mask` cut keys off.
        brings: the second name that comes along with it, or None.
        from_backward: filled by `backward()`.
    """

    name: str
    axes: tuple[str, ...]
    definition: str
    needs: str | None = None
    sparse_exactness: Exactness = "approx"
    brings: str | None = None
    from_backward: bool = False


_TABLE = (
    Statistic(
        "lse",
        _ROW,
        "log-sum-exp of the row, learned sink included; -inf for a row that sees no key",
        sparse_exactness="lower_bound",
    ),
    Statistic("max_logit", _ROW, "largest s of the row", sparse_exactness="lower_bound"),
    Statistic("entropy", _ROW, "-sum P log P over the real keys, nats"),
    Statistic("concentration", _ROW, "sum P^2; its inverse is the effective number of keys"),
    Statistic("distance", _ROW, "sum P * (anchor - key), tokens"),
    Statistic("prefix_mass", _ROW, "mass on the first `prefix` keys of the row's sequence"),
    Statistic(
        "match_mass",
        (*_ROW, "pairs"),
        "sum P [query label == key label], per pair of labels; negative labels never match",
        needs="match",
    ),
    Statistic("moments", (*_ROW, "2"), "E[j] and E[j^2] under P, j counted from the origin"),
    Statistic(
        "grid_moments",
        (*_ROW, "5"),
        "E[x], E[y], E[x^2], E[y^2] and mass under P of the image keys; other keys count nothing",
        needs="grid",
    ),
    Statistic("value_norm", _ROW, "norm of sum P v", brings="mean_value_norm"),
    Statistic("mean_value_norm", _ROW, "sum P norm(v), never below value_norm"),
    Statistic("received", _KEY, "column sum of P over the queries"),
    Statistic(
        "diagonal",
        ("batch", "heads", "distances"),
        "mass at each distance anchor - key, summed over the queries",
    ),
    Statistic("block_mass", _MAP, "sum of P in the block, mean over its seen rows"),
    Statistic("block_max", _MAP, "largest P in the block, 0 where none"),
    Statistic(
        "block_max_logit",
        _MAP,
        "largest s in the block, -inf where none",
        sparse_exactness="lower_bound",
    ),
    Statistic(
        "block_weighted",
        _MAP,
        "sum of P * key_weights in the block, mean over its seen rows",
        needs="key_weights",
    ),
    Statistic(
        "top_keys",
        ("batch", "heads", "query_blocks", "k"),
        "the key blocks of largest block_mass, strongest first, ties by lower index (int64)",
        brings="top_mass",
    ),
    Statistic(
        "top_mass",
        ("batch", "heads", "query_blocks", "k"),
        "block_mass of top_keys",
        brings="top_keys",
    ),
    Statistic(
        "block_attribution",
        _MAP,
        "after backward: sum of P * a in the block, a = dO . v (gradient x attention), signed",
        from_backward=True,
    ),
    Statistic(
        "row_attribution",
        _ROW,
        "after backward: dO . O = sum P * a, the row's importance",
        from_backward=True,
    ),
    Statistic(
        "block_influence",
        _MAP,
        "after backward: sum of P (dO . O - a) / (1 - P), the effect on the loss of masking each key "
        "alone and renormalising",
        from_backward=True,
    ),
    Statistic(
        "block_logit_gradient",
        _MAP,
        "after backward: sum of the gradient of the loss with respect to s, signed",
        from_backward=True,
    ),
    Statistic(
        "block_logit_gradient_abs",
        _MAP,
        "after backward: sum of the absolute gradient with respect to s",
        from_backward=True,
    ),
)

STATISTICS: dict[str, Statistic] = {entry.name: entry for entry in _TABLE}


def resolve_statistics(
    asked: str | Iterable[str],
    available: frozenset[str],
    table: Mapping[str, Statistic] = STATISTICS,
    of: str = "",
) -> frozenset[str]:
    """Names to compute, with the second names that they bring.

    Args:
        asked: "all" (everything that the given arguments allow, backward ones excepted) or names.
        available: names of the optional arguments that were given (`match`, `key_weights`, `grid`,
            and `gradients` when an input requires a gradient).
        table: what there is.
        of: what the message on an unknown name calls it, with a space in front.

    Raises:
        ValueError: for an unknown name, a name whose argument is missing, a plain string.
    """
    if isinstance(asked, str):
        if asked != "all":
            raise ValueError(
                f"statistics must be 'all' or a sequence of names, got the string {asked!r}; "
                f"write ({asked!r},)"
            )
        return frozenset(
            entry.name
            for entry in table.values()
            if not entry.from_backward and (entry.needs is None or entry.needs in available)
        )
    names = set()
    for name in asked if isinstance(asked, Iterable) else check_names("statistics", asked):
        if name not in table:
            close = difflib.get_close_matches(str(name), table, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(table)}"
            raise ValueError(f"unknown statistic {name!r}{of}; {hint}")
        entry = table[name]
        if entry.needs is not None and entry.needs not in available:
            raise ValueError(f"statistic {name!r} needs {entry.needs}=, which was not given")
        if entry.from_backward and "gradients" not in available:
            raise ValueError(
                f"statistic {name!r} comes from the backward pass, but no input requires a "
                "gradient; call query.requires_grad_() (and be outside torch.no_grad())"
            )
        names.add(name)
        if entry.brings is not None:
            names.add(entry.brings)
    return frozenset(names)
