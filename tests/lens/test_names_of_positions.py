"""Positions of videos and spectrograms have the names of what they read: a change there changes them and no others."""

import pytest
import torch
import transformers

import lens

_SIZES = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1}
_SIZES |= {"num_attention_heads": 2}


def _moved(embed, inputs, at):
    """Positions whose embedding changes where one number of the input does."""
    other = inputs.clone()
    other[at] += 1
    with torch.no_grad():
        return (
            (embed(other) - embed(inputs)).abs().amax((0, 2)).gt(1e-6).nonzero().flatten().tolist()
        )


@pytest.mark.parametrize("kind", ["videomae", "vivit"])
def test_patches_of_videos_are_called_by_frame_row_and_column(kind):
    torch.manual_seed(0)
    sizes = {"image_size": 12, "num_frames": 6, **_SIZES}
    if kind == "videomae":
        config = transformers.VideoMAEConfig(patch_size=4, tubelet_size=2, **sizes)
        model = transformers.VideoMAEModel(config).eval()
    else:
        model = transformers.VivitModel(
            transformers.VivitConfig(tubelet_size=[2, 4, 4], **sizes)
        ).eval()
    pixels = torch.randn(1, 6, 3, 12, 12)
    trace = lens.capture(lens.load(model), {"pixel_values": pixels}, progress=False)
    embed = model.embeddings.patch_embeddings
    before = trace.length - 27
    for frame, row, column in ((0, 0, 0), (3, 5, 11), (5, 9, 2)):
        [found] = _moved(embed, pixels, (0, frame, 1, row, column))
        assert trace.tokens[found + before] == f"{frame // 2},{row // 4},{column // 4}"


def test_patches_of_spectrograms_are_called_by_time_and_band():
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        patch_size=4, time_stride=3, frequency_stride=2, max_length=19, num_mel_bins=8, **_SIZES
    )
    model = transformers.ASTModel(config).eval()
    sound = torch.randn(1, 19, 8)
    trace = lens.capture(lens.load(model), {"input_values": sound}, progress=False)
    assert trace.tokens[:2] == ["[CLS]", "[DIST]"]
    scores = lens.profile(trace)  # a row of patches goes on in the next band: no distance
    assert scores["distance"].isna().all()
    assert scores["entropy"].notna().all()
    for frame, bin_ in ((0, 0), (7, 3), (18, 7)):
        names = {
            trace.tokens[2 + one]
            for one in _moved(model.embeddings.patch_embeddings, sound, (0, frame, bin_))
        }
        assert names == {
            f"{start * 0.01:.2f} s, band {band}"
            for start in range(0, 16, 3)
            for band in range(3)
            if start <= frame < start + 4 and 2 * band <= bin_ < 2 * band + 4
        }
