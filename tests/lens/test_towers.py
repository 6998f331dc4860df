"""Models of several encoders side by side: each tower as it works inside the whole."""

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.traces.parts import TraceParts


def _clip(kind=transformers.CLIPConfig, model=transformers.CLIPModel):
    torch.manual_seed(0)
    text = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 16}
    picture = {"image_size": 8, "patch_size": 2, "hidden_size": 32, "intermediate_size": 20}
    picture |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    ends = {"eos_token_id": 52, "bos_token_id": 51, "pad_token_id": 0}
    config = kind(text_config=text | ends, vision_config=picture)
    config.projection_dim = 16
    return model._from_config(config).eval()


INPUTS = {
    "input_ids": torch.tensor([[51, 7, 9, 11, 52]]),
    "pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),
}
MODELS = {
    "clip": (transformers.CLIPConfig, transformers.CLIPModel),
    "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_towers_are_captured_from_the_whole(name, tmp_path):
    root = _clip(*MODELS[name])
    model = lens.load(root)
    assert {one: tower.info.layers for one, tower in model.towers.items()} == {
        "text": 2,
        "vision": 3,
    }
    assert model.check < 1e-5
    found = lens.capture(
        model, INPUTS, block_size=1, keep_qk=True, progress=False, out=tmp_path / "t"
    )
    root.set_attn_implementation("eager")
    with torch.no_grad():
        own = root(**INPUTS, output_attentions=True)
    for one in ("text", "vision"):
        eager = own[f"{one}_model_output"].attentions
        for maps, weights in zip(found[one].block_mass.values, eager, strict=True):
            np.testing.assert_allclose(maps, weights[0], atol=1e-5)
    assert found.text.tokens == ["51", "7", "9", "11", "52"]
    assert found.vision.overlay("L2H1", query=(1, 1)).values.shape == (1, 4, 4)
    again = TraceParts.load(tmp_path / "t")
    assert sorted(again) == ["text", "vision"]
    assert set(lens.profile(again)["part"]) == {"text", "vision"}


def test_an_edit_of_one_tower_changes_what_the_whole_says():
    root = _clip()
    model = lens.load(root)
    with torch.no_grad():
        own = root(**INPUTS).logits_per_image
        with lens.edit(model.part("vision"), lens.edits.Ablate(["L1H2"])):
            edited = root(**INPUTS)
    assert float((edited.logits_per_image - own).abs()) > 1e-4
    torch.testing.assert_close(edited.text_embeds, root(**INPUTS).text_embeds)


def test_a_whole_that_gives_no_numbers_is_refused():
    root = _clip()
    with torch.no_grad():
        root.logit_scale.fill_(torch.nan)
    with pytest.raises(LensError, match="does not reproduce CLIPModel: its output differs by nan"):
        lens.load(root)


def test_what_is_asked_of_towers_without_saying_which_is_refused():
    model = lens.load(_clip())
    with pytest.raises(LensError, match=r"has 2 towers, .* say which: model.part\('text'\)"):
        lens.heads.weights.composition(model)
    with pytest.raises(
        LensError, match=r"say which: model.part\('text'\) or model.part\('vision'\)"
    ):
        lens.edit(model, lens.edits.Ablate(["L0H0"])).__enter__()
    with pytest.raises(
        LensError, match="reads several things at once: pass what its processor makes"
    ):
        lens.capture(model, "a cat")
    with pytest.raises(LensError, match=r"pixel_values \[2, 3, 8, 8\] must hold one prompt"):
        lens.capture(model, INPUTS | {"pixel_values": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(LensError, match="reads several things at once; run it yourself"):
        model.logits("a cat")
    with pytest.raises(LensError, match=r"towers read several things .* leave labels out"):
        lens.capture(model, INPUTS, labels={"a": ([1] * 5, [1] * 5)})
