"""Sums over the rows of one prompt that make every pair of heads comparable.

Each function takes two states of equal length (the same one twice, or those of two prompts for a noise
floor) and returns float64 [heads, heads]. Memory is that of one chunk of rows of all heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lens.common.errors import LensError
from lens.heads.likeness.states import HeadStates

SMOOTHING = 1e-3  # share of the uniform row in a log-odds, so that a key with no mass has one
_CHUNK = 1 << 22  # probabilities of all heads that are in memory at a time
_FEWEST = 4  # rows that the unbiased estimate of dependence needs


def divergence(left: HeadStates, right: HeadStates) -> tuple[Tensor, Tensor]:
    """Sum over rows of the Jensen-Shannon divergence in nats, and the number of rows, [heads, heads].

    `JS(a, b) = H((a + b) / 2) - (H(a) + H(b)) / 2`, H the entropy; in [0, ln 2]. Rows in which a head
    sees no key are left out of its pairs.
    """
    heads = len(left.output)
    sums = torch.zeros(heads, heads, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    same = left is right
    for rows in _chunks(left):
        a = left.rows(rows)
        b = a if same else right.rows(rows)
        own_a, own_b = _entropy(a), _entropy(b)  # [heads, rows]
        seen_a, seen_b = ((p.sum(-1) > 0).double() for p in (a, b))
        for head in range(heads):
            first = head if same else 0
            mixed = _entropy((a[head] + b[first:]) / 2)
            js = (mixed - (own_a[head] + own_b[first:]) / 2).clamp(min=0)
            both = seen_a[head] * seen_b[first:]
            sums[head, first:] += (js * both).sum(-1)
            counts[head, first:] += both.sum(-1)
    if same:
        sums, counts = (tensor.triu() + tensor.triu(1).T for tensor in (sums, counts))
    return sums, counts


def log_odds(left: HeadStates, right: HeadStates) -> Tensor:
    """Inner products of the heads' log-odds against the uniform row, over all rows and keys.

    `x_ij = log(n_i (0.999 A_ij + 0.001 / n_i))`, n_i the number of keys that query i sees in the layer of the head;
    0 at the others. Cosines are these products over the roots of those of each head with itself.
    """
    products = torch.zeros(len(left.output), len(right.output), dtype=torch.float64)
    for rows in _chunks(left):
        x = _log_odds(left.rows(rows), left.keys_seen(rows))
        y = x if left is right else _log_odds(right.rows(rows), right.keys_seen(rows))
        products += x @ y.T
    return products


def dependence(left: HeadStates, right: HeadStates) -> Tensor:
    """Unbiased HSIC with linear kernels between the outputs of the heads; CKA is its cosine.

    With `K = X X^T` and `L = Y Y^T` over the n rows of X and Y, their diagonals set to 0,

        [tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2)] / (n (n - 3))

    (Song et al., 2012, JMLR 13). It is 0 on average for independent heads, also where rows are fewer
    than dimensions. K is never built: all terms follow from `X^T Y`, row norms and column sums.

    Raises:
        LensError: fewer than four rows.
    """
    first, n = left.first_row, left.length - left.first_row
    if n < _FEWEST:
        raise LensError(
            f"CKA needs {_FEWEST} rows of each prompt and {left.length} tokens leave {n}; take longer "
            "prompts, or method='js'"
        )
    x, own_x, sums_x = _features(left.output[:, first:])
    y, own_y, sums_y = _features(right.output[:, first:])
    across = torch.stack([_squares(head, y) for head in x]) - own_x @ own_y.T  # tr(K L)
    total_x, total_y = sums_x.sum(1), sums_y.sum(1)
    whole = torch.outer(total_x, total_y) / ((n - 1) * (n - 2))
    return (across + whole - 2 * (sums_x @ sums_y.T) / (n - 2)) / (n * (n - 3))


def _features(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centred outputs, their squared row norms, and row sums of `X X^T` without its diagonal."""
    x = output - output.mean(1, keepdim=True)
    norms = x.square().sum(-1)
    return x, norms, (x @ x.sum(1)[..., None])[..., 0] - norms


def _squares(head: Tensor, others: Tensor) -> Tensor:
    """[heads]: squared Frobenius norm of `X^T Y` with X [rows, dim] and each Y."""
    return (head.T @ others).square().sum((1, 2))


def _log_odds(p: Tensor, seen: Tensor) -> Tensor:
    """[heads, rows × keys] log-odds; 0 at keys that are not seen."""
    p = p[..., : seen.shape[-1]]  # a learned sink's share has no uniform to compare with
    counts = seen.sum(-1, keepdim=True)
    odds = ((1 - SMOOTHING) * p * counts + SMOOTHING).log()
    return odds.masked_fill(~seen | (p.sum(-1, keepdim=True) == 0), 0).flatten(1)


def _entropy(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)


def _chunks(states: HeadStates) -> Iterator[slice]:
    """The rows that can differ, a few at a time."""
    size = max(1, _CHUNK // (len(states.output) * states.length))
    for start in range(states.first_row, states.length, size):
        yield slice(start, min(start + size, states.length))
