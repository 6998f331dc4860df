"""`lens.passes.wrap`: an `nn.Module` of any kind becomes a model that `lens` captures and edits.

Attention is reached in one of two ways. Most modules call torch's `scaled_dot_product_attention`, hold a
`MultiheadAttention` or write the softmax out: these are followed (`lens.passes.computed`). For others the caller
names what makes queries, keys and values and what reads the heads' outputs. In either case a pass over
example inputs proves that the module's output is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lens.common.choices import check_counts, check_lists
from lens.common.errors import LensError
from lens.common.head_ids import PARTS
from lens.models.info import ModelInfo
from lens.models.loaded import LoadedModel
from lens.models.quantised import refuse_torch_quantised
from lens.models.wrapped import Wrapped, first_argument
from lens.passes.calls import LayerCall, attend
from lens.passes.check import measured, self_check
from lens.passes.computed import Attend
from lens.passes.sessions import listening, run

Made: TypeAlias = str | Callable[..., Tensor]
"""The name of a module inside the attention, whose output [batch, tokens, heads × head_dim] it is; or a function of
the attention module and its arguments that gives [batch, heads, tokens, head_dim]."""


def wrap(
    module: nn.Module,
    inputs: Any,
    *,
    attention: str | type[nn.Module] | Sequence[nn.Module] | Mapping[str, Any] | None = None,
    query: Made | None = None,
    key: Made | None = None,
    value: Made | None = None,
    output: str | None = None,
    gate: Made | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> LoadedModel:
    """A module with attention of its own, ready for `lens.capture`, `lens.edit` and what builds on them.

    Args:
        module: in eval mode; what it returns, or the first of several, is a tensor.
        inputs: an example of what its forward pass takes: one tensor, or a mapping of names to tensors.
        attention: which of its modules attend, each a layer, in order: a pattern of their names such as
            `"blocks.*.attn"`, their class, or the modules. None: the outermost whose class has "att" in its name. A mapping
            of names to these: each name is a part with positions of its own (`model.part(name)`).
        query, key, value: where they come from, where the attention cannot be followed; for queries that are
            rotated or normalised after their projection give functions. `query` alone names a joint projection
            of all three, side by side.
        output: the name of the module that reads the outputs of the heads; with `query` alone.
        gate: what the outputs of the heads are multiplied by before `output` reads them, one number a head or one for
            each of its channels; of a module what it gives, so that an activation behind it needs a function.
        heads, kv_heads: how many; needed with `query`, and where the module folds heads into the batch.
        causal, scale: of the attention that `query` describes; scale None: head_dim^-1/2.
        tokenizer: for texts.
        name: of the model; its class if None.

    Returns:
        The model. Layers are numbered as the attention modules come. Where on `inputs` some attend from or to another
        number of positions than others (a text, a picture and both together), those that go together are a part, with layers
        numbered in it: `lens.capture` gives a trace of each. So `inputs` that belong to several rows of positions should
        have other lengths. Several rows for one input (frames, a pair of pictures) stand side by side, `row,position`.

    Raises:
        LensError: training mode, layers that torch quantised, no attention that can be reached, or outputs that are not the module's own
            once the attention stands in its place.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> tiny = lens.passes.wrap(torch.nn.TransformerEncoder(layer, 2).eval(), torch.randn(1, 9, 32))
        >>> tiny.info.heads
        4
    """
    if not isinstance(module, nn.Module):
        raise LensError(f"wrap takes an nn.Module, got {type(module).__name__}")
    if module.training:
        raise LensError(
            f"{type(module).__name__} is in training mode, where dropout makes attention random; call "
            ".eval() first"
        )
    refuse_torch_quantised(module)
    check_counts(**{n: v for n, v in (("heads", heads), ("kv_heads", kv_heads)) if v is not None})
    given = dict(inputs) if isinstance(inputs, Mapping) else {first_argument(module): inputs}
    if not any(isinstance(value, Tensor) for value in given.values()):
        raise LensError("inputs must be a tensor, or names and tensors, that the module takes")
    named = attention if isinstance(attention, Mapping) else {"": attention}
    chosen = {name: _attending(module, one) for name, one in named.items()}
    root = Wrapped(module, [one for several in chosen.values() for one in several], given)
    if isinstance(attention, Mapping):
        root.parts = _checked_parts(chosen)
    root.eval()
    if query is not None:
        root.following = _Projected(query, key, value, output, gate, heads, kv_heads, causal, scale)
    else:
        alone = (key, value, output, gate, kv_heads, scale)
        if causal is not False or any(one is not None for one in alone):
            raise LensError(
                "key, value, output, gate, kv_heads, causal and scale go with query: name what makes the queries too"
            )
    root.heads = heads
    model = LoadedModel(root, tokenizer, name or type(module).__name__, None, _unknown(root))
    info, calls = _measured(model)
    model = replace(model, info=info)
    root.parts = root.parts or _parts(root, calls)
    apart = [one for one in calls if one.query.shape[2] != one.key.shape[2] and not one.mask.causal]
    every = [*(root.attending[one.layer] for one in apart), *_named_cross(root)]
    root.crossing = frozenset(id(part) for one in every for part in one.modules())
    model = replace(model, parts=dict.fromkeys(root.parts, info))
    if heads is not None and heads != model.info.heads:
        raise LensError(
            f"heads={heads} and the attention of {type(module).__name__} has {model.info.heads}; leave it out"
        )
    return _proved(model)


def _proved(model: LoadedModel) -> LoadedModel:
    """After its self-check, with the sizes that this saw.

    Raises:
        LensError: as `self_check`, or a part of which nothing was seen.
    """
    root, checked = model.model, self_check(model)
    if not root.parts:
        info = replace(model.info, attending=checked.seen[""].attending, layers=len(root.attending))
        return replace(model, info=info, check=checked.difference)
    if unseen := sorted(root.parts.keys() - checked.seen.keys()):
        raise LensError(
            f"on this example no attention of {', '.join(unseen)} runs that can be followed; leave it out"
        )
    parts = {
        name: replace(measured(model.info, checked.seen[name]), layers=len(layers))
        for name, layers in root.parts.items()
    }
    return replace(model, parts=parts, check=checked.difference)


def _checked_parts(chosen: Mapping[str, list[nn.Module]]) -> dict[str, list[nn.Module]]:
    """Parts by the names that the caller gave.

    Raises:
        LensError: names that are none or another's, or a module in two parts.
    """
    for name in chosen:
        if not isinstance(name, str) or not name.isidentifier() or name in PARTS:
            raise LensError(
                f"attention={{{name!r}: ...}}: a part is called by one word of letters, digits and _, and not "
                f"{', '.join(PARTS)}, which are those of transformers' encoder-decoders"
            )
    modules = [id(one) for several in chosen.values() for one in several]
    if len(set(modules)) < len(modules):
        raise LensError("a module of attention is in two parts; give each to one")
    return dict(chosen)


def _parts(root: Wrapped, calls: Sequence[LayerCall]) -> dict[str, list[nn.Module]]:
    """Layers that go together, where not all have the same positions and heads: by where they are, else by their number."""
    sizes: dict[int, set[tuple]] = {}
    crossing = set(_named_cross(root))
    for call in calls:
        other = root.attending[call.layer] in crossing
        own = call.query.shape[1:3], call.key.shape[2], call.mask.causal, other
        sizes.setdefault(call.layer, set()).add(own)

    def alike(layers: Iterable[int]) -> bool:
        return len({frozenset(sizes[layer]) for layer in layers}) < 2

    if alike(sizes):
        return {}
    names = {id(module): name for name, module in root.module.named_modules()}
    paths = {layer: tuple(names[id(root.attending[layer])].split(".")) for layer in sizes}
    groups = _by(paths)
    for pattern, layers in list(groups.items()):
        if not alike(layers):
            own = {layer: paths[layer] for layer in layers}
            stars = [place for place, one in enumerate(pattern) if one == "*"]
            ways = [_by(own, [place]) for place in stars]  # stages, or kinds in a layer (T5)
            good = [way for way in ways if all(map(alike, way.values()))]
            del groups[pattern]
            groups |= min(good, key=len) if good else _by(own, stars)
    return {
        name: [root.attending[layer] for layer in layers]
        for name, layers in zip(_names(list(groups)), groups.values(), strict=True)
    }


def _by(
    paths: Mapping[int, tuple[str, ...]], places: Sequence[int] = ()
) -> dict[tuple[str, ...], list[int]]:
    """Layers by their path, whose numbers count at these places alone."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer, path in sorted(paths.items()):
        own = tuple(
            "*" if one.isdigit() and place not in places else one for place, one in enumerate(path)
        )
        groups.setdefault(own, []).append(layer)
    return groups


def _named_cross(root: Wrapped) -> list[nn.Module]:
    """Those that attend to another row of positions by their own name (`crossattention`)."""
    names = {id(module): name for name, module in root.module.named_modules()}
    return [one for one in root.attending if "cross" in names[id(one)].rpartition(".")[2].lower()]


def _names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Of each path as little as tells it from the others."""
    found = []
    for path in paths:
        others = [one for one in paths if one != path]
        length = next(
            (n for n in range(1, len(path)) if all(one[:n] != path[:n] for one in others)),
            len(path),
        )
        name, whole = (
            "_".join(one for one in some if one != "*") for some in (path[:length], path)
        )
        found.append(whole if name in PARTS else name)
    return found


def _attending(module: nn.Module, attention: Any) -> list[nn.Module]:
    named = dict(module.named_modules())
    if attention is None:
        chosen = _outer({n: one for n, one in named.items() if "att" in type(one).__name__.lower()})
    elif isinstance(attention, str):
        chosen = _outer({n: one for n, one in named.items() if fnmatchcase(n, attention)})
    elif isinstance(attention, type):
        chosen = [one for one in named.values() if isinstance(one, attention)]
    else:
        check_lists(attention=attention)
        chosen = list(attention)
        known = set(map(id, named.values()))
        if not all(isinstance(one, nn.Module) and id(one) in known for one in chosen):
            raise LensError("attention must be modules of the module that is wrapped")
    if not chosen:
        kinds = sorted({type(one).__name__ for one in named.values()})
        raise LensError(
            f"no module of {type(module).__name__} is meant by attention={attention!r}; it has "
            f"{', '.join(kinds[:12])}: give a pattern of names, a class or the modules"
        )
    return chosen


def _outer(found: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Those that are in no other."""

    def inside(name: str, other: str) -> bool:
        return name != other and (name.startswith(f"{other}.") or not other)

    return [one for name, one in found.items() if not any(inside(name, o) for o in found)]


def _unknown(root: Wrapped) -> ModelInfo:
    """Sizes before the first pass."""
    layers = len(root.attending)
    weights = sum(parameter.numel() for parameter in root.parameters())
    kind = type(root.module).__name__
    return ModelInfo(layers, 1, 1, 1, None, None, weights, "unknown", kind, tuple(range(layers)))


def _measured(model: LoadedModel) -> tuple[ModelInfo, list[LayerCall]]:
    """Sizes from a pass over the example, of the first call and of the table that the token ids are read from; all calls."""
    root: Wrapped = model.model
    calls: list[LayerCall] = []
    vocab: list[int] = []
    main = root.example.get(root.main_input_name)

    def on_layer(call: LayerCall) -> Tensor:
        calls.append(call)
        return attend(call, statistics=()).output

    def reads(table: nn.Module, args: tuple, _: Any) -> None:
        if args and args[0] is main:
            vocab.append(int(table.num_embeddings))  # type: ignore[arg-type]

    with ExitStack() as stack:
        for one in root.modules():
            if isinstance(one, nn.Embedding):
                stack.callback(one.register_forward_hook(reads).remove)
        with torch.no_grad(), listening(model, on_layer, parts=True):
            run(model, root.example, "the example")
    if not calls:
        raise LensError(
            f"cannot reach the attention of {root.attending[0].__class__.__name__}: it calls neither "
            "torch's attention nor a softmax over scores in a way that can be followed; name what makes queries, "
            "keys and values: lens.passes.wrap(..., query=, key=, value=, output=, heads=)"
        )
    first = calls[0]
    info = replace(
        model.info,
        heads=first.query.shape[1],
        kv_heads=first.key.shape[1],
        head_dim=first.query.shape[3],
        vocab=vocab[0] if vocab else None,
    )
    return info, calls


@dataclass(frozen=True, eq=False)
class _Projected:
    """Attention between modules that the caller named: `output` reads ours instead of what it was given."""

    query: Made
    key: Made | None
    value: Made | None
    output: str | None
    gate: Made | None
    heads: int | None
    kv_heads: int | None
    causal: bool
    scale: float | None

    def __post_init__(self) -> None:
        if self.output is None or self.heads is None:
            raise LensError(
                "query needs output (the name of the module that reads the heads) and heads"
            )
        if (self.key is None) != (self.value is None):
            raise LensError("give key and value, or neither where query is a joint projection")
        if self.key is None and (not isinstance(self.query, str) or self.kv_heads):
            raise LensError(
                "query alone names one module whose output is queries, keys and values side by side, of as "
                "many heads each"
            )

    @contextmanager
    def __call__(self, modules: Sequence[nn.Module], attend: Attend) -> Iterator[None]:
        """The attention of these modules is `attend` inside the block."""
        with ExitStack() as stack:
            for module in modules:
                self._hook(stack, module, attend)
            yield

    def _hook(self, stack: ExitStack, module: nn.Module, attend: Attend) -> None:
        found: dict[str, Tensor] = {}
        arguments: list[tuple[tuple, dict[str, Any]]] = []

        def begin(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.clear()
            arguments[:] = [(args, kwargs)]

        def part(name: str) -> Any:
            return lambda _, __, output: found.__setitem__(name, output)

        def made(given: Made | None, name: str, heads: int) -> Tensor:
            if callable(given):
                args, kwargs = arguments[0]
                return given(module, *args, **kwargs)
            if name not in found:
                raise LensError(
                    f"{given!r} of {type(module).__name__} did not run before its output"
                )
            return found[name].unflatten(-1, (heads, -1)).transpose(1, 2)

        def heads_of(_: nn.Module, args: tuple) -> tuple:
            assert self.heads is not None
            if self.key is None:
                q, k, v = made(self.query, "query", 3 * self.heads).chunk(3, 1)
            else:
                few = self.kv_heads or self.heads
                q = made(self.query, "query", self.heads)
                k, v = made(self.key, "key", few), made(self.value, "value", few)
            scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
            ours = attend(module, q, k, v, None, scale, None, self.causal)
            if self.gate is not None:
                ours = ours * made(self.gate, "gate", self.heads).transpose(1, 2)
            return (ours.flatten(2).reshape(args[0].shape).to(args[0].dtype), *args[1:])

        stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for name in ("query", "key", "value", "gate"):
            if isinstance(path := getattr(self, name), str):
                stack.callback(_part(module, path).register_forward_hook(part(name)).remove)
        assert self.output is not None
        reader = _part(module, self.output)
        stack.callback(reader.register_forward_pre_hook(heads_of).remove)


def _part(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in module.named_children())
        raise LensError(
            f"{type(module).__name__} has no module {path!r}; it has {names}"
        ) from error
