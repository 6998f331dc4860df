"""Content and position in the logits: DeBERTa's three terms by the formula of the paper, and any bias of position."""

from itertools import product

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 53}
SIZES |= {"intermediate_size": 20, "relative_attention": True, "max_position_embeddings": 40}
CONFIGS = {
    "deberta": transformers.DebertaConfig(
        **SIZES, pos_att_type="c2p|p2c", max_relative_positions=8, position_biased_input=False
    ),
    "deberta-v2": transformers.DebertaV2Config(**SIZES, pos_att_type="c2p|p2c"),
    "buckets": transformers.DebertaV2Config(
        **SIZES, pos_att_type="c2p|p2c", share_att_key=True, position_buckets=4
    ),
}
IDS = [
    torch.randint(3, 53, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    for size in (11, 7)
]


def built(name):
    torch.manual_seed(0)
    root = transformers.AutoModel.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for weight in root.parameters():
            if weight.dim() > 1:
                weight.mul_(12)
            else:
                weight.add_(0.3 * torch.randn(weight.shape))
    return root


def by_formula(root, ids):
    """[terms, heads, n, n] of layer 0, entry by entry."""
    attention = root.encoder.layer[0].attention.self
    seen = {}
    hook = attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, states=args[0]), with_kwargs=True
    )
    with torch.no_grad():
        root(torch.tensor([ids]))
    hook.remove()
    states, table = seen["states"][0], seen["rel_embeddings"]
    heads, width, length = 3, 8, len(ids)
    apart = lambda rows: rows.unflatten(-1, (heads, width)).transpose(0, 1)  # noqa: E731
    if hasattr(attention, "in_proj"):
        joint = attention.in_proj(states).unflatten(-1, (heads, 3 * width)).transpose(0, 1)
        q, k = (
            joint[..., :width] + attention.q_bias.view(heads, 1, width),
            joint[..., width : 2 * width],
        )
        span = min(length, attention.max_relative_positions)
        middle = attention.max_relative_positions
        table = table[middle - span : middle + span]
        place_k, place_q = apart(attention.pos_proj(table)), apart(attention.pos_q_proj(table))
    else:
        q, k = apart(attention.query_proj(states)), apart(attention.key_proj(states))
        span = attention.pos_ebd_size
        table = table[: 2 * span]
        shared = attention.share_att_key
        place_k = apart((attention.key_proj if shared else attention.pos_key_proj)(table))
        place_q = apart((attention.query_proj if shared else attention.pos_query_proj)(table))
    found = np.zeros((3, heads, length, length))
    with torch.no_grad():
        for head, i, j in product(range(heads), range(length), range(length)):
            far = bucket(i - j, getattr(attention, "position_buckets", -1), 40)
            place = min(max(far + span, 0), 2 * span - 1)
            found[0, head, i, j] = q[head, i] @ k[head, j]
            found[1, head, i, j] = q[head, i] @ place_k[head, place]
            found[2, head, i, j] = k[head, j] @ place_q[head, place]
    return found / (3 * width) ** 0.5


def bucket(far, size, most):
    """Distances beyond half of the buckets by their logarithm (He et al. 2021, DeBERTa v2's code)."""
    middle = size // 2
    if size < 0 or abs(far) < middle:
        return far
    beyond = np.log(abs(far) / middle) / np.log((most - 1) / middle) * (middle - 1)
    return int(np.sign(far) * (np.ceil(beyond) + middle)) if abs(far) > middle else far


@pytest.mark.parametrize("name", CONFIGS)
def test_the_three_terms_are_those_of_the_paper(name):
    root = built(name)
    model = lens.load(root)
    found = lens.reading.disentangle(model, IDS, "L0H1", progress=False)
    assert found.terms == ("c2c", "c2p", "p2c")
    expected = by_formula(root, IDS[0])
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.logits / scale, expected[:, 1] / scale, atol=1e-5)
    with torch.no_grad(), switched(root, "eager"):
        own = root(torch.tensor([IDS[0]]), output_attentions=True).attentions[0][0, 1]
    whole = torch.from_numpy(found.logits).sum(0).softmax(-1)
    np.testing.assert_allclose(whole, own, atol=1e-5)
    without = torch.from_numpy(found.logits[[0, 2]]).sum(0).softmax(-1)
    change = float((without - whole).abs().sum(-1).mean() / 2)
    assert found.change[0, 1, 1, 0] == pytest.approx(change, abs=1e-6)
    lift = ((whole.numpy() - 1 / 11) * found.logits[2]).sum(-1).mean()
    assert found.lift[0, 1, 2, 0] == pytest.approx(lift, abs=1e-6)
    assert type(root.encoder.layer[0].attention.self).__name__ == "DisentangledSelfAttention"
    assert not any(name.endswith("_bias") for name in vars(root.encoder.layer[0].attention.self))


def test_a_bias_that_is_zero_changes_nothing_and_one_that_is_all_changes_all():
    torch.manual_seed(1)
    config = transformers.T5Config(
        d_model=24, d_kv=8, num_heads=3, d_ff=20, num_layers=2, vocab_size=53, num_decoder_layers=1
    )
    root = transformers.T5EncoderModel(config).eval()
    attention = root.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        attention.q.weight.view(3, 8, -1)[1] = 0  # head 1 of layer 0 by position alone
        attention.relative_attention_bias.weight[:, 1] *= 9
        attention.relative_attention_bias.weight[:, 2] = 0.5  # the same everywhere
    model = lens.load(root)
    found = lens.reading.disentangle(model, IDS, progress=False)
    assert found.terms == ("content", "position")
    assert found.change[0, 1, 0].max() < 1e-6
    assert found.change[0, 1, 1].min() > 0.1
    assert found.change[:, 2, 1].max() < 1e-6
    assert np.abs(found.lift[0, 1, 0]).max() < 1e-6 < found.lift[0, 1, 1].min()
    assert found.by_position[0].tolist()[1:] == [True, False]
    table = found.table()
    assert list(table["name"][:4]) == ["L0H0", "L0H0", "L0H1", "L0H1"]
    assert table["n"].eq(2).all()
    assert "L0H1 rests on position most" in found.findings()[1]
    assert len(found.plot().data) == 2


def test_windows_of_a_picture_have_terms_too():
    config = transformers.SwinConfig(
        image_size=8, patch_size=2, embed_dim=12, depths=[2, 2], num_heads=[2, 3], window_size=2
    )
    root = transformers.SwinModel(config).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    model = lens.load(root).part("stage0")
    pixels = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    found = lens.reading.disentangle(model, pixels, "L1H0", progress=False)
    assert found.tokens[:5] == ("0,0", "0,1", "0,2", "0,3", "1,0")
    assert np.isfinite(found.logits[0]).sum() == 6 * 6  # of rows 0 | 1, 2 | 3 and columns alike
    assert len(found.plot().data) == 2


def test_models_without_a_term_of_position_are_refused():
    with pytest.raises(LensError, match="adds no term of position"):
        lens.reading.disentangle(lens.load("text-lm-3l"), "It was the best", progress=False)
    model = lens.load(built("deberta"))
    with pytest.raises(LensError, match="sees one key alone"):
        lens.reading.disentangle(model, [[5]], progress=False)
