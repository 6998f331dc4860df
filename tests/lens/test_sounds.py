"""Sounds in the forms that people have them in are one sound."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.io import wavfile
from scipy.signal import resample_poly
from transformers.utils import logging

import lens
from lens import LensError
from lens.passes.sounds import read_sound

from .encoder_decoders import made

SOUND = Path(__file__).parent / "data/ten_words.wav"
RATE, BYTES = wavfile.read(SOUND)
SHARES = (BYTES.astype(np.float32) - 128) / 128
WHOLE = np.round(SHARES * 32768).clip(-32768, 32767).astype(np.int16)


@pytest.fixture(scope="module")
def model():
    extractor: Any = transformers.WhisperFeatureExtractor(feature_size=8)
    extractor.n_samples, extractor.nb_max_frames = 6400, 40
    return lens.load(made("whisper"), processor=extractor)


FORMS = {
    "file": SOUND,
    "name of a file": str(SOUND),
    "samples and rate": (SHARES, RATE),
    "rate and samples": (RATE, SHARES),
    "numpy's rate": (np.int64(RATE), SHARES),
    "whole numbers": (WHOLE, RATE),
    "two channels": (np.stack([SHARES, SHARES], 1), RATE),
    "channels first, a tensor": (torch.tensor(SHARES)[None], RATE),
    "datasets": {"path": "a.wav", "array": SHARES, "sampling_rate": RATE},
    "a list in a mapping": {"raw": SHARES.tolist(), "sampling_rate": RATE},
    "samples of the rate": resample_poly(SHARES, 2, 1),
    "a tensor of the rate": torch.tensor(resample_poly(SHARES, 2, 1)),
    "a list of the rate": resample_poly(SHARES, 2, 1).tolist(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_sound_is_the_same_in_every_form(model, form):
    cross = lens.capture(model.part("cross"), FORMS[form], new=4, progress=False)
    wanted = lens.capture(model.part("cross"), SOUND, new=4, progress=False)
    np.testing.assert_allclose(cross.lse.values, wanted.lse.values, atol=1e-4)
    if "list of the" not in form:  # which is alone, or several prompts
        beside = lens.capture(model.part("cross"), (FORMS[form], [3, 4, 5]), progress=False)
        both = lens.capture(model.part("cross"), [(SOUND, [3, 4, 5])], progress=False)[0]
        np.testing.assert_allclose(beside.lse.values, both.lse.values, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((SHARES, 0.5), "rate is a whole number of samples a second, got 0.5"),
        ((SHARES * 32768, RATE), "from -1 to 1, and these reach"),
        ({"array": "loud", "sampling_rate": RATE}, "samples must be numbers"),
        ({"array": SHARES[:0], "sampling_rate": RATE}, "at least one sample"),
    ],
)
def test_what_is_no_sound_is_refused(model, given, said):
    with pytest.raises(LensError, match=said):
        read_sound(given, RATE)
    with pytest.raises(LensError, match=said):
        lens.capture(model, given, progress=False)


def test_other_numbers_are_told_what_a_source_is(model):
    with pytest.raises(LensError, match=r"a source must be a .wav file, samples \(samples, rate\)"):
        lens.capture(model, (BYTES.astype(int), RATE), progress=False)


def test_what_the_model_writes_comes_without_words_of_transformers(model, caplog):
    logging.enable_propagation()
    try:
        lens.capture(model, SOUND, new=3, progress=False)
    finally:
        logging.disable_propagation()
    assert not caplog.records
