"""Attention in bands and blocks: the mask that stands for it gives what the model computes in pieces."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched
from lens.passes.sessions import listening

LONGFORMER = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "vocab_size": 53,
}
LONGFORMER |= {"num_hidden_layers": 2, "attention_window": [4, 8], "max_position_embeddings": 64}
LED = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 3}
LED |= {
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "vocab_size": 53,
}
LED |= {"attention_window": [4, 8], "max_encoder_position_embeddings": 64}
BIRD = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "vocab_size": 53}
BIRD |= {
    "num_hidden_layers": 2,
    "block_size": 2,
    "num_random_blocks": 2,
    "attention_type": "block_sparse",
}
T5 = {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 20, "num_layers": 2, "vocab_size": 53}
T5 |= {"local_radius": 3, "encoder_attention_type": "local", "num_decoder_layers": 1}
PEGASUS = {name: LED[name] for name in LED if name[-4:] not in ("ndow", "ings")}
CONFIGS = {
    "longformer": lambda: transformers.LongformerConfig(**LONGFORMER),
    "led": lambda: transformers.LEDConfig(**LED),
    "bigbird": lambda: transformers.BigBirdConfig(**BIRD, max_position_embeddings=64),
    "longt5": lambda: transformers.LongT5Config(**T5),
    "longt5 global": lambda: transformers.LongT5Config(
        **{**T5, "encoder_attention_type": "transient-global", "global_block_size": 5}
    ),
    "pegasus x": lambda: transformers.PegasusXConfig(**PEGASUS, block_size=6, num_global_tokens=4),
}
IDS = torch.randint(5, 53, (1, 29), generator=torch.Generator().manual_seed(3))


def built(name):
    torch.manual_seed(0)
    root = transformers.AutoModel.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for weight in root.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape) * 1.2 / weight[0].numel() ** 0.5)
    return root


def dense(band, global_rows, seen_by_all, window):
    """[heads, n, n] of the model's two pieces: columns of global keys and a band; rows of global tokens."""
    band, places = band[0].transpose(0, 1).numpy(), np.flatnonzero(seen_by_all)
    length, heads, _ = band.shape
    whole = np.zeros((heads, length, length))
    for row in range(length):
        for column in range(band.shape[2] - len(places)):
            if 0 <= (key := row + column - window) < length:
                whole[:, row, key] += band[row, :, len(places) + column]
        whole[:, row, places] += band[row, :, : len(places)]
    for number, row in enumerate(places):
        whole[:, row] = global_rows[0, :, :length, number].numpy()
    return whole


@pytest.mark.parametrize("places", [[], [0, 17]])
def test_longformer_is_a_band_and_its_global_tokens(places):
    root = built("longformer")
    model = lens.load(root)
    assert model.check < 1e-5
    seen_by_all = torch.zeros(1, 29, dtype=torch.long)
    seen_by_all[:, places] = 1
    inputs = {"input_ids": IDS} | ({"global_attention_mask": seen_by_all} if places else {})
    with torch.no_grad(), switched(root, "eager"):
        own = root(**inputs, output_attentions=True)
    trace = lens.capture(model, inputs, block_size=1, progress=False)
    assert trace.tokens == [str(one) for one in IDS[0].tolist()]
    for layer, half in enumerate((2, 4)):
        rows = own.global_attentions[layer] if places else None
        expected = dense(own.attentions[layer], rows, seen_by_all[0].numpy(), half)[:, :29, :29]
        np.testing.assert_allclose(trace.block_mass.values[layer], expected, atol=1e-5)
    with torch.no_grad(), lens.traces.capturing(model):
        found = root(**inputs)[0]
    torch.testing.assert_close(found, own[0], atol=1e-5, rtol=1e-5)
    assert (trace.window(0), trace.window(1)) == ((3, 5) if not places else (None, None))


def test_padding_of_a_batch_is_seen_by_nobody():
    root = built("longformer")
    model = lens.load(root)
    mask = torch.ones(2, 29, dtype=torch.long)
    mask[1, 13:] = 0
    inputs = {"input_ids": IDS.repeat(2, 1), "attention_mask": mask}
    with torch.no_grad(), switched(root, "eager"):
        own = root(**inputs)[0]
    with torch.no_grad(), lens.traces.capturing(model, block_size=1) as recorder:
        found = root(**inputs)[0]
    torch.testing.assert_close(found[0], own[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :13], own[1, :13], atol=1e-5, rtol=1e-5)
    assert float(recorder.records[0].variables["received"][1, :, 13:].abs().max()) == 0


def test_edits_of_global_tokens_are_right_or_refused():
    root = built("longformer")
    model = lens.load(root)
    seen_by_all = torch.zeros(1, 29, dtype=torch.long)
    seen_by_all[:, 0] = 1
    inputs = {"input_ids": IDS, "global_attention_mask": seen_by_all}
    attention = root.encoder.layer[1].attention

    def silent(_, args):
        return (
            args[0].unflatten(-1, (3, 8)).mul(torch.tensor([1.0, 0, 1])[:, None]).flatten(-2),
            args[1],
        )

    with torch.no_grad():
        hook = attention.output.register_forward_pre_hook(silent)
        own = root(**inputs)[0]
        hook.remove()
        plain = root(**inputs)[0]
        with lens.edit(model, lens.edits.Ablate("L1H1")):
            found = root(**inputs)[0]
        with lens.edit(model, lens.edits.Mask([9], layers=[1])) as (done,):
            masked = root(**inputs)[0]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert float((own - plain).abs().max()) > 1e-3
    # the global row and those within 4 positions lose the key, and no other row of the last layer changes
    changed = (masked - plain).abs().amax(-1)[0] > 1e-5
    assert changed.nonzero().flatten().tolist() == [0, *range(5, 14)]
    assert done.calls == 1
    with (
        torch.no_grad(),
        pytest.raises(LensError, match="this does not take"),
        listening(model, lambda call: call.value),
    ):
        root(**inputs)


def test_a_mean_of_rows_with_other_values_is_refused():
    config = transformers.LongformerConfig(**LONGFORMER)
    model = lens.load(transformers.LongformerForMaskedLM(config).eval())
    mean = lens.edits.Ablate("L1H1", "pooled_mean", over=[IDS[0].tolist()])
    first = torch.zeros_like(IDS).index_fill(1, torch.tensor([0]), 1)
    with torch.no_grad(), lens.edit(model, mean):
        model.model(input_ids=IDS)
        with pytest.raises(LensError, match="global tokens have values of their own"):
            model.model(input_ids=IDS, global_attention_mask=first)


def test_led_reads_its_source_in_bands():
    root = built("led")
    model = lens.load(root)
    assert model.check < 1e-5
    assert list(model.parts) == ["encoder", "decoder", "cross"]
    traces = lens.capture(model, (IDS[0], IDS[0, :5]), block_size=1, progress=False)
    with torch.no_grad(), switched(root, "eager"):
        own = root(input_ids=IDS, decoder_input_ids=IDS[:, :5], output_attentions=True)
    for layer, half in enumerate((2, 4)):
        expected = dense(own.encoder_attentions[layer], None, np.zeros(29), half)[:, :29, :29]
        np.testing.assert_allclose(traces.encoder.block_mass.values[layer], expected, atol=1e-5)
    weights = own.cross_attentions[0][0]
    np.testing.assert_allclose(traces.cross.block_mass.values[0], weights, atol=1e-5)


def test_bigbird_counts_its_first_block_once_for_each_random_one():
    root = built("bigbird")
    model = lens.load(root)
    assert root.attention_type == "block_sparse"  # a short prompt at load would have made it full
    assert model.check < 1e-5
    inputs = {"input_ids": IDS}
    with torch.no_grad():
        own = root(**inputs)[0]
        trace = lens.capture(model, inputs, block_size=1, progress=False)
        with lens.traces.capturing(model):
            found = root(**inputs)[0]
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    mass = trace.block_mass.values[0]
    seen = (mass > 0).all(0)
    row = [
        *range(2),
        *range(12, 18),
        28,
    ]  # of token 14, in block 7: the ends, and a block on either side
    assert np.flatnonzero(seen[14]).tolist() == row
    assert seen[:2].all()
    assert seen[28].all()
    assert trace.length == 29
    q, k = _states(root, inputs)
    logits = torch.einsum("hid,hjd->hij", q, k)[:, 14, row] * 8**-0.5
    logits[:, :2] += np.log(3)
    np.testing.assert_allclose(mass[:, 14, row], logits.softmax(-1), atol=1e-5)


def _states(root, inputs):
    seen = {}
    attention = root.encoder.layer[0].attention.self
    hook = attention.register_forward_pre_hook(lambda _, args: seen.update(states=args[0]))
    with torch.no_grad():
        root(**inputs)
        hook.remove()
        parts = attention.query(seen["states"]), attention.key(seen["states"])
    return [one[0].unflatten(-1, (3, 8)).transpose(0, 1) for one in parts]


def test_longt5_is_a_band_with_the_bias_of_t5():
    root = built("longt5").get_encoder()
    model = lens.load(root)
    assert model.check < 1e-5
    inputs = {"input_ids": IDS}
    with torch.no_grad(), switched(root, "eager"):
        own = root(**inputs, output_attentions=True)
    trace = lens.capture(model, inputs, block_size=1, progress=False)
    for layer, weights in enumerate(own.attentions):
        found = trace.block_mass.values[layer]
        for row in range(29):
            block, place = divmod(row, 4)
            keys = np.arange(12) + 4 * (block - 1)
            inside = (keys >= 0) & (keys < 29)
            expected = weights[0, block, :, place].numpy()
            np.testing.assert_allclose(found[:, row, keys[inside]], expected[:, inside], atol=1e-5)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def own_probabilities(root, kind, place, inputs):
    """What modules of a class return at a place of their output."""
    found = []
    modules = [one for one in root.modules() if type(one).__name__ == kind]
    hooks = [
        one.register_forward_hook(lambda *given: found.append(given[-1][place])) for one in modules
    ]
    with torch.no_grad():
        output = root(**inputs).last_hidden_state
    for hook in hooks:
        hook.remove()
    return output, found


def test_longt5_sees_the_sums_of_its_blocks_too():
    root = built("longt5 global").get_encoder()
    model = lens.load(root)
    trace = lens.capture(model, IDS, block_size=1, progress=False)[0]
    asked = {"input_ids": IDS, "output_attentions": True}
    kind = "LongT5TransientGlobalAttention"
    output, weights = own_probabilities(root, kind, 2, asked)
    assert (model.check or 0) < 1e-5
    assert trace.tokens[28:] == [str(int(IDS[0, 28])), *(f"[block {block}]" for block in range(5))]
    assert trace.query_tokens == trace.tokens[:29]
    for layer, pieces in enumerate(
        weights
    ):  # [1, blocks, heads, rows, keys of three blocks, then 5]
        whole = np.zeros((3, 40, 53))
        for block, own in enumerate(pieces[0].numpy()):
            whole[:, 4 * block : 4 * block + 4, 4 * block : 4 * block + 12] = own[..., :-5]
        found = trace.block_mass.values[layer]
        np.testing.assert_allclose(found[..., :29], whole[:, :29, 4:33], atol=1e-5)
        beside = pieces[0, ..., -5:].permute(1, 0, 2, 3).flatten(1, 2)[:, :29]
        np.testing.assert_allclose(found[..., 29:], beside, atol=1e-5)
    with torch.no_grad(), lens.edit(model, lens.edits.Ablate(["L0H0"])):
        edited = root(input_ids=IDS)[0]
    root.block[0].layer[0].TransientGlobalSelfAttention.o.weight.data[:, :8] = 0
    with torch.no_grad():
        torch.testing.assert_close(edited, root(input_ids=IDS)[0], atol=1e-5, rtol=1e-5)
    assert float((edited - output).abs().max()) > 1e-3


def test_the_global_tokens_of_pegasus_x_stand_behind_the_others():
    root = built("pegasus x")
    model = lens.load(root)
    assert (model.check or 0) < 1e-5
    target = torch.tensor([[1, 7, 9]])
    traces = lens.capture(model, (IDS[0], target[0].tolist()), block_size=1, progress=False)
    encoder = traces.encoder
    assert (traces.decoder.cross, traces.cross.cross) == (False, True)
    assert encoder.tokens == encoder.query_tokens
    assert encoder.tokens[29:] == [f"[global {number}]" for number in range(4)]
    inputs = {"input_ids": IDS, "decoder_input_ids": target}
    _, weights = own_probabilities(root, "PegasusXGlobalLocalAttention", 2, inputs)
    for layer, own in enumerate(weights):
        found, start = encoder.block_mass.values[layer], 3 * (layer % 2)  # every other is staggered
        tokens, everywhere = own["local"][0].numpy(), own["global"][0].numpy()
        np.testing.assert_allclose(found[:, 29:, 29:], everywhere[..., :4], atol=1e-5)
        np.testing.assert_allclose(
            found[:, 29:, :29], everywhere[..., 4 + start : 33 + start], atol=1e-5
        )
        whole = np.zeros((3, tokens.shape[1] * 6, tokens.shape[1] * 6))
        for block in range(tokens.shape[1]):
            own = slice(6 * block, 6 * block + 6)
            whole[:, own, own] = tokens[:, block, :, 4:]
        inside = slice(start, start + 29)
        np.testing.assert_allclose(found[:, :29, :29], whole[:, inside, inside], atol=1e-5)
        beside = tokens[..., :4].reshape(3, -1, 4)[:, inside]
        np.testing.assert_allclose(found[:, :29, 29:], beside, atol=1e-5)
