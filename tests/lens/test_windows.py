"""Attention in windows, on reduced keys and along the frames of a video: put back where it belongs, as `eager` has it."""

import json
from itertools import product

import numpy as np
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes.interface import switched
from lens.traces.parts import TraceParts

SWIN = {"image_size": (16, 20), "patch_size": 2, "embed_dim": 12, "depths": [2, 2]}
SWIN |= {"num_heads": [2, 3], "window_size": 3, "num_channels": 3, "mlp_ratio": 2.0}
SAM = {"image_size": 40, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2}
SAM |= {"num_attention_heads": 3, "window_size": 2}
PVT = {"image_size": 24, "num_encoder_blocks": 2, "depths": [1, 2], "hidden_sizes": [8, 12]}
PVT |= {
    "num_attention_heads": [2, 3],
    "patch_sizes": [4, 2],
    "strides": [4, 2],
    "mlp_ratios": [2, 2],
}


def _swin(kind=transformers.SwinConfig):
    return kind(**SWIN)


def _sam():
    return transformers.SamVisionConfig(
        **SAM, global_attn_indexes=[1], mlp_dim=20, output_channels=8
    )


def _vitdet():
    return transformers.VitDetConfig(
        **SAM, window_block_indices=[0], use_relative_position_embeddings=True, mlp_ratio=2
    )


def _segformer():
    overlapping = {**PVT, "patch_sizes": [3, 3]}
    return transformers.SegformerConfig(**overlapping, sr_ratios=[2, 1], decoder_hidden_size=8)


def _pvt():
    return transformers.PvtConfig(**PVT, sequence_reduction_ratios=[2, 1])


def _timesformer():
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 3, "hidden_size": 24}
    return transformers.TimesformerConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )


def _hiera():
    sizes = {
        "image_size": [32, 48],
        "patch_size": [3, 3],
        "patch_padding": [1, 1],
        "patch_stride": [2, 2],
    }
    sizes |= {"embed_dim": 12, "depths": [2] * 4, "num_heads": [1, 2, 3, 3], "num_query_pool": 3}
    sizes |= {
        "masked_unit_size": [8, 8],
        "masked_unit_attention": [True, True, False, False],
        "mlp_ratio": 2.0,
    }
    return transformers.HieraConfig(**sizes)


CONFIGS = {
    "swin": _swin,
    "swin v2": lambda: _swin(transformers.Swinv2Config),
    "sam": _sam,
    "vitdet": _vitdet,
    "segformer": _segformer,
    "pvt": _pvt,
    "timesformer": _timesformer,
    "hiera": _hiera,
}


def built(name, implementation=None):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    root = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.3 * torch.randn(weight.shape) / max(1, weight[0].numel() / 9) ** 0.5)
    size = getattr(root.config, "image_size", 24)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    frames = (3,) if name == "timesformer" else ()
    generator = torch.Generator().manual_seed(1)
    return root, {"pixel_values": torch.randn(1, *frames, 3, height, width, generator=generator)}


def eager(root, inputs):
    """Output and, of each attention in the order of the pass, its probabilities as the model has them."""
    found, hooks = [], []

    def keep(module, _, output):
        if isinstance(output, tuple) and len(output) > 1 and torch.is_tensor(output[1]):
            found.append(output[1].reshape(-1, heads_of(module), *output[1].shape[-2:]))

    def heads_of(module):
        return getattr(module, "num_heads", getattr(module, "num_attention_heads", None))

    for one in root.modules():
        if "Attention" in type(one).__name__ and heads_of(one):
            hooks.append(one.register_forward_hook(keep))
    with torch.no_grad(), switched(root, "eager"):
        asked = {} if "segformer" in root.config.model_type else {"output_attentions": True}
        output = root(**inputs, **asked)[0]
    for hook in hooks:
        hook.remove()
    return output, found


def put_back(weights, grid, window, shift):
    """[heads, positions, positions] of [windows, heads, n, n], entry by entry: patches first, then padding."""
    height, width = grid
    padded = (-(-height // window) * window, -(-width // window) * window)
    cells = list(product(range(padded[0]), range(padded[1])))
    inside = [cell for cell in cells if cell[0] < height and cell[1] < width]
    names = inside + [cell for cell in cells if cell not in inside]
    numbers = {cell: number for number, cell in enumerate(names)}
    whole = np.zeros((weights.shape[1], len(names), len(names)))
    starts = product(range(0, padded[0], window), range(0, padded[1], window))
    for own, (top, left) in zip(weights.numpy(), starts, strict=True):
        places = [
            numbers[(top + row + shift) % padded[0], (left + column + shift) % padded[1]]
            for row, column in product(range(window), range(window))
        ]
        whole[:, np.array(places)[:, None], places] = own
    return whole


@pytest.mark.parametrize("name", ["swin", "swin v2"])
def test_shifted_windows_go_back_to_the_picture(name, tmp_path):
    root, inputs = built(name)
    model = lens.load(root)
    assert model.check < 1e-5
    assert {part: (info.layers, info.heads) for part, info in model.parts.items()} == {
        "stage0": (2, 2),
        "stage1": (2, 3),
    }
    with pytest.raises(
        LensError, match=r"each part of Swin.* \(stage0, stage1\) .*leave labels out"
    ):
        lens.capture(model, inputs, labels={"own": ([1], [1])}, progress=False)
    traces = lens.capture(model, inputs, block_size=1, keep_qk=True, progress=False)
    _, weights = eager(root, inputs)
    for stage, grid in enumerate([(8, 10), (4, 5)]):
        trace = traces[f"stage{stage}"]
        assert trace.tokens[: grid[1] + 1] == [*(f"0,{column}" for column in range(grid[1])), "1,0"]
        assert trace.attrs["patches"] == {"first": 0, "height": grid[0], "width": grid[1]}
        assert {token[:4] for token in trace.tokens[grid[0] * grid[1] :]} == {"[PAD"}
        assert trace.attrs["partition"]["of"] == [0, 1]
        again = lens.traces.AttentionTrace.load(trace.save(tmp_path / f"stage{stage}"))
        for layer, shift in enumerate((0, 1)):
            own = put_back(weights[2 * stage + layer], grid, 3, shift)
            np.testing.assert_allclose(trace.block_mass.values[layer], own, atol=1e-5)
            for head, one in product(range(trace.heads), (trace, again)):
                found = one.tile(layer, head, (0, one.length), (0, one.length))
                np.testing.assert_allclose(found, own[head], atol=5e-6)
                np.testing.assert_allclose(one.tile(layer, head, (3, 9), (7, 20)), found[3:9, 7:20])
            patch = grid[1] + 2
            row, column = (
                trace.overlay(f"L{layer}H1", **{side: (1, 2)}).values[0].ravel()
                for side in ("query", "key")
            )
            patches = grid[0] * grid[1]
            np.testing.assert_allclose(row, own[1, patch, :patches], atol=5e-6)
            np.testing.assert_allclose(column, own[1, :patches, patch], atol=5e-6)
        # a shift brings the two edges of the picture into one window, and they do not see each other
        assert trace.visible.values[1].max() <= 9
        assert trace.visible.values[1].min() < 9
        assert np.allclose(trace.overlay("L1H1").values.shape, (1, *grid))


@pytest.mark.parametrize("name", ["sam", "vitdet"])
def test_windows_and_the_whole_picture_share_a_trace(name):
    root, inputs = built(name)
    model = lens.load(root)
    assert model.check < 1e-5
    trace = lens.capture(model, inputs, block_size=1, progress=False)
    _, weights = eager(built(name, "eager")[0], inputs)  # SAM chooses the class when it is made
    assert "bias" not in trace.dataset
    with_qk = lens.capture(model, inputs, keep_qk=True, progress=False)
    with pytest.raises(LensError, match="depends on more than how far apart two patches are"):
        with_qk.tile(0, 0, (0, 1), (0, 5))
    own = put_back(weights[0], (5, 5), 2, 0)
    np.testing.assert_allclose(trace.block_mass.values[0], own, atol=1e-5)
    np.testing.assert_allclose(trace.block_mass.values[1, :, :25, :25], weights[1][0], atol=1e-5)
    assert (
        float(trace.block_mass.values[1, :, 25:].sum()) == 0
    )  # padding of the windows is in no other layer
    assert trace.tokens[24:26] == ["4,4", "[PAD 0,5]"]


@pytest.mark.parametrize("name", ["segformer", "pvt"])
def test_reduced_keys_have_a_grid_of_their_own(name, tmp_path):
    root, inputs = built(name)
    model = lens.load(root)
    assert model.check < 1e-5
    traces = lens.capture(model, inputs, block_size=1, progress=False, out=tmp_path / "t")
    _, weights = eager(root, inputs)
    first, second = traces.stage0, traces.stage1
    assert (first.queries, first.length, first.cross) == (36, 9, True)
    assert first.tokens[3:5] == ["1,0", "1,1"]
    assert first.query_tokens[5:7] == ["0,5", "1,0"]
    assert first.attrs["query_patches"]["height"] == 6
    assert "diagonal" not in first.dataset  # no distance from a patch to a cell of another grid
    extra = name == "pvt"
    assert (second.queries, second.length, second.cross) == (9 + extra, 9 + extra, False)
    assert second.tokens[0] == ("[CLS]" if extra else "0,0")
    found = [first.block_mass.values[0], *second.block_mass.values]
    for maps, own in zip(found, weights, strict=True):
        np.testing.assert_allclose(maps, own[0], atol=1e-5)
    assert first.overlay("L0H1").values.shape == (1, 3, 3)
    again = TraceParts.load(tmp_path / "t")
    assert again.stage0.cross
    assert not again.stage1.cross
    assert set(lens.profile(again)["part"]) == {"stage0", "stage1"}


def test_a_video_is_attended_along_its_frames_and_in_each():
    root, inputs = built("timesformer")
    model = lens.load(root)
    assert model.check < 1e-5
    traces = lens.capture(model, inputs, block_size=1, keep_qk=True, progress=False)
    _, weights = eager(root, inputs)
    time, space = traces.time, traces.space
    for one in (time, space):
        whole = one.tile(1, 2, (0, one.length), (0, one.length))
        np.testing.assert_allclose(whole, one.block_mass.values[1, 2], atol=5e-6)
    assert time.tokens[:5] == ["0,0,0", "0,0,1", "0,1,0", "0,1,1", "1,0,0"]
    assert space.tokens[:2] == ["[CLS 0]", "0,0,0"]
    found = time.block_mass.values.reshape(
        2, 3, 3, 4, 3, 4
    )  # layer, head, frame, place, frame, place
    inside = space.block_mass.values.reshape(2, 3, 3, 5, 3, 5)
    own = [one for one in weights if one.shape[-1] == 5]
    for layer, frame in product(range(2), range(3)):
        np.testing.assert_allclose(inside[layer, :, frame, :, frame], own[layer][frame], atol=1e-5)
    np.testing.assert_allclose(np.einsum("lhfpgp->lhpfg", found).sum(-1), 1, atol=1e-5)
    assert np.isclose(inside.sum(), 2 * 3 * 15)


def test_mask_units_pool_their_queries():
    root, inputs = built("hiera")
    model = lens.load(root)
    assert model.check < 1e-5
    assert list(model.parts) == [
        "stage0",
        *(f"{kind}{n}" for n in (1, 2, 3) for kind in ("pool", "stage")),
    ]
    traces = lens.capture(model, inputs, block_size=1, progress=False)
    own = {}
    for number, stage in enumerate(root.encoder.stages):
        for layer, one in enumerate(stage.layers):
            read = lambda module, args, key=(number, layer): own.update({key: (module, args[0])})  # noqa: E731
            one.attn.register_forward_pre_hook(read)
    with torch.no_grad():
        root(**inputs)
    for (number, layer), (attention, states) in own.items():
        pools = number > 0 and layer == 0
        trace = traces[f"{'pool' if pools else 'stage'}{number}"]
        found = trace.block_mass.values[0 if pools else layer - (number > 0)]
        level = number - pools  # of the keys
        height, width, side = 16 // 2**level, 24 // 2**level, 8 // 2**level
        assert trace.attrs["patches"] == {"first": 0, "height": height, "width": width}
        assert trace.tokens[width] == "1,0"
        # in the order of the picture, then by hand: a row, and the positions of its unit
        picture = root.encoder.reroll(states, level).flatten(1, 2)
        q, k, _ = attention.qkv(picture).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        places = np.arange(height * width)
        for row in range(found.shape[1]):
            top, left = divmod(row, width // 2 if pools else width)
            cells = [(top, left)]
            if pools:
                cells = [(2 * top + a, 2 * left + b) for a, b in product(range(2), range(2))]
            query = q[0, [r * width + c for r, c in cells]].amax(0)
            unit = cells[0][0] // side, cells[0][1] // side
            inside = (places // width // side == unit[0]) & (places % width // side == unit[1])
            logits = torch.einsum("hd,khd->hk", query, k[0]) * attention.scale
            if attention.use_mask_unit_attn:
                logits[:, ~inside] = -torch.inf
            np.testing.assert_allclose(found[:, row], logits.softmax(-1).detach(), atol=1e-5)
    # a head taken out is its columns of the projection set to zero
    with torch.no_grad():
        with lens.edit(model.part("pool1"), lens.edits.Ablate("L0H1")):
            edited = root(**inputs)[0]
        root.encoder.stages[1].layers[0].attn.proj.weight[:, 12:] = 0
        torch.testing.assert_close(edited, root(**inputs)[0], atol=1e-5, rtol=1e-5)


def test_characters_and_molecules_are_parts():
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
    }
    sizes |= {"num_hash_functions": 2, "num_hash_buckets": 64, "local_transformer_stride": 16}
    root = transformers.CanineModel(
        transformers.CanineConfig(**sizes, max_position_embeddings=90)
    ).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.3 * torch.randn(weight.shape) / max(1, weight[0].numel() / 9) ** 0.5)
    model = lens.load(root)
    assert (model.check or 0) < 1e-5
    ids = torch.randint(60, 120, (1, 43))
    traces = lens.capture(model, ids[0].tolist(), block_size=1, progress=False)
    chunks = []
    characters = root.initial_char_encoder.layer[0].attention.self
    hook = characters.register_forward_hook(lambda *given: chunks.append(given[-1][1]))
    with torch.no_grad():
        _, *molecules, final = root(ids, output_attentions=True).attentions
    hook.remove()
    found = traces.initial.block_mass.values[0]
    for number, own in enumerate(chunks):
        chunk = slice(16 * number, min(16 * number + 16, 43))
        np.testing.assert_allclose(found[:, chunk, chunk], own[0], atol=1e-5)
    assert len(chunks) == 3
    assert np.isclose(found.sum(), 3 * 43)
    for layer, own in enumerate(molecules):
        np.testing.assert_allclose(traces.molecules.block_mass.values[layer], own[0], atol=1e-5)
    np.testing.assert_allclose(traces.final.block_mass.values[0], final[0], atol=1e-5)
    assert traces.molecules.tokens[:3] == ["[CLS]", "0-3", "4-7"]
    assert traces.initial.tokens == traces.final.tokens == list(map(str, ids[0].tolist()))


def test_the_stages_of_a_tower_are_towers():
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 3}
    vision = {
        **sizes,
        "depths": [2, 1, 1],
        "num_group_tokens": [4, 2, 0],
        "num_output_groups": [4, 2, 0],
    }
    text = {
        **sizes,
        "num_hidden_layers": 2,
        "vocab_size": 99,
        "bos_token_id": 1,
        "eos_token_id": 98,
    }
    config = transformers.GroupViTConfig(
        text_config=text, vision_config={**vision, "image_size": 16, "patch_size": 4}
    )
    torch.manual_seed(0)
    root = transformers.GroupViTModel(config).eval()
    model = lens.load(root)
    assert list(model.towers) == ["text", "vision_stage0", "vision_stage1", "vision_stage2"]
    inputs = {"input_ids": torch.tensor([[5, 6, 98]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    traces = lens.capture(model, inputs, block_size=1, progress=False)
    kept = []
    for stage in root.vision_model.encoder.stages:
        for layer in stage.layers:
            layer.self_attn.register_forward_hook(lambda *given: kept.append(given[-1][1]))
    with torch.no_grad(), switched(root, "eager"):
        own = root(**inputs).logits_per_image
        with lens.edit(model.part("vision_stage1"), lens.edits.Ablate("L0H1")):
            edited = root(**inputs).logits_per_image
    assert float((own - edited).abs().max()) > 1e-5
    maps = [one for stage in range(3) for one in traces[f"vision_stage{stage}"].block_mass.values]
    for found, expected in zip(maps, kept[:4], strict=True):
        np.testing.assert_allclose(found, expected[0].view(found.shape), atol=1e-5)


def test_in_time_a_place_sees_itself_in_every_frame():
    root, inputs = built("timesformer")
    layer = root.encoder.layer[0]
    seen = {}
    layer.temporal_attention.register_forward_pre_hook(lambda _, args: seen.update(states=args[0]))
    trace = lens.capture(lens.load(root).part("time"), inputs, block_size=1, progress=False)
    attention = layer.temporal_attention.attention
    with torch.no_grad():
        q, k, _ = attention.qkv(seen["states"]).unflatten(-1, (3, 3, 8)).unbind(2)
        own = torch.einsum("pihd,pjhd->phij", q, k).mul(8**-0.5).softmax(-1)
    found = trace.block_mass.values[0].reshape(3, 3, 4, 3, 4)
    np.testing.assert_allclose(np.einsum("hfpgp->phfg", found), own, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partition": {"of": [0, 9], "parts": [[0] * 4]}}, "partition.of must name"),
        ({"partition": {"of": [0, 0], "parts": [[0] * 4]}}, "one part per token"),
        ({"cells": [[0, 0]]}, "one row and column per token"),
        ({"cells": None}, "bias of shape"),
    ],
)
def test_a_damaged_layout_is_refused(change, said, tmp_path):
    root, inputs = built("swin")
    trace = lens.capture(lens.load(root).part("stage1"), inputs, keep_qk=True, progress=False)
    path = trace.save(tmp_path / "trace") / "trace.json"
    index = json.loads(path.read_text())
    index["attributes"] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(LensError, match=said):
        lens.traces.AttentionTrace.load(tmp_path / "trace")


def test_masked_keys_and_ablated_heads_are_those_of_the_picture():
    root, inputs = built("swin")
    model = lens.load(root).part("stage0")
    width, window = 10, 3
    attention = root.encoder.layers[0].blocks[1].attention
    shift = root.encoder.layers[0].blocks[1].shift_size
    place = (4, 7)  # of the picture; after the roll one up and left
    row, column = place[0] - shift, place[1] - shift
    number = (row // window) * (-(-width // window)) + column // window

    def hidden(_, args):
        mask = args[1].clone()
        mask[number, :, (row % window) * window + column % window] = -1e9
        return (args[0], mask)

    def silent(_, args):
        return (args[0].unflatten(-1, (2, -1)).mul(torch.tensor([1.0, 0.0])[:, None]).flatten(-2),)

    edits = lens.edits.Mask([place[0] * width + place[1]], layers=[1]), lens.edits.Ablate("L1H1")
    hooks = (attention, hidden), (attention.o_proj, silent)
    for edit, (module, by_hand) in zip(edits, hooks, strict=True):
        with torch.no_grad():
            with lens.edit(model, edit) as (done,):
                found = root(**inputs)[0]
            hook = module.register_forward_pre_hook(by_hand)
            own = root(**inputs)[0]
            hook.remove()
            plain = root(**inputs)[0]
        assert done.calls == 1
        assert float((own - plain).abs().max()) > 1e-3
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


CLASSIFIERS = {  # the output projection of layer 1 of stage 1, or of the one that pools before it
    "swin": ("Swin", "stage1", "swin.encoder.layers.1.blocks.1.attention.o_proj"),
    "segformer": ("Segformer", "stage1", "segformer.stages.1.blocks.1.attention.o_proj"),
    "pvt": ("Pvt", "stage1", "pvt.encoder.block.1.1.attention.output.dense"),
    "hiera": ("Hiera", "pool1", "hiera.encoder.stages.1.layers.0.attn.proj"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_of_a_stage_is_worth_what_the_task_loses_without_it(name):
    kind, part, path = CLASSIFIERS[name]
    config = CONFIGS[name]()
    config.num_labels = 4
    torch.manual_seed(0)
    root = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    with torch.no_grad():
        for weight in root.parameters():
            weight.add_(0.3 * torch.randn(weight.shape) / max(1, weight.numel() / 200) ** 0.5)
    size = getattr(config, "image_size", 24)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    pixels, labels = torch.randn(3, 3, height, width), torch.tensor([0, 2, 1])
    model = lens.load(root).part(part)
    task = lens.tasks.classification(model, pixels, labels)
    found = lens.heads.importance(model, task, baseline="zero", progress=False).table()
    layer = 0 if part.startswith("pool") else 1
    own = found[found["layer"] == layer].set_index("head")["value"]
    weight, heads = root.get_submodule(path).weight, model.info.heads

    def values():
        return task.sign * task.measure(root(pixel_values=pixels).logits[:, None], torch.arange(3))

    with torch.no_grad():
        clean, kept = values(), weight.clone()
        for head, columns in enumerate(torch.arange(weight.shape[1]).chunk(heads)):
            weight[:, columns] = 0
            lost = float((clean - values()).mean())
            weight.copy_(kept)
            assert own[head] == pytest.approx(lost, abs=1e-4)
    assert own.abs().max() > 1e-3
    with pytest.raises(LensError, match="is of pictures; which heads matter says"):
        lens.effect(model, task, lens.edits.Ablate("L0H0"), progress=False)


def test_several_pictures_at_once_are_recorded_each():
    root, inputs = built("swin")
    model = lens.load(root)
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(-1)])
    with torch.no_grad(), lens.traces.capturing(model, block_size=1) as recorder:
        root(pixel_values=pixels)
    alone = lens.capture(model, {"pixel_values": pixels[1:]}, block_size=1, progress=False)
    record = recorder.records[1]
    assert record.place == "stage0"
    assert len(record.variables["visible"]) == 2
    np.testing.assert_allclose(
        record.variables["block_mass"][1], alone.stage0.block_mass[1], atol=1e-5
    )


def test_what_rests_on_one_list_of_layers_refuses_stages():
    model = lens.load(built("swin")[0])
    with pytest.raises(LensError, match="whose heads are those of its stage0, stage1: say which"):
        model.check_part()
    with pytest.raises(LensError, match="SwinModel has no one list of layers"):
        lens.heads.weights.composition(model.part("stage1"))
