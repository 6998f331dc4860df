"""Scores from weights: against whole matrices, against the model's own modules, on known heads."""

import numpy as np
import pytest
import torch
from torch import nn

import lens
from lens.common.errors import LensError
from lens.heads.weights import composition, copying, head_weights
from tests.lens.architectures import build

KINDS = {
    "gpt2": ("transformer.h.{}.ln_1", "transformer.h.{}.attn.c_attn", None, "transformer.ln_f"),
    "llama": ("model.layers.{}.input_layernorm", None, "model.layers.{}.self_attn", "model.norm"),
    "toy": ("blocks.{}.ln1", None, "blocks.{}.attn", "ln_final"),
}
NAMES = {"llama": ("q_proj", "k_proj", "v_proj", "o_proj"), "toy": ("q", "k", "v", "o")}


def loaded(kind):
    """A model whose norms have scales and shifts of their own."""
    model = lens.load("induction-2l") if kind == "toy" else lens.load(build(kind))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.model.named_parameters():
        if parameter.dim() == 1 and ("norm" in name or "ln" in name):
            with torch.no_grad():
                parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def without_bias(module, x):
    return module(x) - module(torch.zeros_like(x))


def normalised(norm, x):
    """What the norm returns less its shift, times the size that it divided by."""
    shift = getattr(norm, "bias", None)
    out = norm(x) - (0 if shift is None else shift)
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    return out * (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rms_ratio(found, expected):
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_do_what_the_modules_do(kind):
    """q, k, v, the output and the logits of random vectors, module by module, norm included."""
    model = loaded(kind)
    root, info = model.model, model.info
    weights = head_weights(model)
    norm_path, joint, attention_path, last = KINDS[kind]
    x = torch.randn(5, weights.embedding.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in range(info.layers):
            read = normalised(root.get_submodule(norm_path.format(layer)), x)
            if joint:
                own = list(without_bias(root.get_submodule(joint.format(layer)), read).chunk(3, -1))
                out = root.get_submodule(f"transformer.h.{layer}.attn.c_proj")
            else:
                attention = root.get_submodule(attention_path.format(layer))
                *modules, out = (getattr(attention, name) for name in NAMES[kind])
                own = [without_bias(module, read) for module in modules]
            mine = (weights.query[layer], weights.key[layer], weights.value[layer])
            for projected, matrix in zip(own, mine, strict=True):
                by_head = projected.unflatten(-1, (-1, info.head_dim)).transpose(0, 1)
                by_head = by_head.repeat_interleave(info.heads // len(by_head), 0)
                assert rms_ratio(x @ matrix, by_head) < 1e-4
            z = torch.randn(5, info.heads, info.head_dim)
            written = without_bias(out, z.flatten(1))
            if kind != "llama":
                written = written - written.mean(-1, keepdim=True)
            assert rms_ratio(torch.einsum("nhd,hdm->nm", z, weights.output[layer]), written) < 1e-5
        logits = without_bias(root.get_output_embeddings(), normalised(root.get_submodule(last), x))
        assert rms_ratio(x @ weights.unembedding, logits) < 1e-4


@pytest.mark.parametrize("kind", ["toy", "llama"])
def test_copying_equals_the_whole_matrix(kind):
    model = loaded(kind)
    weights, table = head_weights(model), copying(model, top=3)
    assert len(table) == model.info.layers * model.info.heads
    for row in table.to_dict("records"):
        at = row["layer"], row["head"]
        circuit = weights.embedding @ weights.value[at] @ weights.output[at] @ weights.unembedding
        eigenvalues = np.linalg.eigvals(circuit.double().numpy())
        assert row["eigenvalue"] == pytest.approx(
            eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-3
        )
        among = [
            sum(other >= logits[token] for other in logits) <= 3
            for token, logits in enumerate(circuit.tolist())
        ]
        assert row["top_share"] == pytest.approx(np.mean(among))
        assert row["top_by_chance"] == 3 / len(circuit)
        assert row["name"] == f"L{at[0]}H{at[1]}"


def test_composition_equals_the_whole_matrices():
    model = loaded("llama")
    weights, table = head_weights(model), composition(model)
    assert len(table) == 3 * 36 * 3  # kinds × pairs of heads × pairs of layers
    scores = table.set_index(["earlier", "later", "kind"])["score"]
    for earlier, later in (((0, 1), (1, 4)), ((0, 5), (2, 2)), ((1, 3), (2, 0))):
        left = weights.value[earlier] @ weights.output[earlier]
        query_key = weights.query[later] @ weights.key[later].T
        right = {
            "q": query_key,
            "k": query_key.T,
            "v": weights.value[later] @ weights.output[later],
        }
        for kind, matrix in right.items():
            expected = (left @ matrix).norm() / (left.norm() * matrix.norm())
            name = (f"L{earlier[0]}H{earlier[1]}", f"L{later[0]}H{later[1]}", kind)
            assert scores[name] == pytest.approx(float(expected), rel=1e-4)


def test_random_weights_are_what_chance_says():
    table = composition(lens.load(build("llama")))
    assert table["score"].mean() == pytest.approx(table["by_chance"][0], rel=0.15)
    assert table["by_chance"][0] == pytest.approx(48**-0.5)
    copied = copying(lens.load(build("llama")))
    assert abs(copied["eigenvalue"].mean()) < 0.3


def test_the_known_heads_of_induction_2l():
    """The induction heads copy, no other head does; their keys read the previous-token head."""
    model = lens.load("induction-2l")
    table = copying(model).set_index("name")
    heads = ["L1H0", "L1H2", "L1H3"]
    assert (table.loc[heads, "eigenvalue"] > 0.99).all()
    assert (table.loc[heads, "top_share"] == 1).all()
    assert table.drop(heads)["top_share"].max() < 0.3
    pairs = composition(model).sort_values("score", ascending=False, ignore_index=True)[:3]
    assert set(pairs["earlier"]) == {"L0H1"}
    assert set(pairs["later"]) == set(heads)
    assert set(pairs["kind"]) == {"k"}


def test_unknown_architectures_and_tops_are_refused():
    with pytest.raises(LensError, match="where 'modernbert' keeps its parts is not known here"):
        composition(lens.load(build("modernbert")))
    with pytest.raises(LensError, match="BertModel has no unembedding that is known here"):
        copying(lens.load(build("bert")))
    with pytest.raises(LensError, match="ViTModel reads no tokens"):
        _ = head_weights(lens.load(build("vit"))).embedding
    for top in (0, 66):
        with pytest.raises(LensError, match=f"top must be 1 to 65, .* got {top}"):
            copying(lens.load("induction-2l"), top=top)
    for tokens in (0, "a", 2.5):
        with pytest.raises(LensError, match="tokens must be at least 1, or None for all, got"):
            copying(lens.load("induction-2l"), tokens=tokens)


def test_a_draw_of_tokens_is_near_all_of_them():
    model = lens.load("induction-2l")
    every, some = copying(model, tokens=None), copying(model, tokens=40)
    assert set(every["tokens"]) == {65}
    assert set(some["tokens"]) == {40}
    assert every["top_share"].min() < 0.2 < 0.9 < every["top_share"].max()
    assert (some["top_share"] - every["top_share"]).abs().max() < 0.1
    assert some["eigenvalue"].equals(every["eigenvalue"])


def test_a_random_head_copies_less_than_the_induction_heads():
    model = lens.load("induction-2l")
    table = copying(model).set_index("name")
    heads = table.loc[["L1H0", "L1H2", "L1H3"]]
    assert (heads["top_share"] == 1).all()
    assert (table["top_share_random"] < 0.5).all()
    assert (heads["eigenvalue"] > heads["eigenvalue_random"] + 0.3).all()
    assert table.groupby("layer")["eigenvalue_random"].nunique().tolist() == [1, 1]
    other = copying(model, seed=1).set_index("name")
    assert (other["eigenvalue"] == table["eigenvalue"]).all()
    assert (other["eigenvalue_random"] != table["eigenvalue_random"]).all()
    again = copying(model, seed=1).set_index("name")
    assert (other["eigenvalue_random"] == again["eigenvalue_random"]).all()
