"""Prompts that run together give the traces of each alone, and a model that mixes rows runs them one by one."""

import numpy as np
import pytest
import torch

import lens
from lens.passes.sessions import base
from lens.traces import batches
from tests.lens.architectures import build

LENGTHS = [40, 37, 40, 9, 38]
"""9 is too short for the others: so much padding costs more than a pass of its own."""


def _prompts(lengths, seed=3, vocab=90):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def passes(monkeypatch):
    """Shapes [rows, tokens] of the forward passes of a capture, without those of the trial."""
    seen = []

    def watch(model):
        def note(_, args, kwargs):
            shape = tuple(kwargs["input_ids"].shape)
            if shape[1] > batches._PROBE or (shape[0] == 1 and shape[1] in LENGTHS):
                seen.append(shape)

        return base(model).register_forward_pre_hook(note, with_kwargs=True)

    watch.seen = seen
    return watch


def _assert_same(trace, alone):
    assert set(trace.dataset.data_vars) == set(alone.dataset.data_vars)
    assert trace.dataset.sizes == alone.dataset.sizes
    for name, expected in alone.dataset.data_vars.items():
        got = trace.dataset[name]
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(
                got.values, expected.values, rtol=2e-4, atol=2e-5, err_msg=str(name)
            )
        else:
            np.testing.assert_array_equal(got.values, expected.values, err_msg=str(name))
    differing = {"created", "seconds"}
    for name in set(alone.attrs) - differing:
        assert trace.attrs[name] == alone.attrs[name], name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert", "gpt_oss"])
def test_prompts_together_are_each_alone(name, passes, tmp_path):
    model = lens.load(build(name))
    prompts = _prompts(LENGTHS)
    hook = passes(model)
    traces = lens.capture(model, prompts, block_size=16, keep_qk=True, out=tmp_path)
    hook.remove()
    assert sorted(passes.seen) == [(1, 9), (4, 40)]
    for prompt, trace in zip(prompts, traces, strict=True):
        _assert_same(trace, lens.capture(model, prompt, block_size=16, keep_qk=True))


def test_nothing_is_padded_where_a_row_notices(passes, monkeypatch):
    model = lens.load(build("llama"))
    monkeypatch.setattr(batches, "accepted", lambda model: ["input_ids"])
    hook = passes(model)
    lens.capture(model, _prompts(LENGTHS), statistics=["lse"])
    hook.remove()
    assert sorted(passes.seen) == [(1, 9), (1, 37), (1, 38), (2, 40)]


def test_a_model_that_mixes_rows_runs_them_one_by_one(passes):
    model = lens.load(build("llama"))
    mixing = model.model.model.layers[0].register_forward_hook(
        lambda _, given, output: output + output.mean(0, keepdim=True)
    )
    hook = passes(model)
    prompts = _prompts([40, 40])
    traces = lens.capture(model, prompts, statistics=["lse", "received"])
    hook.remove()
    assert passes.seen == [(1, 40), (1, 40)]
    _assert_same(traces[1], lens.capture(model, prompts[1], statistics=["lse", "received"]))
    mixing.remove()


def test_a_batch_has_no_more_tokens_than_a_long_prompt():
    lengths = [1500, 700, 700, 690, 600, 30, 30, 27]
    prompts = [batches.Prompt({"input_ids": torch.zeros(1, n)}, [0] * n) for n in lengths]
    groups = []
    for place, length in enumerate(lengths):
        fits = groups and batches._fits([lengths[one] for one in groups[-1]], length)
        groups[-1].append(place) if fits else groups.append([place])
    assert groups == [[0], [1, 2], [3, 4], [5, 6, 7]]
    for group in groups:
        rows = len(group) * lengths[group[0]]
        assert rows <= batches.MOST_TOKENS
        assert rows - sum(lengths[one] for one in group) <= rows / 8
    assert not batches._is_plain(
        batches.Prompt(
            {"input_ids": prompts[0].inputs["input_ids"], "x": prompts[0].inputs["input_ids"]}, [0]
        )
    )
