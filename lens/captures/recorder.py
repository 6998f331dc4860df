"""`lens.capturing`: records every attention layer of whatever runs inside the block."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lens.captures.bridge import replaced_attention
from lens.captures.interface import listening, switched
from lens.captures.layer import LayerCall, LayerRecord, Settings, make_settings, measure
from lens.models.loaded import LoadedModel


class Recorder:
    """Measures each attention call and keeps the records, or hands them on.

    Attributes:
        records: one `LayerRecord` per attention layer and forward pass, in order; empty when they
            are handed on instead.
    """

    def __init__(
        self, settings: Settings, on_record: Callable[[LayerRecord], None] | None = None
    ) -> None:
        self.records: list[LayerRecord] = []
        self._settings = settings
        self._on_record = on_record or self.records.append
        self._step = -1
        self._layer = 0
        self._depth = 0
        self._past: torch.Tensor | None = None  # [batch, keys], tokens of the passes before
        self._new: torch.Tensor | None = None  # [batch, queries], of this pass
        self._seen: torch.Tensor | None = None  # both together

    def layers(self, step: int = 0) -> list[LayerRecord]:
        """Records of one forward pass, in the order of the layers."""
        return [record for record in self.records if record.step == step]

    @property
    def steps(self) -> int:
        """Number of forward passes so far."""
        return self._step + 1

    def attend(self, call: LayerCall) -> torch.Tensor:
        """See `interface.Listener`."""
        output, record = measure(call, self._settings, max(self._step, 0), self._layer)
        self._layer += 1
        self._on_record(record)
        return output

    def tokens(self, keys: int, window: int | None) -> torch.Tensor | None:
        """See `interface.Listener`; tokens of earlier passes are remembered for cached keys."""
        seen, past = self._new, self._past
        if seen is not None and past is not None and keys > seen.shape[1]:
            seen = torch.cat([past, seen], dim=1) if len(past) == len(seen) else None
        if seen is None or seen.shape[1] < keys:
            return None
        if window is None and seen.shape[1] != keys:
            return None  # somebody cut the cache: which tokens are left is not known
        if self._seen is None or seen.shape[1] > self._seen.shape[1]:
            self._seen = seen
        return seen[:, -keys:]

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass starts (a model inside a model starts no new one)."""
        self._depth += 1
        if self._depth > 1:
            return
        self._step += 1
        self._layer = 0
        ids = kwargs.get("input_ids", args[0] if args else None)
        is_ids = isinstance(ids, torch.Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        self._new = ids if is_ids else None
        self._past, self._seen = self._seen, None

    def end(self) -> None:
        """The forward pass is over, by an exception perhaps."""
        self._depth -= 1


@contextmanager
def capturing(
    model: LoadedModel,
    *,
    statistics: str | Sequence[str] = "all",
    block_size: int = 64,
    keep_qk: bool = False,
    backend: str = "auto",
) -> Iterator[Recorder]:
    """Record the attention of every forward pass inside the block, generation included.

    Args:
        model: as `lens.load` returns it; run `model.model` inside the block as you like.
        statistics, block_size, keep_qk, backend: as in `lens.capture`.

    Yields:
        A `Recorder`; `recorder.layers(step)` are the records of forward pass `step`. Decoding steps
        have one query and all the cached keys.

    Raises:
        LensError: as in `lens.capture`.

    Example:
        >>> with capturing(model) as recorder:
        ...     model.model.generate(ids, max_new_tokens=3)
        >>> recorder.layers(step=1)[0].queries
        1
    """
    settings = make_settings(
        statistics=statistics, block_size=block_size, keep_qk=keep_qk, backend=backend
    )
    with recording(model, Recorder(settings)) as recorder:
        yield recorder


@contextmanager
def recording(model: LoadedModel, recorder: Recorder) -> Iterator[Recorder]:
    """Every attention call of `model` goes to `recorder` inside the block; all is put back after."""
    root = transformer(model)
    with ExitStack() as stack:
        stack.enter_context(listening(recorder))
        stack.enter_context(switched(root))
        if model.is_bridge:
            stack.enter_context(replaced_attention(model.model))
        for module in {id(module): module for module in (root, base(model))}.values():
            before = module.register_forward_pre_hook(
                lambda _, args, kwargs: recorder.begin(args, kwargs), with_kwargs=True
            )
            after = module.register_forward_hook(lambda *_: recorder.end(), always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield recorder


def transformer(model: LoadedModel) -> nn.Module:
    """The module with the weights: of a bridge, the model that it wraps."""
    return model.model.original_model if model.is_bridge else model.model


def base(model: LoadedModel) -> nn.Module:
    """The model without its head, so that no logits [tokens, vocab] are built."""
    root = transformer(model)
    return getattr(root, "base_model", root)
