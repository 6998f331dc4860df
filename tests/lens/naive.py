"""The statistics again, from a whole probability matrix in float64: the twin of `lens.traces.statistics`.

P is [heads, queries, keys], of one prompt; nothing here is shared with the code under test.
"""

import numpy as np
import torch


def rms_ratio(found, expected) -> float:
    """rms(found - expected) / rms(expected) over what is finite; NaN and inf must be at the same places."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    finite = np.isfinite(expected)
    assert (np.isfinite(found) == finite).all(), "finite values at other places"
    assert finite.any(), "nothing to compare"
    difference = np.sqrt(np.mean((found[finite] - expected[finite]) ** 2))
    return float(difference / np.sqrt(np.mean(expected[finite] ** 2)))


def statistics(p, ids, block_size: int, causal: bool) -> dict[str, np.ndarray]:
    """Every variable of a trace that follows from P alone (all but lse and max_logit)."""
    p = np.asarray(p, np.float64)
    heads, queries, keys = p.shape
    assert queries == keys
    i, j = np.arange(queries)[:, None], np.arange(keys)[None, :]
    found = {
        "entropy": _entropy(p),
        "concentration": (p**2).sum(-1),
        "distance": (p * (i - j)).sum(-1),
        "prefix_mass": p[:, :, :4].sum(-1),
        "first_mass": p[:, :, 0],
        "rest_mass": p[:, :, 1:].sum(-1),
        "received": p.sum(1),
    }
    rest = p[:, :, 1:]
    total = rest.sum(-1, keepdims=True)
    rest = np.divide(rest, total, out=np.full_like(rest, np.nan), where=total > 0)
    found["entropy_sink_excluded"] = _entropy(rest)
    found["distance_sink_excluded"] = (rest * (i - j[:, 1:])).sum(-1)
    found["match_mass"] = _matches(p, ids, i, j, causal)
    offsets = range(0 if causal else 1 - queries, keys)
    found["diagonal"] = np.stack([np.trace(p, -t, 1, 2) for t in offsets], -1)
    blocks = -(-queries // block_size)
    found["block_mass"] = np.zeros((heads, blocks, blocks))
    found["block_max"] = np.zeros((heads, blocks, blocks))
    for a in range(blocks):
        for b in range(blocks):
            block = p[
                :, a * block_size : (a + 1) * block_size, b * block_size : (b + 1) * block_size
            ]
            found["block_mass"][:, a, b] = block.sum(-1).mean(-1)
            found["block_max"][:, a, b] = block.max((1, 2))
    return found


def _entropy(p):
    return -np.where(
        p > 0, p * np.log(np.where(p > 0, p, 1)), np.where(np.isnan(p), np.nan, 0)
    ).sum(-1)


def _matches(p, ids, i, j, causal):
    nothing = np.full(p.shape[:2], np.nan)
    masses = [(p * (j == i)).sum(-1), (p * (j == i - 1)).sum(-1)]
    if ids is None:
        return np.stack([*masses, nothing, nothing], -1)
    ids = np.asarray(ids)
    masses.append((p * (ids[i] == ids[j])).sum(-1))
    after_same = (j >= 1) & (ids[np.maximum(j - 1, 0)] == ids[i])
    masses.append((p * after_same).sum(-1) if causal else nothing)
    return np.stack(masses, -1)


def probabilities_and_values(network, ids):
    """Whole attention [layers, heads, tokens, tokens] and values [layers, kv_heads, tokens, head_dim].

    Of one prompt [1, tokens] in a network in Llama's way, by its own eager attention; float64.
    """
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2][0]))
        for layer in network.model.layers
    ]
    network.set_attn_implementation("eager")
    with torch.no_grad():
        p = torch.cat(network(ids, output_attentions=True).attentions).double()
    network.set_attn_implementation("sdpa")
    for hook in hooks:
        hook.remove()
    return p, torch.stack(values).double().unflatten(
        -1, (network.config.num_key_value_heads, -1)
    ).transpose(1, 2)
