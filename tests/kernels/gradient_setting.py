"""One forward and backward run of a case, for comparing what gradients a backend gives."""

import dataclasses

import pytest
import torch
from lens_kernels import attention
from lens_kernels.dispatch import explain_problem
from lens_kernels.statistics import STATISTICS
from lens_kernels.validation import make_problem

from tests.kernels.helpers import Case, rms_ratio, tensors, to_device

EXPORTS = tuple(name for name, entry in STATISTICS.items() if entry.from_backward)
OPTED = ("entropy", "block_mass", "received")
OF_OUTPUT = ("block_attribution", "row_attribution", "block_influence")
LEAVES = ("query", "key", "value", "sink_logits", "bias")
THROUGH = ("output", "lse", *OPTED, "group_output", "group_lse")


class Setting:
    """Leaves, options and one random gradient per result of a case.

    `through` names the results that the loss is made of; `of` the leaves that need a gradient;
    `exports` the statistics of the backward pass.
    """

    def __init__(
        self,
        case: Case,
        *,
        through=THROUGH,
        of=LEAVES,
        exports=EXPORTS,
        sinks=True,
        softcap=2.5,
        seed=0,
        dims=(16, 24),
        heads=(4, 2),
    ):
        self.case, self.through, self.of, self.exports = case, through, of, exports
        query, key, value = tensors(2, *heads, case.queries, case.keys, *dims, seed=seed)
        self.mask = case.mask(heads[0], case.queries, case.keys)
        self.tensors = {"query": query, "key": key, "value": value}
        if sinks:
            self.tensors["sink_logits"] = torch.tensor([0.5, -1.0, 3.0, 40.0])[-heads[0] :]
        if self.mask is not None and self.mask.bias is not None:
            self.tensors["bias"] = self.mask.bias
        self.groups = (torch.arange(2 * case.keys) * 7 % 11 % 3).view(2, case.keys)
        self.options = {"block_size": (16, 32), "softcap": softcap}

    def run(self, backend, device="cpu", dtype=torch.float64, **options):
        """Runs forward and backward; returns gradients and backward statistics by name."""
        leaves = {
            name: part.to(device, dtype).clone().requires_grad_(name in self.of)
            for name, part in self.tensors.items()
        }
        mask = to_device(self.mask, device)
        if "bias" in leaves:
            mask = dataclasses.replace(mask, bias=leaves["bias"])
        options = {
            "mask": mask,
            "sink_logits": leaves.get("sink_logits"),
            "statistics": ("lse", *OPTED, *self.exports),
            "differentiable": [name for name in OPTED if name in self.through],
            **({"groups": self.groups.to(device)} if "group_lse" in self.through else {}),
            **self.options,
            **options,
        }
        inputs = [leaves[name] for name in ("query", "key", "value")]
        obstacle = explain_problem(make_problem(*inputs, **options)).obstacles[backend]
        if obstacle is not None:
            pytest.skip(f"{backend}: {obstacle}")
        result = attention(*inputs, backend=backend, **options)
        self.loss(result).backward()
        found = {
            name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for name, leaf in leaves.items()
            if leaf.requires_grad
        }
        return found | {name: result.statistics[name] for name in self.exports}

    def loss(self, result):
        parts = {"output": result.output}
        parts |= {name: result.statistics[name] for name in ("lse", *OPTED)}
        if result.groups is not None:
            parts |= {"group_output": result.groups.output, "group_lse": result.groups.lse}
        generator = torch.Generator().manual_seed(7)
        total = torch.zeros((), dtype=torch.float64)
        for name in self.through:
            part = parts[name]
            weight = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            finite = torch.where(part.isfinite(), part.double(), 0)
            total = total + (finite.cpu() * weight).sum()
        return total


def compare(actual, expected, limit):
    """Everything that two runs returned, by RMS error ratio."""
    assert actual.keys() == expected.keys()
    ratios = {name: rms_ratio(actual[name], expected[name]) for name in expected}
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= limit} == {}
