"""Mixing ratios against every part written out from the modules of transformers alone; and what must hold of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.reading.mixtures import MEASURES
from tests.lens.layouts import layout_model

IDS = torch.randint(3, 60, (1, 13), generator=torch.Generator().manual_seed(3))


def by_hand(root):
    """[measure, layer] from maps of all queries and keys and all parts u_ij, none of it by this project."""
    root = copy.deepcopy(root)
    root.set_attn_implementation("eager")
    is_bert = root.config.model_type == "bert"
    with torch.no_grad():
        made = root(IDS, output_attentions=True, output_hidden_states=True)
    layers = root.bert.encoder.layer if is_bert else root.model.layers
    found = []
    for layer, x, maps in zip(layers, made.hidden_states, made.attentions, strict=False):
        x, maps = x[0].double(), maps[0].double()
        attention = layer.attention if is_bert else layer.self_attn
        read = x.float() if is_bert else layer.input_layernorm(x.float())
        with torch.no_grad():
            values = (attention.self.value if is_bert else attention.v_proj)(read).double()
        dense = attention.output.dense if is_bert else attention.o_proj
        width = dense.weight.shape[1] // len(maps)
        values = values.unflatten(-1, (-1, width)).transpose(0, 1)
        values = values.repeat_interleave(len(maps) // len(values), 0)
        weight = dense.weight.detach().double().T.unflatten(0, (len(maps), width))
        u = torch.einsum("hij,hjk,hkd->ijd", maps, values, weight)  # [query, key, d_model]
        bias = 0 if dense.bias is None else dense.bias.detach().double()
        attended = u.sum(1) + bias
        residual, eye = u, torch.eye(len(x), dtype=torch.float64)
        if root.config.model_type == "gemma2":
            norm = layer.post_attention_layernorm
            size = (attended.square().mean(-1) + norm.eps).sqrt()
            residual = u / size[:, None, None] * (1 + norm.weight.detach().double())
        residual = residual + eye[:, :, None] * x[:, None]
        ratios = [
            ratio(maps.mean(0)),
            ratio(u),
            ratio((maps.mean(0) + eye) / 2),
            ratio(residual),
            np.nan,
        ]
        if is_bert:
            norm = attention.output.LayerNorm
            size = ((x + attended).var(-1, correction=0) + norm.eps).sqrt()
            centred = residual - residual.mean(-1, keepdim=True)
            ratios[-1] = ratio(centred / size[:, None, None] * norm.weight.detach().double())
        found.append(ratios)
    return np.array(found).T


def ratio(parts):
    """Mean over queries of a map [query, key], or of the parts [query, key, d_model]."""
    if parts.dim() == 2:
        parts = parts[..., None]
    own = parts.diagonal().T
    others = (parts.sum(1) - own).norm(dim=-1)
    return float((others / (others + own.norm(dim=-1))).mean())


@pytest.mark.parametrize("kind", ["bert", "llama", "gemma2"])
def test_ratios_are_those_of_all_parts_written_out(kind):
    root = layout_model(kind)
    found = lens.reading.mixing(lens.load(root), {"input_ids": IDS}, progress=False)
    np.testing.assert_allclose(found.ratios[..., 0], by_hand(root), atol=2e-6)
    assert np.isnan(found.ratios[4]).all() == (kind != "bert")
    assert len(found.table()) == (15 if kind == "bert" else 12)


def test_with_residual_weights_are_half_and_even_attention_is_known():
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 8, seed) for seed in range(3)]
    found = lens.reading.mixing(model, prompts, progress=False)
    weights, residual = (MEASURES.index(name) for name in ("weights", "weights_residual"))
    np.testing.assert_allclose(found.ratios[residual], found.ratios[weights] / 2, rtol=1e-6)
    count = np.arange(1, 18)
    np.testing.assert_allclose(found.uniform[weights], (1 - 1 / count).mean(), rtol=1e-6)
    assert len(list(found.plot().select_traces())) == 8  # four measures, each beside even attention
    mixing, less = found.findings()
    assert mixing.startswith("By attention weights other tokens bring ")
    assert less.endswith(": less than weights say.")
    more = replace(found, ratios=found.ratios[[1, 1, 2, 0, 4]] + np.array([0, 0, 0, 0.01, 0])[:, None, None])  # fmt: skip
    assert more.findings()[1].endswith(": not surely less than weights say.")
