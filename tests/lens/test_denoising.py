"""Diffusion models: every attention of every step is the denoiser's own, its words and places named."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError

diffusers = pytest.importorskip("diffusers")
from tests.lens.denoisers import DENOISERS, WORDS, flux, pixart, sd3, unet, wan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def own_probabilities(model, inputs):
    """[(batch, heads, queries, keys)] of every attention of a pass, by the definition, from what torch is asked for."""
    found, own = [], torch.nn.functional.scaled_dot_product_attention

    def asked(query, key, value, attn_mask=None, **options):
        scale = options.get("scale") or query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scale
        if attn_mask is not None:
            logits = logits + attn_mask
        found.append(logits.softmax(-1))
        return own(query, key, value, attn_mask=attn_mask, **options)

    torch.nn.functional.scaled_dot_product_attention = asked
    try:
        with torch.no_grad():
            output = model(**inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = own
    return found, output[0]


def captured(model, inputs, **options):
    with torch.no_grad(), lens.traces.denoising(model, block_size=1, **options) as found:
        output = model(**inputs)
    return found[0], output[0]


@pytest.mark.parametrize("name", DENOISERS)
def test_maps_and_output_are_those_of_the_denoisers_own_path(name):
    model, inputs = DENOISERS[name]()
    expected, own = own_probabilities(model, inputs)
    found, output = captured(model, inputs)
    assert found.check < 1e-5
    torch.testing.assert_close(output, own, atol=1e-5, rtol=1e-5)
    traces = {part: found.trace(part) for part in found.parts}
    layers = sorted(
        (trace.attrs["modules"][number], part, layer)
        for part, trace in traces.items()
        for number, layer in enumerate(trace.layers)
    )
    assert len(layers) == len(expected)
    every = [
        traces[part].dataset["block_mass"].sel(layer=layer).values for _, part, layer in layers
    ]
    for probabilities in expected:  # of the last row, which has the prompt
        row = probabilities[-1].numpy()
        off = [np.abs(one - row).max() for one in every if one.shape == row.shape]
        assert min(off) < 1e-5
        every.pop(
            [one.shape == row.shape and np.abs(one - row).max() < 1e-5 for one in every].index(True)
        )


def test_processors_that_write_the_softmax_out_are_followed():
    from diffusers.models.attention_processor import AttnProcessor

    model, inputs = unet()
    plain, _ = captured(model, inputs)
    model.set_attn_processor(AttnProcessor())
    found, _ = captured(model, inputs)
    for part in plain.parts:
        expected = plain.trace(part).block_mass.values
        np.testing.assert_allclose(found.trace(part).block_mass.values, expected, atol=1e-5)


@pytest.mark.parametrize(("made", "first"), [(flux, 0), (sd3, 12)])
def test_quadrants_of_joint_attention_and_maps_of_words(made, first):
    model, inputs = made()
    names = [f"word{number}" for number in range(WORDS)]
    expected, _ = own_probabilities(model, inputs)
    found, _ = captured(model, inputs, text=names, keep_qk=True)
    trace = found.trace("joint")
    assert trace.tokens[first : first + WORDS] == names
    own = next(p[-1].numpy() for p in expected if p.shape[-1] == 12 + WORDS)
    text = np.zeros(12 + WORDS, bool)
    text[first : first + WORDS] = True
    table = found.table().query("part == 'joint' and layer == 0")
    for name, rows, keys in (
        ("text_to_text", text, text), ("text_to_image", text, ~text),
        ("image_to_text", ~text, text), ("image_to_image", ~text, ~text),
    ):  # fmt: skip
        mass = own[:, rows][:, :, keys].sum(-1).mean(-1)
        np.testing.assert_allclose(table[name], mass, atol=1e-5)
    maps = found.maps("word3", "joint", heads="L0H1")
    column = own[1, :, first + 3][~text]
    np.testing.assert_allclose(maps[0].ravel(), column, atol=1e-5)
    drawn = trace.overlay("L0H1", key="word3").values[0]
    np.testing.assert_allclose(drawn, maps[0], atol=1e-9)
    assert [one.kind for one in found.findings()][:3] == ["quadrants", "quadrants", "entropy"]
    share = text.sum() / trace.length
    assert f"; uniform attention {share:.1%} (mean and range of" in found.findings()[0]
    assert f"; uniform attention {1 - share:.1%} (mean and range of" in found.findings()[1]


def test_padded_words_get_nothing_and_have_a_map():
    model, inputs = pixart()
    found, _ = captured(model, inputs, keep_qk=True)
    maps = np.stack([found.maps(word, "cross")[0] for word in range(WORDS)])
    assert maps.shape == (WORDS, 4, 3)
    np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)
    assert np.all(maps[4:] == 0)
    table = found.table()
    assert (
        table.loc[table["part"] == "cross", "keys"].eq(4).all()
    )  # what padding fills is seen by none
    assert f"at most {np.log(4):.2f}" in " ".join(found.findings())
    trace = found.trace("cross")
    np.testing.assert_allclose(
        trace.overlay("L1", key=2).values[0], found.maps(2, "cross", heads="L1")[0]
    )
    with pytest.raises(LensError, match=r"here the picture looks .* overlay\(key=...\)"):
        trace.overlay(query=2)


def test_videos_have_a_map_for_each_frame():
    model, inputs = wan()
    found, _ = captured(model, inputs, keep_qk=True)
    assert found.trace("self").tokens[:2] == ["0,0,0", "0,0,1"]
    assert found.maps(1, "cross").shape == (1, 3, 4, 3)
    with pytest.raises(LensError, match="it is a video of several pictures"):
        found.trace("self").overlay()


def test_steps_are_those_of_the_timestep_and_others_run_as_ever(tmp_path):
    model, inputs = flux()
    seen = []
    with torch.no_grad(), lens.traces.denoising(model, steps=[0, 2], keep_qk=True) as found:
        for time in (0.9, 0.9, 0.5, 0.1, 0.1):  # two passes a step: with the prompt, and without
            inputs["timestep"] = torch.tensor([time])
            seen.append(model(**inputs)[0])
    one = found[0]
    assert (one.steps, one.timesteps) == ((0, 2), (pytest.approx(0.9), pytest.approx(0.1)))
    assert "forward" not in vars(model)
    assert one.maps(0).shape == (2, 3, 4)
    assert one.trace(step=0).attrs["step"] == 0
    again = lens.traces.AttentionTrace.load(one.trace(step=2).save(tmp_path / "trace"))
    assert (again.part, again.attrs["latents"][0]) == ("joint", [3, 4])
    np.testing.assert_array_equal(
        again.overlay(key=1).values, one.trace(step=2).overlay(key=1).values
    )
    drawn = one.plot(0, heads="L0H1")
    assert [step.label for step in drawn.layout.sliders[0].steps] == ["0", "2"]
    np.testing.assert_array_equal(drawn.data[1].z, one.maps(0, heads="L0H1")[1])
    assert one.plot().data[0].x.tolist() == [0, 2]
    assert one.plot().layout.xaxis.tickvals == (0, 1, 2)
    rows, columns = drawn.data[0].z.shape
    assert drawn.layout.xaxis.tickvals == tuple(range(columns))
    assert drawn.layout.yaxis.tickvals == tuple(range(rows))
    moved = lens.policies.transfer([one.trace(step=step) for step in one.steps])
    assert moved.table()["efficiency"].between(0.5, 1.0001).all()
    with pytest.raises(LensError, match=r"parts joint at steps 0, 2; got part='cross'"):
        one.trace("cross")


def test_the_words_of_a_pipeline_are_those_of_its_tokenizer(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(number) for number in range(97, 123)]
    vocab = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={name: number for number, name in enumerate(vocab)}, merges=[], model_max_length=WORDS
    )
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    config = CLIPTextConfig(
        **sizes, num_attention_heads=2, vocab_size=len(vocab), max_position_embeddings=WORDS,
        bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1,
    )  # fmt: skip
    model, _ = unet()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8], in_channels=3, out_channels=3, norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
        latent_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(config).eval(), tokenizer=tokenizer, unet=model,
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with lens.traces.denoising(pipe, steps=[1], keep_qk=True) as found:
        pipe("a c b", num_inference_steps=3, output_type="latent", height=8, width=8)
    trace = found[0].trace("cross 8×8")
    assert trace.tokens[:5] == ["<|startoftext|>", "a</w>", "c</w>", "b</w>", "<|endoftext|>"]
    assert found[0].maps("c</w>", "cross 8×8").shape == (1, 8, 8)


def test_what_cannot_be_recorded_is_refused():
    model, inputs = flux()
    with (
        pytest.raises(LensError, match="a denoiser is a diffusers pipeline"),
        lens.traces.denoising(torch.nn.Linear(2, 2)),
    ):
        pass
    with (
        pytest.raises(LensError, match="no chosen step"),
        lens.traces.denoising(model, steps=[3]),
        torch.no_grad(),
    ):
        model(**inputs)
    with pytest.raises(LensError, match=f"text must name {WORDS} positions"):
        captured(model, inputs, text=["one"])
    with (
        pytest.raises(LensError, match="is in training mode"),
        lens.traces.denoising(model.train()),
    ):
        pass


def test_groups_of_one_size_but_other_heads_have_names_of_their_own():
    """The later one took the place of the earlier."""
    model, inputs = unet()
    model.mid_block.attentions[0].transformer_blocks[0].attn1.heads *= 2
    found, _ = captured(model, inputs)
    parts = [part for part in found.parts if part.startswith("self")]
    layers = [layer for part in parts for layer in found.trace(part).layers]
    plain, _ = captured(*unet())
    assert sorted(layers) == sorted(
        layer
        for part in plain.parts
        if part.startswith("self")
        for layer in plain.trace(part).layers
    )
