"""Finds the parts of a loaded model, as its row of `lens.models.architectures` names them.

Of an architecture without a row `blocks` and `sublayers` still find the layers, by their usual shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lens.common.errors import LensError
from lens.models.architectures import ARCHITECTURES, Architecture
from lens.models.bare import bare
from lens.models.loaded import LoadedModel, check_loaded
from lens.models.parts import Block, Layout, Norm, setting
from lens.models.sizes import reads_picture_first
from lens.models.stacks import outermost
from lens.models.weights import matrix


def is_known(model: LoadedModel) -> bool:
    """Whether the table has a row for the architecture of a model."""
    return _row(bare(model))[0] is not None


def layout(model: LoadedModel) -> Layout:
    """The parts of a model; not yet proved (`lens.passes.replay.proved` does).

    Raises:
        LensError: layers without softmax attention; an architecture that is not in the table, or whose configuration is none of it; a
            `TransformerBridge` whose weights were processed.
    """
    check_loaded(model)
    if model.towers:
        model.check_part()
    model = bare(model)
    root: Any = model.model
    row, kind, base = _row(model)
    model.info.check_all_attend(
        "what rests on the parts of each layer (circuits in words or in spans, direct attribution, weights)"
    )
    if not model.is_bridge and reads_picture_first(root):
        raise LensError(
            f"{model.info.class_name} runs on no text without a picture; load its language model alone: "
            "lens.load(model.language_model)"
        )
    if row is None:
        raise LensError(
            f"where {kind!r} keeps its parts is not known here; known: {', '.join(ARCHITECTURES)}"
        )
    _refuse_variants(kind, base)
    modules = _blocks(base, row, model.info.layers)
    *between, last_name = row.head
    unembedding = _part(root, last_name)
    head = () if unembedding is None else tuple(map(root.get_submodule, between))
    if isinstance(unembedding, nn.Identity):  # an image classifier without classes
        unembedding = None
    blocks: list[Block] = []
    for module in modules:
        norm = _norm(module, row.before_attention, row.norm)
        if row.closing is not None and blocks:
            norm = _norm(blocks[-1].module, row.closing, row.norm)
        blocks.append(_block(module, row, model, norm, base))
    last = _norm(base, row.final_norm, row.norm)
    if row.closing is not None:
        last = _norm(modules[-1], row.closing, row.norm)
    named = isinstance(row.parallel, str)
    return Layout(
        model=model,
        kind=kind,
        blocks=tuple(blocks),
        final_norm=last,
        parallel=bool(setting(base, str(row.parallel), False) if named else row.parallel),
        normed=row.closing is not None,
        head=head,
        unembedding=unembedding,
        logit_scale=setting(base, row.logit_scale, 1) / setting(base, row.logit_divisor, 1),
        softcap=setting(base, row.softcap, None),
        _row=row,
        _base=base,
    )


class SubLayers(NamedTuple):
    """Of one layer the modules that write to the residual stream; `mlp` is None where none is found.

    Outside of the table it is found by its name alone: MPNet, ESM, BioGPT and XGLM have MLPs that are not.
    """

    attention: nn.Module
    mlp: nn.Module | None


_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe")


def blocks(model: LoadedModel) -> list[nn.Module]:
    """The layers of any model, in order: those of the table, else the one list with as many modules.

    Raises:
        LensError: there is no such list, or there are several.
    """
    row, _, base = _row(model)
    if row is not None:
        return _blocks(base, row, model.info.layers)
    layers = model.info.layers
    outer = outermost(
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == layers
    )
    if len(outer) != 1:
        raise LensError(
            f"{model.info.class_name} has {len(outer)} lists of {layers} modules, and exactly one must "
            "be its layers; its residual stream cannot be found"
        )
    return list(outer[0])


def sublayers(model: LoadedModel) -> list[SubLayers]:
    """What writes to the stream in each layer: of the table, else children with the usual names.

    `lens.passes.sublayers` proves them.

    Raises:
        LensError: a bridge, layers that have no such children, or that share them (ALBERT).
    """
    row, kind, _ = _row(model)
    found, layers = [], blocks(model)
    if len(set(layers)) < len(layers):
        raise LensError(
            f"layers of {kind!r} share their modules, so that none can be left out alone"
        )
    for number, block in enumerate(layers):
        if row is not None:
            mlp = block.get_submodule(row.mlp[-1]) if _part(block, row.mlp[0]) is not None else None
            found.append(SubLayers(block.get_submodule(row.output), mlp))
            continue
        parts = [
            next((part for name in names if (part := _part(block, name)) is not None), None)
            for names in (_ATTENTION, _MLP)
        ]
        if model.is_bridge or parts[0] is None:
            raise LensError(
                f"layer {number} of {model.info.class_name} has no child named {', '.join(_ATTENTION)}, so "
                "their sub-layers cannot be taken out; pass the transformers model"
            )
        found.append(SubLayers(parts[0], parts[1]))
    return found


def _row(model: LoadedModel) -> tuple[Architecture | None, str, nn.Module]:
    """Its row or None, the name of its kind, and the module without a head.

    Raises:
        LensError: an encoder-decoder.
    """
    if model.parts and not model.is_encoder_decoder:
        raise LensError(
            f"{model.info.class_name} has no one list of layers ({', '.join(model.parts)}), and what rests on one "
            "(sub-layers, Activation, circuits, direct attribution, weights) does not take it; edits of attention "
            f"and Ablate of heads take model.part({next(iter(model.parts))!r})"
        )
    if model.parts:
        raise LensError(
            f"{model.info.class_name} is an encoder-decoder with two residual streams, and what rests on one "
            "(sub-layers, Activation, circuits, direct attribution, weights) does not take it; edits of attention, "
            "Ablate of heads, lens.effect and lens.heads.importance take model.part('cross')"
        )
    root = model.transformer
    config = getattr(root, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return None, type(root).__name__, root
    text = config.get_text_config()
    part: Any = next(part for part in root.modules() if getattr(part, "config", None) is text)
    kind = str(text.model_type)
    row = None if model.is_bridge else ARCHITECTURES.get(kind)
    return row, kind, getattr(part, "base_model", part)


def _blocks(base: nn.Module, row: Architecture, layers: int) -> list[nn.Module]:
    try:
        found: Any = base.get_submodule(row.blocks)
    except AttributeError as error:
        config: Any = base.config
        raise LensError(
            f"{type(base).__name__} is not built as models of type {config.model_type!r} are, as which its configuration "
            "describes it: model_type and architectures of config.json must fit together"
        ) from error
    if len(found) != layers and not row.shared:
        raise LensError(
            f"{type(base).__name__} has {len(found)} blocks and {layers} layers of attention"
        )
    return [found[int(number * len(found) / layers)] for number in range(layers)]


def _refuse_variants(kind: str, base: Any) -> None:
    """Raises: LensError: settings with which an architecture is another than the one of the table."""
    if kind == "opt" and not base.config.do_layer_norm_before:
        raise LensError(
            "OPT with norms after its sums (do_layer_norm_before=False, as in opt-350m) is not known here"
        )
    if kind == "albert" and base.config.inner_group_num != 1:
        raise LensError("ALBERT with several layers in a group (inner_group_num) is not known here")


def _block(
    module: nn.Module, row: Architecture, model: LoadedModel, norm: Norm, base: Any
) -> Block:
    heads = model.info.heads
    attention = module.get_submodule(row.attention)
    projections = tuple(attention.get_submodule(name) for name in row.qkv)
    output_module = module.get_submodule(row.output)
    has_mlp = _part(module, row.mlp[0]) is not None
    output, output_bias = matrix(output_module, model)
    width = len(output) // heads
    multiplier = setting(base, row.residual_scale, 1)
    return Block(
        module=module,
        attention=attention,
        norm=norm,
        mlp_norm=_norm(module, row.before_mlp if has_mlp else None, row.norm),
        after=_norm(module, row.after_attention, row.norm),
        mlp_after=_norm(module, row.after_mlp if has_mlp else None, row.norm),
        projections=projections,
        joint=row.joint,
        weights=_qkv([matrix(one, model) for one in projections], row, model, width),
        head_norms=(
            _norm(attention, _first(attention, "q_norm", "q_layernorm"), row.norm),
            _norm(attention, _first(attention, "k_norm", "k_layernorm"), row.norm),
        ),
        output_module=output_module,
        output=output.unflatten(0, (heads, width)) * multiplier,
        output_bias=None if output_bias is None else output_bias * multiplier,
        mlp=tuple(module.get_submodule(name) for name in row.mlp) if has_mlp else (),
        multiplier=multiplier,
    )


def _qkv(
    made: list[tuple[Tensor, Tensor | None]], row: Architecture, model: LoadedModel, width: int
) -> tuple[tuple[Tensor, Tensor | None], ...]:
    """[heads, in, width] and [heads, 1, width] of q, k and v, of the weights of their projections."""
    heads, kv_heads = model.info.heads, model.info.kv_heads

    def split(tensor: Tensor) -> list[Tensor]:
        if row.joint == "heads":
            parts = tensor.unflatten(-1, (heads, 3, width))
            return [parts[..., number, :] for number in range(3)]
        sizes = [count * width for count in (heads, kv_heads, kv_heads)]
        return [part.unflatten(-1, (-1, width)) for part in tensor.split(sizes, -1)]

    if row.joint:
        weight, bias = made[0]
        pairs = zip(
            split(weight), split(bias[None]) if bias is not None else [None] * 3, strict=True
        )
    else:
        pairs = (
            (
                weight.unflatten(-1, (-1, width)),
                None if bias is None else bias[None].unflatten(-1, (-1, width)),
            )
            for weight, bias in made
        )
    return tuple(
        (weight.movedim(-2, 0), None if bias is None else bias.movedim(-2, 0))
        for weight, bias in pairs
    )


def _norm(owner: nn.Module, path: str | None, kind: str) -> Norm:
    module = None if path is None else owner.get_submodule(path)
    if module is None or kind == "none":
        return Norm(module)
    scale, shift = (getattr(module, name, None) for name in ("weight", "bias"))
    if scale is not None:
        scale = scale.detach() + (kind == "rms+1")
    epsilon = next(
        (getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)), 0
    )
    return Norm(
        module,
        scale,
        None if shift is None else shift.detach(),
        kind == "layer",
        float(epsilon),
        True,
    )


def _part(owner: nn.Module, path: str) -> nn.Module | None:
    """A submodule, or None."""
    found: Any = owner
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _first(owner: nn.Module, *names: str) -> str | None:
    return next((name for name in names if getattr(owner, name, None) is not None), None)
