"""The plain torch backend: bounded panels, no read of what is masked."""

import pytest
import torch
from lens_kernels import AttentionMask, panels, tiled
from lens_kernels.validation import make_problem
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.helpers import CASES, case_problem, check, ids, tensors


class Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation makes, and the work of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if func.overloadpacket is torch.ops.aten.bmm:
                self.products += result.numel() * args[0].shape[-1]
        return result


def measured(problem):
    with Sizes() as sizes:
        tiled.run(problem)
    return sizes


def test_nothing_is_as_large_as_the_matrix(monkeypatch):
    monkeypatch.setattr(panels, "BUDGET", 1 << 14)
    query, key, value = tensors(1, 4, 2, 769, 769)
    names = ("entropy", "received", "diagonal", "block_mass", "top_keys", "value_norm")
    problem = make_problem(query, key, value, statistics=names, block_size=64)
    largest = measured(problem).largest
    inputs = query.numel()
    assert largest <= max(4 * panels.BUDGET, inputs)
    assert largest < 4 * 769 * 769 / 20


@pytest.mark.parametrize("case", CASES[::2], ids=ids(CASES[::2]))
def test_panels_smaller_than_a_block_change_nothing(monkeypatch, case):
    monkeypatch.setattr(panels, "BUDGET", 97)
    check("torch", case_problem(case, "cpu", block_size=(16, 5)))


@pytest.mark.parametrize(
    ("mask", "share"),
    [
        (AttentionMask(causal=True), 0.6),
        (AttentionMask(causal=True, window=32), 0.25),
        (AttentionMask(cu_seqlens=[0, 128, 256, 384, 512]), 0.3),
    ],
    ids=["causal", "window", "packed"],
)
def test_masked_keys_are_not_multiplied(mask, share):
    query, key, value = tensors(1, 2, 1, 512, 512)
    options = {"statistics": (), "block_size": 32}
    dense = measured(make_problem(query, key, value, **options)).products
    cut = measured(make_problem(query, key, value, mask=mask, **options)).products
    assert dense == 2 * (2 * 512 * 512 * 16)
    assert cut < share * dense


def test_dropped_blocks_are_not_multiplied():
    query, key, value = tensors(1, 2, 1, 512, 512)
    kept = torch.eye(16, dtype=torch.bool)[None, None]
    options = {"statistics": (), "block_size": 32}
    dense = measured(make_problem(query, key, value, **options)).products
    cut = measured(make_problem(query, key, value, block_mask=kept, **options)).products
    assert cut * 16 == pytest.approx(dense)
