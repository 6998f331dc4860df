"""A model works for one thread at a time, and tensors are the CPU's whatever the default device is."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.common.isolation import owned, replaced
from lens.passes.calls import LayerCall, attend
from lens.passes.sessions import listening

from .hybrids import hybrid

TEXT = "It was the best of times, it was the worst of times"


def _profile(model: lens.models.LoadedModel) -> pd.DataFrame:
    return lens.profile(lens.capture(model, TEXT, progress=False))


def _elsewhere(work: Callable[[], Any]) -> Any:
    """What another thread makes of it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_a_model_at_work_is_refused_to_another_thread_and_free_after():
    model = lens.load("text-lm-3l")
    alone = _profile(model)
    task = lens.tasks.induction(model, n=2)
    works: list[Callable[[], object]] = [
        lambda: _profile(model),
        lambda: lens.heads.importance(model, task, progress=False),
        lambda: lens.edit(model, lens.edits.Mask("first")).__enter__(),
    ]
    with lens.edit(model, lens.edits.Ablate(["L1H0"])):
        model.logits(TEXT)  # nested in its own thread
        for work in works:
            with pytest.raises(LensError, match="another thread works with this LlamaForCausalLM"):
                _elsewhere(work)
        with pytest.raises(LensError, match=r"would not be edited.* in the thread of the block"):
            _elsewhere(lambda: model.model(torch.arange(4)[None]))
    in_thread = pytest.raises(LensError, match="run it inside of the block and in its thread")
    with lens.traces.capturing(model), in_thread:
        _elsewhere(lambda: model.model(torch.arange(4)[None]))
    pd.testing.assert_frame_equal(_profile(model), alone)
    pd.testing.assert_frame_equal(_elsewhere(lambda: _profile(model)), alone)


def test_threads_that_meet_on_a_model_are_right_or_refused_and_leave_it_as_it_was():
    model = lens.load("text-lm-3l")
    alone, before = _profile(model), model.model.config._attn_implementation
    start = threading.Barrier(4)

    def work() -> pd.DataFrame | None:
        start.wait()
        try:
            return _profile(model)
        except LensError:
            return None

    with ThreadPoolExecutor(4) as pool:
        made = [one.result() for one in [pool.submit(work) for _ in range(4)]]
    assert any(one is not None for one in made)
    for one in made:
        if one is not None:
            pd.testing.assert_frame_equal(one, alone)
    assert model.model.config._attn_implementation == before
    assert not any(part._forward_pre_hooks for part in model.model.modules())


def test_threads_with_models_of_their_own_do_not_meet():
    """Nor do they leave transformers without tied weights, which it turns off while it loads."""
    alone = _profile(lens.load("text-lm-3l"))
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(lambda _: _profile(lens.load("text-lm-3l")), range(8)):
            pd.testing.assert_frame_equal(made, alone)
    assert lens.load("stories260k").model.lm_head.weight.requires_grad


def test_the_same_module_loaded_twice_is_one_model():
    inner = lens.load("text-lm-3l").model
    one, other = lens.load(inner), lens.load(inner)
    own = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    wrapped = [lens.load(lens.passes.wrap(own, {"src": torch.zeros(1, 5, 16)})) for _ in range(2)]
    for first, second in ((one, other), wrapped):
        assert first.module is second.module
        with lens.edit(first), pytest.raises(LensError, match="another thread works with this"):
            _elsewhere(lens.edit(second).__enter__)


def test_blocks_may_end_in_another_order_or_by_an_error():
    module = torch.nn.Linear(1, 1)
    first, second = owned(module), owned(module)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(LensError, match="another thread works with this Linear"):
        _elsewhere(owned(module).__enter__)
    second.__exit__(None, None, None)
    with pytest.raises(KeyError), owned(module):
        raise KeyError
    _elsewhere(lambda: owned(module).__enter__())


def test_models_with_one_configuration_do_not_leave_it_changed():
    """Which attention a model runs is written there."""
    config = lens.load("text-lm-3l").model.config
    one, other = (lens.load(transformers.LlamaForCausalLM(config).eval()) for _ in range(2))
    before = config._attn_implementation
    with (
        lens.edit(one),
        pytest.raises(LensError, match="another thread works with this LlamaConfig"),
    ):
        _elsewhere(lens.edit(other).__enter__)
    assert config._attn_implementation == before
    drawn = lens.models.random_weights(one)
    alone = _elsewhere(lambda: drawn.logits([3, 1, 4]))
    with lens.edit(one):
        found = _elsewhere(lambda: drawn.logits([3, 1, 4]))
    torch.testing.assert_close(found, alone)


def test_a_function_is_replaced_for_one_thread_and_put_back_in_any_order():
    owner = SimpleNamespace(number=lambda: 0)
    own = owner.number
    first, second = (replaced(owner, "number", lambda was, n=n: lambda: n + was()) for n in (1, 10))
    first.__enter__()
    second.__enter__()
    assert (owner.number(), _elsewhere(lambda: owner.number())) == (11, 0)
    other = replaced(owner, "number", lambda was: lambda: 100 + was())
    _elsewhere(other.__enter__)
    first.__exit__(None, None, None)
    assert owner.number() == 11
    second.__exit__(None, None, None)
    assert owner.number() == 0
    other.__exit__(None, None, None)
    assert owner.number is own


def test_mixers_of_one_file_in_two_threads_do_not_meet():
    """Their scans are functions of the file, which both models look up there."""
    ids = list(range(3, 30))
    one, other = (hybrid("bamba") for _ in range(2))
    home = sys.modules[type(one).__module__]
    own = home.mamba2_chunk_scan
    alone = lens.mixers.capture(one, ids, progress=False).table()
    made: list[pd.DataFrame] = []

    def meanwhile(*_: object) -> None:
        made.append(
            _elsewhere(lambda: lens.mixers.capture(other, ids[::-1], progress=False).table())
        )
        _elsewhere(lambda: other(torch.tensor([ids])))
        with pytest.raises(LensError, match="another thread works with this Bamba"):
            _elsewhere(lambda: lens.mixers.capture(one, ids, progress=False))

    mixer = next(part for name, part in one.named_modules() if name.endswith("mamba"))
    mixer.in_proj.register_forward_hook(meanwhile)
    found = lens.mixers.capture(one, ids, progress=False).table()
    pd.testing.assert_frame_equal(found, alone)
    beside = lens.mixers.capture(other, ids[::-1], progress=False).table()
    pd.testing.assert_frame_equal(made[0], beside)
    assert home.mamba2_chunk_scan is own


def test_attention_of_torch_is_another_threads_own_while_a_module_is_captured():
    layer = torch.nn.TransformerEncoderLayer(16, 2, 20, batch_first=True)
    inputs = {"src": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))}
    model = lens.load(lens.passes.wrap(torch.nn.TransformerEncoder(layer, 1).eval(), inputs))
    query = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    own = torch.nn.functional.scaled_dot_product_attention
    made: list[torch.Tensor] = []

    def meanwhile(call: LayerCall) -> torch.Tensor:
        attention = torch.nn.functional.scaled_dot_product_attention
        made.append(_elsewhere(lambda: attention(query, query, query)))
        assert _elsewhere(torch.backends.mha.get_fastpath_enabled)
        return attend(call).output

    with torch.no_grad(), listening(model, meanwhile):
        model.model(**inputs)
    torch.testing.assert_close(made[0], own(query, query, query))
    assert torch.nn.functional.scaled_dot_product_attention is own


def test_a_default_device_changes_nothing():
    model = lens.load("induction-2l")
    task = lens.tasks.induction(model, n=2)
    edit, heads = lens.edits.Mask("first", heads=["L1H0"]), lens.edits.Ablate(["L0H1"])

    def numbers() -> list[np.ndarray]:
        trace = lens.capture(lens.load("text-lm-3l"), TEXT, progress=False)
        results = [
            lens.profile(trace),
            lens.heads.importance(model, task, method="gradient", progress=False).table(),
            lens.circuits.patch(model, task, progress=False).table(),
            lens.effect(model, task, edit, controls=2, progress=False).table(),
        ]
        return [one.select_dtypes("number").to_numpy() for one in results]

    ids = torch.arange(4)
    right = numbers()
    with lens.edit(model, edit, heads):
        edited = model.logits(ids)
    torch.set_default_device("meta")  # no tensor of which has numbers, as those of another device
    try:
        found = numbers()
        with lens.edit(model, edit, heads):
            again = model.logits(ids)
        assert torch.zeros(1).device.type == "meta"
    finally:
        torch.set_default_device("cpu")
    for one, other in zip(found, right, strict=True):
        np.testing.assert_array_equal(one, other)
    torch.testing.assert_close(again, edited, rtol=0, atol=0)
