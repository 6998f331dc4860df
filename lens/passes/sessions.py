"""Forward passes through a model with a listener in place of its attention.

`listening` is the one way to it: `on_layer(call)` is asked at each attention layer of each pass and
returns the output that the model goes on with. Capture, gradients, edits and circuits are such functions.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from lens.common.errors import LensError, first_line
from lens.common.head_ids import layers_in_words
from lens.common.isolation import on_cpu, owned
from lens.models.layout import blocks
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.stacks import crossing, layers_of, stacks
from lens.models.stages import stages
from lens.models.wrapped import Wrapped
from lens.passes.bridge import replaced_attention
from lens.passes.calls import LayerCall, attend, read_half
from lens.passes.computed import following
from lens.passes.history import History
from lens.passes.interface import (
    current_listener,
    language_model,
    own_attention,
    received_by,
    switched,
)
from lens.passes.windows import Block, Windows, laid_out

if TYPE_CHECKING:
    from jaxtyping import Float, Int

OnLayer: TypeAlias = Callable[[LayerCall], torch.Tensor]
"""A call -> its output [batch, heads, queries, value_dim], of any floating type."""

PACKED = "grid_thw"
"""Input of vision towers that read the patches of all pictures in one row: frames, height, width of each."""

Given: TypeAlias = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A module that is called, and with what."""

OnCut: TypeAlias = Callable[[int, int], None]
"""(step, count): the last `count` tokens of that pass were cut from its cache."""


class Session:
    """The passes inside one `with` block: which one runs, which layer comes, which tokens were read."""

    def __init__(
        self,
        on_layer: OnLayer,
        exclusive: bool,
        on_cut: OnCut | None,
        chosen: str = "",
        crossing: frozenset[int] = frozenset(),
        name: str = "",
        config: Any = None,
        eager_alone: bool = False,
    ) -> None:
        self.eager_alone = eager_alone
        self._config = config  # of the model
        self._block: Block | None = None  # that runs now
        self._announced = False  # whether any block has run
        self._on_layer, self._on_cut = on_layer, on_cut
        self._name = name  # of a model whose calls must have the rows of its inputs
        self._rows: int | None = None  # of the inputs of this pass
        self._chosen, self.crossing = chosen, crossing
        self._half = ""  # of an encoder-decoder, whose block runs now
        self._exclusive = exclusive
        self._step = -1
        self._layer: int | None = None  # whose block runs now
        self._parts: Counter[tuple[int, str]] = Counter()  # calls of each layer in this pass
        self._turns: Counter[int] = Counter()  # of blocks that several layers share
        self._depth = 0
        self._new: torch.Tensor | None = None  # [batch, queries], tokens of this pass
        self._target: torch.Tensor | None = None  # of a decoder that reads another sequence
        self._history = History()
        self._cache: Any = None  # of the last pass
        self._length = 0  # tokens that it held then
        self._seen = 0  # and before it

    def attend(self, call: LayerCall) -> Float[torch.Tensor, "batch queries heads value_dim"]:
        """See `interface.Listener`."""
        with on_cpu():
            return self._heard(call)

    def _heard(self, call: LayerCall) -> Float[torch.Tensor, "batch queries heads value_dim"]:
        around = not self._depth and self._layer is None  # of a model around this one
        place = "cross" if self._half == "decoder" and call.cross else self._half
        if around or place != (self._chosen or place) or self._pools(call):
            return _handed_on(call, attend(call).output)
        # Of a model without one list of layers, the calls are counted.
        layer = len(self._parts) if self._layer is None else self._layer
        part, self._parts[layer, place] = self._parts[layer, place], self._parts[layer, place] + 1
        step = max(self._step, 0)
        call = replace(call, layer=layer, part=part, place=place, step=step, seen=self._seen)
        if call.query.shape[2] == 1 and self._seen and not call.cross:
            # One query that sees every cached key and itself: a mask that hides nothing does not say more.
            call = replace(call, mask=replace(call.mask, causal=True))
        windows = None
        if self._block is not None:  # a call in windows as one among the positions of the picture
            call, windows = laid_out(self._block, call, self._rows)
        if self._name and (part or self._rows not in (None, len(call.query))):
            raise in_rows(self._name, layer, (part + 1) * len(call.query), self._rows or 1)
        new, keys = self._tokens_of(call), call.key.shape[2]
        tokens = new if call.cross else self._history.tokens(call, new)
        if tokens is not None:
            before = tokens.new_full((len(tokens),), -1)
            if call.mask.start:
                before = tokens[:, call.mask.start - 1]
            call = replace(call, tokens=tokens[:, -keys:], before=before)
        if self._name and call.halves is not None:
            raise LensError(
                f"the global tokens of {self._name} have queries, keys and values of their own, which this does not "
                "take; lens.capture, lens.traces.capturing and lens.edit do, and all take it without global tokens"
            )
        return _handed_on(call, self._on_layer(call), windows)

    def _pools(self, call: LayerCall) -> bool:
        """Whether a call is of no layer but of what reads the last one by a query of its own (the head of AIMv2)."""
        outside = self._layer is None and self._announced and not call.mask.causal
        return outside and call.query.shape[2] == 1 < call.key.shape[2]

    def _tokens_of(self, call: LayerCall) -> Int[torch.Tensor, "batch keys"] | None:
        """Ids of what the keys of a call are made of in this pass, if it is known."""
        if call.place == "decoder":
            return self._target
        known = self._new is not None and self._new.shape == (len(call.key), call.key.shape[2])
        return self._new if not call.cross or (call.place and known) else None

    def enter(
        self, given: Given, numbers: Sequence[int], half: str = "", alike: Sequence[nn.Module] = ()
    ) -> None:
        """The block of these layers, one unless they share it, runs; of a model in parts of that half or stage."""
        block, args, kwargs = given
        self._half, self._announced = half, True
        self._block = Block(block, args, kwargs, half, alike, self._config)
        self._layer = numbers[self._turns[id(block)] % len(numbers)]
        self._turns[id(block)] += 1

    def leave(self) -> None:
        """No block runs any more."""
        self._layer, self._half, self._block = None, "", None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass starts (a model inside a model starts no new one).

        Raises:
            LensError: the session is exclusive, and the pass will ask somebody else for its attention.
        """
        self._depth += 1  # first: `end` follows in any case
        if self._exclusive and current_listener() is not self:
            raise LensError(
                "the attention of this pass would not be edited: something inside the block (lens.capture, "
                "lens.traces.capturing, another lens.edit) takes its place, or it runs in another thread; run the "
                "former outside, the latter in the thread of the block"
            )
        if self._depth > 1:
            return
        self.settle()
        self._step += 1
        self.leave()
        self._parts.clear()
        self._turns.clear()
        self._rows = _rows(args, kwargs)
        self._new = _ids(kwargs.get("input_ids", args[0] if args else None))
        self._target = _ids(kwargs.get("decoder_input_ids"))
        if "pixel_values" in kwargs and self._target is None:  # BLIP: the decoder's are input_ids
            self._target = self._new
        self._cache = kwargs.get("past_key_values")
        self._seen = _held(self._cache)

    def end(self) -> None:
        """The forward pass is over, by an exception perhaps."""
        self._depth -= 1
        if not self._depth and self._cache is not None:
            self._length = _held(self._cache)

    def settle(self) -> None:
        """Tell of tokens of the last pass that were cut from its cache: drafts that were rejected."""
        if self._on_cut is not None and self._cache is not None:
            cut = self._length - _held(self._cache)
            if cut > 0:
                self._on_cut(self._step, cut)
        self._cache = None


@contextmanager
def listening(
    model: LoadedModel,
    on_layer: OnLayer,
    *,
    exclusive: bool = False,
    parts: bool = False,
    on_cut: OnCut | None = None,
) -> Iterator[None]:
    """`on_layer` computes every attention layer of `model` inside the block; all is put back after.

    Args:
        model: as `lens.load` returns it.
        on_layer: what each layer's attention gives, [batch, heads, queries, value_dim].
        exclusive: refuse passes in which a block inside this one would take its place.
        parts: `on_layer` knows that a layer may attend twice, as `call.part` says, or in more rows than
            there are prompts (windows of a picture).
        on_cut: told of tokens that are cut from the cache after a pass, before the next one.

    Raises:
        LensError: a model without softmax attention; layers that attend twice or in other rows, and a function that
            does not know; another thread works with the model.
    """
    check_loaded(model)
    model.info.check_attends()
    if not parts:
        model.check_part()
    if model.info.twice and not parts:
        raise LensError(
            f"each head of {model.info.class_name} gives its output in two parts (it attends twice in "
            f"{layers_in_words(model.info.twice)}), which this does not put together; lens.capture, "
            "lens.traces.capturing and lens.edit take such models"
        )
    root = model.transformer
    crossed = root.crossing if isinstance(root, Wrapped) else frozenset[int]()
    crossed = crossing(root) if model.is_encoder_decoder else crossed
    name = "" if parts or isinstance(root, Wrapped) else model.info.class_name
    config = getattr(root, "config", None)
    alone = not getattr(model.module, "_supports_sdpa", True)
    session = Session(on_layer, exclusive, on_cut, model.chosen, crossed, name, config, alone)
    with ExitStack() as stack:
        stack.enter_context(owned(model.module))
        stack.enter_context(received_by(session))
        stack.enter_context(switched(root))
        stack.enter_context(_followed(root))
        if model.is_bridge:
            stack.enter_context(replaced_attention(model.model))
        for module in {id(module): module for module in (root, base(model))}.values():
            around(stack, module, lambda _, *given: session.begin(*given), session.end)
        _number(model, session, stack)
        yield
        session.settle()


def _handed_on(
    call: LayerCall, output: torch.Tensor, windows: Windows | None = None
) -> Float[torch.Tensor, "batch queries heads value_dim"]:
    """What the model goes on with, of the [batch, heads, queries, value_dim] of a listener: in its rows, of its type."""
    output = read_half(call, output)
    if windows is not None:
        output = windows.parted(output)
    return output.to(call.value.dtype).transpose(1, 2).contiguous()


def in_rows(name: str, layer: int, rows: int, prompts: int = 1) -> LensError:
    """What to say of a layer that attends in other rows than those of its prompts: windows, frames or tiles."""
    return LensError(
        f"layer {layer} of {name} attends in {rows} rows where the pass has {prompts} (windows of a picture, "
        "frames, tiles), and this takes one a prompt; lens.traces.capturing(model) records all rows"
    )


def _followed(root: nn.Module) -> AbstractContextManager[None]:
    """Modules that ask no registry for their attention ask us."""
    if not isinstance(root, Wrapped):
        return following(language_model(root), own_attention)
    if root.following is not None:
        return root.following(root.attending, own_attention)
    return following(root, own_attention, root.attending, root.heads)


def _rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Of the inputs of a pass; None where it is not known: pictures may be packed in one row."""
    named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *kwargs.values())
    given = next((one for one in named if isinstance(one, torch.Tensor)), None)
    return None if given is None or given.dim() < 2 or PACKED in kwargs else len(given)


def _ids(given: Any) -> torch.Tensor | None:
    is_ids = isinstance(given, torch.Tensor) and given.dim() == 2
    return given if is_ids and not given.is_floating_point() else None


def _held(cache: Any) -> int:
    """Tokens that a cache has seen and not dropped again."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def has_blocks(model: LoadedModel) -> bool:
    """Whether the layers of a model are known as modules."""
    try:
        return bool(blocks(model))
    except LensError:
        return False


def _number(model: LoadedModel, session: Session, stack: ExitStack) -> None:
    """Tell the session which layer's block runs: layers without attention count too."""
    root = model.model
    if model.parts and not model.is_encoder_decoder:
        for part, layers in stages(model.transformer).items():
            _announce(layers, part, session, stack)
        return
    if model.parts:
        halves = stacks(model.transformer)
        assert halves is not None
        for half in ("encoder", "decoder"):
            if (module := getattr(halves, half)) is not None:
                _announce(layers_of(module), half, session, stack)
        return
    try:
        found = root.attending if isinstance(root, Wrapped) else blocks(model)
    except LensError:  # stages of a vision tower: not one list
        return
    _announce(found, "", session, stack)


def _announce(found: Sequence[nn.Module], half: str, session: Session, stack: ExitStack) -> None:
    numbers: dict[nn.Module, list[int]] = {}
    for number, block in enumerate(found):
        numbers.setdefault(block, []).append(number)
    for block, layers in numbers.items():
        around(
            stack,
            block,
            lambda *given, layers=layers: session.enter(given, layers, half, found),
            session.leave,
        )


def around(
    stack: ExitStack, module: nn.Module, begin: Callable[..., None], end: Callable[[], None]
) -> None:
    """`begin(module, args, kwargs)` before each pass of a module, `end()` after it, also where it failed."""
    stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
    after = module.register_forward_hook(lambda *_: end(), always_call=True)
    stack.callback(after.remove)


def base(model: LoadedModel) -> nn.Module:
    """The model without its head, so that no logits [tokens, vocab] are built."""
    root: Any = model.transformer
    inner = getattr(root, "base_model", root)
    if not (_has_head(root) or model.is_bridge):  # what wraps it may change what it reads (DPR)
        return root
    # its inner part may read something else (DINOv3; the decoder of SpeechT5)
    both = [inspect.signature(one.forward).parameters for one in (root, inner)]
    reads = {main_input(root), *({"decoder_input_ids"} & both[0].keys())} - {None}
    return inner if reads <= both[1].keys() else root


def main_input(root: nn.Module) -> str | None:
    """The name of what a model reads, as transformers notes it; of several (OneFormer) the first."""
    noted: Any = getattr(root, "main_input_name", None)
    if isinstance(noted, list | tuple):
        noted = next(iter(noted), None)
    return noted


def _has_head(root: Any) -> bool:
    if "For" in type(root).__name__:
        return True
    find = getattr(root, "get_output_embeddings", None)
    return find is not None and find() is not None


def run(model: LoadedModel, inputs: Mapping[str, Any], what: str = "this prompt") -> Any:
    """What the model without its head gives.

    Raises:
        LensError: the forward pass failed, by whatever error.
        OSError: of the disk, where a listener writes.
    """
    try:
        return base(model)(**inputs)
    except (LensError, OSError):
        raise
    except Exception as error:  # of somebody else's code: any kind
        given = ", ".join(
            f"{name} {list(value.shape)}"
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        )
        raise LensError(
            f"{model.info.class_name} cannot run {what} ({given}): {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
