"""Relevance patching (RelP): edge attribution whose gradients follow the rules of layer-wise relevance.

Gradients of a norm or an activation function say what an infinitesimal change does, which for a large
change can be far off, even in sign. RelP keeps the form `(out - ref) · gradient` and replaces, in the
backward pass alone,

    norm                 its size is a constant: a linear map
    activation           act(x) is x times the constant act(x) / x
    gated product        a b passes half of the gradient to each factor
    attention pattern    as it is ("relp"), or a constant ("relp-values"), so that only the path through
                         the values is left and edges into queries and keys score 0

With "relp-values", no biases and zero ablation every cut through the model sums to the metric (Rezaei
Jafari et al., RelP, 2025, arXiv 2508.21258; rules of Ali et al. 2022, arXiv 2202.07304, and Achtibat et
al., AttnLRP, 2024, arXiv 2402.05602).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lens.circuits.graph.nodes import Nodes
from lens.circuits.scores.attribution import edge_products
from lens.circuits.scores.batch import Batch
from lens.common.errors import LensError

_ACTIVATIONS = ("act", "act_fn", "activation_fn", "intermediate_act_fn")
_BY_SLOPE = ("lens-program",)  # a ReLU, whose slope is act(x) / x already


def relevance(batch: Batch) -> np.ndarray:
    """Patterns with their gradient: [rows, edges]."""
    return _scores(batch, frozen_patterns=False)


def relevance_of_values(batch: Batch) -> np.ndarray:
    """Patterns as constants: [rows, edges]."""
    return _scores(batch, frozen_patterns=True)


def _scores(batch: Batch, *, frozen_patterns: bool) -> np.ndarray:
    with relevance_rules(batch.nodes):
        return edge_products(
            batch.nodes,
            batch.ids,
            batch.measure,
            batch.differences,
            frozen_patterns=frozen_patterns,
            norm_rules=_Rules,
            refuse_flat=True,
        )


@contextmanager
def relevance_rules(nodes: Nodes) -> Iterator[None]:
    """Backward passes of what runs inside follow the rules; what is computed stays the same.

    Raises:
        LensError: an activation function that is not known here.
    """
    with ExitStack() as stack:
        for activation in _activations(nodes):
            stack.callback(activation.register_forward_hook(_as_factor).remove)
        stack.enter_context(_Rules())
        yield


def _activations(nodes: Nodes) -> list[nn.Module]:
    root: Any = nodes.model.model
    if root.config.model_type in _BY_SLOPE:
        return []
    found = []
    for block in nodes.layout.blocks:
        children = [child for part in block.mlp for child in part.named_children()]
        parts = [part for name, part in children if name in _ACTIVATIONS]
        parts += block.mlp[1:-1]  # modules of the block itself: between the two projections
        if block.mlp and not parts:
            raise LensError(
                f"no activation function was found in {type(block.mlp[0]).__name__} under the names "
                f"{' or '.join(_ACTIVATIONS)}, so it has no relevance rule; use method='eap-ig'"
            )
        found += parts
    return found


def _as_factor(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    given = inputs[0]
    factor = torch.where(given == 0, 0, output / given).detach()
    return factor * given


class _Rules(TorchFunctionMode):
    """Constant sizes of norms, halved gated products; operations are recognised as they are called."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func in (torch.rsqrt, Tensor.rsqrt):
            return func(*args, **kwargs).detach()
        if func is functional.layer_norm:
            return _frozen_layer_norm(*args, **kwargs)
        if func in (torch.mul, Tensor.mul, Tensor.__mul__) and _both_vary(*args[:2]):
            left, right = args[:2]
            return (func(left, right.detach()) + func(left.detach(), right)) / 2
        return func(*args, **kwargs)


def _both_vary(left: Any, right: Any) -> bool:
    """Whether this is the product of two things that depend on the input, such as a gate."""
    return (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.shape == right.shape
        and left.grad_fn is not None
        and right.grad_fn is not None
    )


def _frozen_layer_norm(
    given: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    centred = given - given.mean(axes, keepdim=True)
    size = (centred.pow(2).mean(axes, keepdim=True) + eps).sqrt().detach()
    result = centred / size
    result = result if weight is None else weight * result
    return result if bias is None else result + bias
