"""Each refusal: its type, and a text that says what was expected, what came and what to do."""

import numpy as np
import pytest
import torch
from lens_kernels import AttentionMask, attention, tile

from tests.kernels.helpers import tensors

M = AttentionMask
QUERIES, KEYS, HEADS = 7, 11, 4
META = torch.device("meta")


def call(query=None, key=None, value=None, **options):
    q, k, v = tensors(2, HEADS, 2, QUERIES, KEYS, 8, 6)
    attention(
        q if query is None else query,
        k if key is None else key,
        v if value is None else value,
        backend="torch",
        **options,
    )


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def rand(*shape, **options):
    return torch.rand(shape, **options)


LABELS = (ints(QUERIES), ints(KEYS))
CASES = {
    "query not a tensor": ({"query": [[1.0]]}, TypeError, "query must be a torch tensor, got list"),
    "query of three axes": (
        {"query": rand(2, 7, 8)},
        ValueError,
        r"query must be \[batch, heads, positions, dim\], got \[2, 7, 8\]; add the missing axes",
    ),
    "no batch": (
        {name: rand(0, 4, 5, 8) for name in ("query", "key", "value")},
        ValueError,
        r"query has an empty axis: \[0, 4, 5, 8",
    ),
    "no heads": ({"query": rand(2, 0, 5, 8)}, ValueError, r"query has an empty axis: \[2, 0, 5"),
    "no keys": (
        {name: rand(2, 2, 0, 8) for name in ("key", "value")},
        ValueError,
        r"key has an empty axis: \[2, 2, 0, 8",
    ),
    "no head dim": ({"query": rand(2, 4, 5, 0)}, ValueError, r"query has an empty axis: .*5, 0\]"),
    "no value dim": ({"value": rand(2, 2, 7, 0)}, ValueError, r"value has an empty axis: .*, 0\]"),
    "no queries": ({"query": rand(2, 4, 0, 8)}, ValueError, r"query has an empty axis: \[2, 4, 0"),
    "query without numbers": (
        {"query": rand(2, 4, 7, 8).to("meta")},
        ValueError,
        "query is on the meta device and holds no numbers",
    ),
    "integer query": (
        {"query": ints(2, 4, 7, 8)},
        TypeError,
        "query must be one of float16, bfloat16, float32, float64, got torch.int64",
    ),
    "other type of key": (
        {"key": rand(2, 2, 11, 8).half()},
        TypeError,
        "key is torch.float16, the query torch.float32; convert one of them",
    ),
    "other type of value": (
        {"value": rand(2, 2, 11, 6).double()},
        TypeError,
        "value is torch.float64, the query torch.float32; convert one of them",
    ),
    "other device": (
        {"value": rand(2, 2, 11, 6, device=META)},
        ValueError,
        "value is on meta, the query on cpu; move it there",
    ),
    "other batch": (
        {"key": rand(3, 2, 11, 8)},
        ValueError,
        "key has batch 3, the query 2; they must be equal",
    ),
    "key and value apart": (
        {"value": rand(2, 2, 13, 6)},
        ValueError,
        r"key and value must agree in kv_heads and keys, got \[2, 2, 11, 8\] and \[2, 2, 13, 6\]",
    ),
    "other head_dim": (
        {"query": rand(2, 4, 7, 9)},
        ValueError,
        "query and key must agree in head_dim, got 9 and 8",
    ),
    "heads no multiple": (
        {"query": rand(2, 5, 7, 8)},
        ValueError,
        "heads must be a multiple of kv_heads, got 5 and 2",
    ),
    "tensor as mask": (
        {"mask": torch.ones(7, 11, dtype=torch.bool)},
        TypeError,
        r"mask must be an AttentionMask, got Tensor; wrap a bool tensor as AttentionMask\(allowed=",
    ),
    "infinite scale": (
        {"scale": float("inf")},
        ValueError,
        r"scale must be finite, got inf; None means 1/sqrt\(head_dim\)",
    ),
    "softcap 0": (
        {"softcap": 0.0},
        ValueError,
        "softcap must be positive and finite, got 0.0; None means no cap",
    ),
    "sinks of another count": (
        {"sink_logits": rand(2)},
        ValueError,
        r"sink_logits must be floating point, one per head \(\[4\]\), got torch.float32 \[2\]",
    ),
    "sinks elsewhere": (
        {"sink_logits": rand(4, device=META)},
        ValueError,
        "sink_logits is on meta, the query on cpu",
    ),
    "block size 0": ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
    "block size 1.5": ({"block_size": 1.5}, TypeError, "block_size must be an integer, got 1.5"),
    "three block sizes": (
        {"block_size": (8, 8, 8)},
        ValueError,
        r"block_size must be one integer or \(query_block, key_block\), got \(8, 8, 8\)",
    ),
    "prefix 0": ({"prefix": 0}, ValueError, "prefix must be at least 1, got 0"),
    "top_k True": ({"top_k": True}, TypeError, "top_k must be an integer, got True"),
    "statistics as string": (
        {"statistics": "lse"},
        ValueError,
        r"statistics must be 'all' or a sequence of names, got the string 'lse'; write \('lse',\)",
    ),
    "misspelt statistic": (
        {"statistics": ("entropie",)},
        ValueError,
        "unknown statistic 'entropie'; did you mean 'entropy'?",
    ),
    "unknown statistic": (
        {"statistics": ("xyz",)},
        ValueError,
        "unknown statistic 'xyz'; known: lse, max_logit, ",
    ),
    "match_mass without match": (
        {"statistics": ("match_mass",)},
        ValueError,
        "statistic 'match_mass' needs match=, which was not given",
    ),
    "block_weighted without weights": (
        {"statistics": ("block_weighted",)},
        ValueError,
        "statistic 'block_weighted' needs key_weights=",
    ),
    "grid_moments without grid": (
        {"statistics": ("grid_moments",)},
        ValueError,
        "statistic 'grid_moments' needs grid=",
    ),
    "attribution without gradient": (
        {"statistics": ("block_attribution",)},
        ValueError,
        "'block_attribution' comes from the backward pass, but no input requires a gradient; call",
    ),
    "not differentiable": (
        {"differentiable": ("block_max",)},
        ValueError,
        r"differentiable may hold block_mass, entropy, received \(output and lse always are\), got "
        "block_max",
    ),
    "empty match": ({"match": []}, ValueError, "match is empty; give at least one"),
    "match of one": (
        {"match": [ints(QUERIES)]},
        ValueError,
        r"match\[0\] must be a pair \(query_labels, key_labels\), got Tensor",
    ),
    "labels of floats": (
        {"match": [LABELS, (rand(QUERIES), LABELS[1])]},
        TypeError,
        r"query labels of match\[1\] must be an integer tensor, got torch.float32",
    ),
    "labels of a list": (
        {"match": [([0] * QUERIES, LABELS[1])]},
        TypeError,
        r"query labels of match\[0\] must be an integer tensor, got list",
    ),
    "labels of another length": (
        {"match": [(LABELS[0], ints(5))]},
        ValueError,
        r"key labels of match\[0\] must be \[11\] or \[batch, ...\] = \[2, 11\], got \[5\]",
    ),
    "labels elsewhere": (
        {"match": [(LABELS[0].to(META), LABELS[1])]},
        ValueError,
        r"query labels of match\[0\] are on meta, the query on cpu; move them",
    ),
    "labels too large": (
        {"match": [(LABELS[0] + 2**31, LABELS[1])]},
        ValueError,
        r"query labels of match\[0\] must fit 32 bits \(below 2147483648\); number the distinct",
    ),
    "groups of floats": (
        {"groups": rand(2, KEYS)},
        TypeError,
        "groups must hold integers 0..3, got torch.float32",
    ),
    "groups of another shape": (
        {"groups": ints(KEYS)},
        ValueError,
        r"groups must be \[batch, keys\] = \[2, 11\], got \[11\]",
    ),
    "groups elsewhere": (
        {"groups": ints(2, KEYS).to(META)},
        ValueError,
        "groups is on meta, the query on cpu",
    ),
    "five groups": (
        {"groups": ints(2, KEYS) + torch.arange(KEYS) % 5},
        ValueError,
        r"groups must lie in 0..3 \(at most 4 groups\), got 0..4; join groups or call",
    ),
    "negative group": ({"groups": ints(2, KEYS) - 1}, ValueError, r"got -1..-1; join groups"),
    "block_mask of ints": (
        {"block_mask": ints(1, 1, 1, 1)},
        TypeError,
        r"block_mask must be bool \(True = computed\), got torch.int64",
    ),
    "block_mask elsewhere": (
        {"block_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=META)},
        ValueError,
        "block_mask is on meta, the query on cpu",
    ),
    "block_mask of another grid": (
        {"block_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "block_size": 4},
        ValueError,
        r"= \[2 \| 1, 4 \| 1, 2, 3\] with block_size \(4, 4\), got \[1, 1, 1, 1\]",
    ),
    "weights of ints": (
        {"key_weights": ints(2, 2, KEYS)},
        TypeError,
        "key_weights must be floating point, got torch.int64",
    ),
    "weights elsewhere": (
        {"key_weights": rand(2, 2, KEYS, device=META)},
        ValueError,
        "key_weights is on meta, the query on cpu",
    ),
    "weights of another shape": (
        {"key_weights": rand(2, 3, KEYS)},
        ValueError,
        r"= \[2, 4, 11\] or \[batch, kv_heads, keys\] = \[2, 2, 11\], got \[2, 3, 11\]",
    ),
    "grid of one": ({"grid": (3,)}, ValueError, r"grid must be \(height, width\) or \(height,"),
    "grid of width 0": ({"grid": (3, 0)}, ValueError, "grid width must be at least 1, got 0"),
    "grid too large": (
        {"grid": (3, 3, 3)},
        ValueError,
        "grid 3x3 from key 3 needs 12 keys, got 11; give the first image key as the third entry",
    ),
}
MASKS = {
    "window 0": (
        M(window=0),
        ValueError,
        r"window must be at least 1 \(a query's own key\), got 0",
    ),
    "window 2.5": (
        M(window=2.5),  # pyright: ignore[reportArgumentType]
        TypeError,
        "window must be an integer or None, got 2.5",
    ),
    "prefix without causal": (
        M(prefix=3),
        ValueError,
        "prefix= lets the first keys be seen in spite of causal=True, but causal is False",
    ),
    "negative prefix": (
        M(causal=True, prefix=-1),
        ValueError,
        "mask prefix must be 0 or more, got -1",
    ),
    "prefix of three": (
        M(causal=True, prefix=[1, 2, 3]),
        ValueError,
        r"mask prefix must be one integer or one per batch row \(2\), got 3",
    ),
    "lengths of floats": (
        M(key_lengths=torch.tensor([1.0, 2.0])),
        TypeError,
        "key_lengths must hold integers, got torch.float32",
    ),
    "lengths of floats in a list": (
        M(key_lengths=[1.5, 2.0]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "key_lengths must hold integers, got torch.float32",
    ),
    "blocks of floats": (
        M(causal=True, blocks=[0.5, 4]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "blocks must hold integers, got torch.float32",
    ),
    "blocks of a word": (
        M(causal=True, blocks="each"),  # pyright: ignore[reportArgumentType]
        ValueError,
        "blocks must hold integers of 64 bits",
    ),
    "lengths of three": (
        M(key_lengths=[1, 2, 3]),
        ValueError,
        r"key_lengths must have one entry per batch row \(2\), got 3",
    ),
    "lengths of two axes": (
        M(key_lengths=[[1, 2]]),  # pyright: ignore[reportArgumentType]
        ValueError,
        r"key_lengths must be 1-dimensional, got shape \[1, 2\]",
    ),
    "lengths beyond the keys": (
        M(key_lengths=[1, 12]),
        ValueError,
        r"key_lengths must lie in 0..11, got \[1, 12\]",
    ),
    "query lengths beyond": (
        M(query_lengths=[8, 7]),
        ValueError,
        r"query_lengths must lie in 0..7, got \[8, 7\]",
    ),
    "negative start": (M(key_start=[-1, 0]), ValueError, r"key_start must lie in 0..11"),
    "lengths elsewhere": (
        M(key_lengths=ints(2).to(META)),
        ValueError,
        "key_lengths is on meta, the query on cpu",
    ),
    "packed cross-attention": (
        M(cu_seqlens=[0, 7]),
        ValueError,
        "cu_seqlens needs queries and keys at the same positions, got 7 queries and 11 keys",
    ),
    "packed and lengths": (
        M(cu_seqlens=[0, 7], key_lengths=[7, 7]),
        ValueError,
        "cu_seqlens says where sequences start and end: leave out key_lengths",
    ),
    "padding of ints": (
        M(key_padding=ints(2, KEYS)),
        TypeError,
        r"key_padding must be bool \(True = visible\), got torch.int64; an additive mask goes into",
    ),
    "padding elsewhere": (
        M(key_padding=torch.ones(2, KEYS, dtype=torch.bool, device=META)),
        ValueError,
        "key_padding is on meta, the query on cpu",
    ),
    "padding of another shape": (
        M(key_padding=torch.ones(2, 7, dtype=torch.bool)),
        ValueError,
        r"key_padding must be \[batch, keys\] = \[2, 11\], got \[2, 7\]",
    ),
    "allowed of floats": (M(allowed=rand(7, 11)), TypeError, "allowed must be bool"),
    "allowed of another shape": (
        M(allowed=torch.ones(5, 11, dtype=torch.bool)),
        ValueError,
        r"allowed must be broadcastable to \[batch, heads, queries, keys\] = \[2, 4, 7, 11\], got "
        r"\[5, 11\]",
    ),
    "allowed of five axes": (
        M(allowed=torch.ones(1, 1, 1, 7, 11, dtype=torch.bool)),
        ValueError,
        r"allowed must have at most 4 axes, got shape \[1, 1, 1, 7, 11\]",
    ),
    "bool bias": (
        M(bias=torch.ones(7, 11, dtype=torch.bool)),
        TypeError,
        r"bias must be a floating-point tensor, got torch.bool; a bool mask goes into allowed=",
    ),
    "bias elsewhere": (M(bias=rand(7, 11, device=META)), ValueError, "bias is on meta, the query"),
    "slopes of another count": (
        M(alibi_slopes=rand(2)),
        ValueError,
        r"alibi_slopes must be floating point, one per head \(\[4\]\), got torch.float32 \[2\]",
    ),
    "slopes elsewhere": (M(alibi_slopes=rand(4, device=META)), ValueError, "alibi_slopes is on me"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_argument_that_does_not_fit_is_refused(name):
    options, kind, message = CASES[name]
    with pytest.raises(kind, match=message):
        call(**options)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_does_not_fit_is_refused(name):
    mask, kind, message = MASKS[name]
    with pytest.raises(kind, match=message):
        call(mask=mask)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0], "cu_seqlens needs at least two entries"),
        ([1, 7], r"cu_seqlens must rise from 0 to at most 7 .*, got \[\[1, 7\]"),
        ([0, 5, 3], "cu_seqlens must rise from 0 to at most 7"),
        ([0, 8], "cu_seqlens must rise from 0 to at most 7"),
        ([[0, 7]] * 3, r"cu_seqlens must be \[segments \+ 1\] or \[batch, segments \+ 1\] with ba"),
    ],
    ids=["one entry", "not from 0", "falling", "too long", "three rows"],
)
def test_packed_lengths_that_do_not_fit_are_refused(bounds, message):
    query, key, value = tensors(2, HEADS, 2, QUERIES, QUERIES, 8, 6)
    with pytest.raises(ValueError, match=message):
        call(query, key, value, mask=M(cu_seqlens=bounds))


def test_the_arguments_above_fit_when_they_are_right():
    """The refusals are for the one thing changed."""
    call(
        mask=M(causal=True, key_lengths=[11, 5], bias=rand(1, 4, 7, 11), alibi_slopes=rand(4)),
        match=[LABELS],
        groups=ints(2, KEYS),
        grid=(3, 3, 2),
        key_weights=rand(2, 2, KEYS),
        block_mask=torch.ones(2, 1, 2, 3, dtype=torch.bool),
        block_size=4,
        sink_logits=rand(4),
        statistics="all",
    )


def test_unknown_keywords_are_not_swallowed():
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout'"):
        call(dropout=0.1)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("size", [10**6, 2**31 - 1, 2**31, 2**31 + 5, 2**32, 2**40, 2**63, 2**70])
def test_windows_and_prefixes_beyond_all_keys_hide_nothing(backend, size):
    query, key, value = tensors(2, 4, 2, 7, 11)
    options = {"statistics": ("lse", "prefix_mass"), "backend": backend, "block_size": 4}

    def seen(mask=None, **more):
        result = attention(query, key, value, mask=mask, **options, **more)
        return result.output, result.statistics.lse, result.statistics.prefix_mass

    causal = seen(M(causal=True))
    both = seen()
    for found, expected in (
        (seen(M(causal=True, window=size)), causal),
        (seen(M(window=size)), both),
        (seen(M(causal=True, prefix=size)), both),
        (seen(M(causal=True, prefix=torch.tensor([min(size, 2**62)] * 2))), both),
        (seen(M(window=size, key_lengths=[5, 11], query_lengths=[7, 1])), None),
    ):
        for one, other in zip(found, expected or found, strict=True):
            torch.testing.assert_close(one, other)
    whole = seen(M(key_lengths=[5, 11], query_lengths=[7, 1]))
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert (seen(prefix=size)[2] - 1).abs().max() < 1e-5
    logits = tile(query, key, both[1], (0, 7), (0, 11), window=size, prefix=size, causal=True)
    torch.testing.assert_close(logits, tile(query, key, both[1], (0, 7), (0, 11)))


@pytest.mark.parametrize("size", [2**31, 2**61, 2**63 - 1, 2**70, (4, 2**40), (2**40, 4)])
def test_blocks_beyond_32_bits_are_refused(size):
    with pytest.raises(ValueError, match=r"block_size must be at most 2147483647, got \d+; one of"):
        call(block_size=size)
    call(block_size=2**31 - 1, statistics=("block_mass",))


@pytest.mark.parametrize("name", ["key_lengths", "query_lengths", "key_start", "cu_seqlens"])
@pytest.mark.parametrize("size", [2**32, 2**32 + 3, 2**70])
def test_lengths_beyond_32_bits_are_refused(name, size):
    given = [0, size] if name == "cu_seqlens" else [1, size]
    with pytest.raises(ValueError, match=f"{name} must"):
        attention(*tensors(2, 4, 2, 7, 7), mask=M(**{name: given}), backend="torch")


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("cap", [5e-324, 1e-46, 1e-38, 1e38, 1e39, 1e308])
def test_extreme_softcaps_cap_or_do_nothing(backend, cap):
    query, key, value = tensors(2, 4, 2, 7, 11)
    options = {"statistics": ("lse", "received"), "backend": backend}
    found = attention(query, key, value, softcap=cap, **options)
    expected = attention(query * (cap > 1), key, value, **options)
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.statistics.received, expected.statistics.received)


def test_the_smallest_label_matches_nothing():
    labels = torch.full((7,), -(2**63)), torch.zeros(11, dtype=torch.int64)
    query, key, value = tensors(2, 4, 2, 7, 11)
    result = attention(query, key, value, match=[labels], statistics=("match_mass",))
    assert result.statistics.match_mass.abs().max() == 0


def test_whole_numbers_of_numpy_are_whole_numbers():
    """`block_size=np.int64(8)` was no integer, as a loop over an array of sizes gives it."""
    query, key, value = rand(1, 2, 20, 8), rand(1, 2, 20, 8), rand(1, 2, 20, 8)
    plain, numpys = (
        attention(
            *(query, key, value),
            mask=M(causal=True, window=whole(5)),
            statistics=("block_mass", "prefix_mass"),
            block_size=whole(8),
            prefix=whole(2),
        )
        for whole in (int, np.int64)
    )
    assert torch.equal(plain.statistics.block_mass, numpys.statistics.block_mass)
    assert torch.equal(plain.output, numpys.output)
