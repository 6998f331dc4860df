"""A killed computation goes on and ends with the same numbers; another one's file is refused."""

import numpy as np
import pytest

import lens
import lens.heads.measures.importances as measuring
from lens.common.errors import LensError
from lens.heads import importance
from lens.tasks import induction


@pytest.fixture(scope="module")
def toy():
    return lens.load("induction-2l")


@pytest.fixture
def task(toy, monkeypatch):
    task = induction(toy, n=7, seed=0)
    monkeypatch.setattr("lens.tasks.task._LOGITS", 3 * 2048 * task.length)  # three rows at once
    return task


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "ablation", "baseline": "mean"},
        {"method": "ablation", "baseline": "resample", "seed": 4},
        {"method": "ablation", "baseline": "optimal", "steps": 3},
    ],
)
def test_a_killed_ablation_goes_on_where_it_was(toy, task, tmp_path, monkeypatch, arguments):
    path = tmp_path / "heads.npz"
    whole = importance(toy, task, progress=False, **arguments)
    real, calls = measuring.edited_logits, []

    def killed(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(measuring, "edited_logits", killed)
    with pytest.raises(KeyboardInterrupt):
        importance(toy, task, checkpoint=path, progress=False, **arguments)
    before = len(calls)
    monkeypatch.setattr(
        measuring, "edited_logits", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    again = importance(toy, task, checkpoint=path, progress=False, **arguments)
    resumed = len(calls) - before
    np.testing.assert_array_equal(again.per_prompt, whole.per_prompt)
    np.testing.assert_array_equal(again.clean, whole.clean)
    calls.clear()
    monkeypatch.setattr(
        measuring, "edited_logits", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    importance(toy, task, progress=False, **arguments)
    assert resumed == len(calls) - 5  # five passes were kept


def test_gradients_are_kept_too(toy, task, tmp_path, monkeypatch):
    path = tmp_path / "gradient.npz"
    whole = importance(toy, task, method="gradient", checkpoint=path, progress=False)
    monkeypatch.setattr(measuring, "with_gradients", None)  # would fail when called
    again = importance(toy, task, method="gradient", checkpoint=path, progress=False)
    np.testing.assert_array_equal(again.per_prompt, whole.per_prompt)
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_of_another_computation_is_refused(toy, task, tmp_path):
    path = tmp_path / "heads.npz"
    importance(toy, task, method="gradient", checkpoint=path, progress=False)
    with pytest.raises(
        LensError, match=r"another computation .method 'gradient' there, 'gate' now"
    ):
        importance(toy, task, method="gate", checkpoint=path, progress=False)
    other = induction(toy, n=7, seed=1)
    with pytest.raises(LensError, match=r"prompts '[0-9a-f]+' there"):
        importance(toy, other, method="gradient", checkpoint=path, progress=False)
    changed = lens.load("induction-2l")
    changed.model.blocks[0].attn.o.weight.data[0, 0] += 1
    with pytest.raises(LensError, match=r"weights '[0-9a-f]+' there"):
        importance(changed, task, method="gradient", checkpoint=path, progress=False)
    path.write_bytes(b"no zip")
    with pytest.raises(LensError, match="is no checkpoint of"):
        importance(toy, task, method="gradient", checkpoint=path, progress=False)


def test_the_gate_is_the_derivative_of_a_softmax_router(toy, task):
    """dm/dr at r = 0, gates = heads * softmax(r), by finite differences of the gates' Jacobian."""
    gradient = importance(toy, task, method="gradient", progress=False).per_prompt
    gate = importance(toy, task, method="gate", progress=False)
    heads, step = gradient.shape[1], 1e-6
    for head in range(heads):
        router = np.zeros(heads)
        router[head] = step
        gates = heads * np.exp(router) / np.exp(router).sum()
        slope = (gates - 1) / step  # d gates / d r[head]
        np.testing.assert_allclose(
            gate.per_prompt[:, head], np.einsum("k,lkp->lp", slope, gradient), atol=1e-6
        )
    assert gate.label == "gate"
