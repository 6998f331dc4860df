"""Pictures go in as people have them, and it is known which part of them a model looks at."""

import numpy as np
import pytest
import skimage.data
import torch
import transformers
from PIL import Image

import lens
from lens.common.errors import LensError
from lens.common.png import pixels_of, png
from lens.passes.pictures import prepared, read_picture
from tests.lens.pictures import HALF, TOWERS, looking_at_bright
from tests.lens.vision_models import IMAGE, build

ZERO = ["..####..", ".##..##.", ".#....#.", ".#....#.", ".#....#.", ".#....#.", ".##..##.", "..####.."]  # fmt: skip
SEVEN = [".######.", ".....##.", ".....#..", "....##..", "..#####.", "...##...", "...#....", "..##...."]  # fmt: skip


def digit(rows):
    return np.array([[255 if cell == "#" else 0 for cell in row] for row in rows], np.uint8)


def test_every_form_of_a_picture_is_the_same_prompt(tmp_path):
    model = lens.load("vit-digits")
    array = digit(ZERO)
    Image.fromarray(array).save(tmp_path / "zero.png")
    given = [
        array,
        array[..., None],
        np.repeat(array[..., None], 3, -1),
        array / 255,
        Image.fromarray(array),
        tmp_path / "zero.png",
        str(tmp_path / "zero.png"),
    ]
    options = {"progress": False, "statistics": ["received"]}
    one = lens.capture(model, {"pixel_values": torch.tensor(array / 127.5 - 1)[None, None].float()}, **options)  # fmt: skip
    traces = lens.capture(model, given, **options)
    for trace in traces:
        assert np.allclose(trace.received, one.received, atol=1e-6)
        assert trace.tokens[:2] == ["[CLS]", "0,0"]
    assert lens.capture(model, array, **options).received.equals(traces[0].received)
    batch = np.stack([array, digit(SEVEN)])[..., None]
    assert [found.length for found in lens.capture(model, batch, **options)] == [17, 17]


def test_the_digits_are_told_apart():
    model = lens.load("vit-digits")
    for rows, label in ((ZERO, 0), (SEVEN, 7)):
        inputs, _ = prepared(model, digit(rows))
        with torch.no_grad():
            assert int(model.model(**inputs).logits.argmax()) == label


def test_a_picture_is_noted_in_the_trace_and_comes_back_from_disk(tmp_path):
    model = looking_at_bright("square")
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    trace = lens.capture(model, picture, progress=False, out=tmp_path / "trace")
    again = lens.traces.AttentionTrace.load(tmp_path / "trace")
    assert np.array_equal(again.overlay().grid.pixels, picture)
    assert again.attrs["picture"] == trace.attrs["picture"]
    assert (again.attrs["picture"]["size"], again.attrs["picture"]["stretched"]) == (
        [24, 24],
        False,
    )


PROCESSORS = {
    "resized": (lambda: transformers.ViTImageProcessorPil(size={"height": 32, "width": 48}, **HALF),
                [(0, 0, 451, 300)]),
    # 300 rows to 256, 451 columns to 384; 16 rows and 80 columns are cut off on each side
    "cropped": (lambda: transformers.CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size=224, **HALF),
                [(80 * 451 / 384, 16 * 300 / 256, 304 * 451 / 384, 240 * 300 / 256)]),
    # padded to a square of 451 with 75 rows above
    "padded": (lambda: transformers.LlavaImageProcessorPil(do_pad=True, size={"height": 112, "width": 112}, crop_size=112, **HALF),
               [(0, -75, 451, 376)]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_part_that_is_looked_at_is_measured_exactly(name):
    make, expected = PROCESSORS[name]
    model = looking_at_bright("square")
    model = lens.load(model.model, processor=make())
    _, picture = prepared(model, skimage.data.chelsea())
    assert len(picture.boxes) == len(expected)
    for found, box in zip(picture.boxes, expected, strict=True):
        assert found == pytest.approx(box, abs=0.8 if name == "padded" else 1e-9)


def test_tiles_of_one_picture_have_boxes_of_their_own():
    processor = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 32},
        do_image_splitting=True,
        **HALF,
    )
    model = lens.load(looking_at_bright("square").model, processor=processor)
    _, picture = prepared(model, skimage.data.chelsea()[:300, :300])
    quarters = [(0, 0, 150, 150), (150, 0, 300, 150), (0, 150, 150, 300), (150, 150, 300, 300)]
    expected = [*quarters, (0, 0, 300, 300)]  # and the whole
    assert [tuple(map(round, box)) for box in picture.boxes] == expected


def vlm():
    network, _, _ = build("llava")
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, **HALF)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    return lens.load(network, processor=processor)


def _words():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, "[UNK]": 1, "what": 2, "is": 3, "this": 4, "user": 5, "<image>": IMAGE}
    words |= {f"w{number}": number for number in range(6, IMAGE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_a_picture_and_a_question_become_one_prompt(tmp_path):
    model = vlm()
    cat = skimage.data.chelsea()
    Image.fromarray(cat).save(tmp_path / "cat.png")
    pairs = [(cat, "what is this"), (str(tmp_path / "cat.png"), "<image> what is this")]
    traces = lens.capture(model, pairs, progress=False, keep_qk=True)
    for trace in traces:
        assert trace.tokens[:2] == ["<image>", "<image>"]
        assert trace.tokens[-3:] == ["what", "is", "this"]
        assert lens.vision.trace_segments(trace).grids == ((0, 0, 4, 4),)
    assert np.array_equal(traces[0].received, traces[1].received)
    overlay = traces[0].overlay("L1H0", query=-1)
    assert overlay.values.shape == (1, 4, 4)
    assert overlay.values[0].ravel() == pytest.approx(traces[0].tile(1, 0, (18, 19), (0, 16))[0])
    text = traces[0].overlay("L1H0")
    assert text.values[0].ravel() == pytest.approx(traces[0].tile(1, 0, (16, 19), (0, 16)).mean(0))
    model.processor.chat_template = (
        "{% for message in messages %}user {% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    )
    said = lens.capture(model, (cat, "what is this"), progress=False)
    assert [said.tokens[0], said.tokens[1], said.tokens[-1]] == ["user", "<image>", "this"]


def test_what_is_no_picture_is_refused_with_what_to_do(tmp_path):
    model = lens.load("vit-digits")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(LensError, match=r"text.png is no picture that Pillow reads"):
        lens.capture(model, tmp_path / "text.png")
    with pytest.raises(LensError, match=r"no picture .*missing.png; give the path"):
        lens.capture(model, "missing.png")
    with pytest.raises(
        LensError, match=r"from 0 to 255, or shares from 0 to 1; got int64 .* to 300"
    ):
        lens.capture(model, np.full((8, 8), 300))
    with pytest.raises(LensError, match=r"or shares from 0 to 1; got float64 .* from nan to nan"):
        lens.capture(model, np.full((8, 8), np.nan))
    with pytest.raises(LensError, match="reads pictures alone; pass the picture without a text"):
        lens.capture(model, (digit(ZERO), "what is this"))
    bare = lens.load(TOWERS["square"][0]().eval())
    with pytest.raises(LensError, match=r"has no processor.*lens\.load\(model, processor=\.\.\.\)"):
        lens.capture(bare, digit(ZERO))


def test_pictures_are_written_and_read_without_a_library():
    picture = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(pixels_of(png(picture)), picture)
    assert np.array_equal(read_picture(picture), picture)
    with pytest.raises(ValueError, match="no PNG of 8-bit colours"):
        pixels_of(b"GIF89a" + bytes(40))
    with pytest.raises(ValueError, match="filtered or cut off"):
        pixels_of(png(picture)[:60])
