"""docs/models.md: random small models of transformers' classes, captured and held against eager attention.

    python tests/benchmarks/models_table.py            # all classes; writes docs/models.md
    python tests/benchmarks/models_table.py bert opt   # these model types, to the terminal
    python tests/benchmarks/models_table.py --page bert   # these rows of docs/models.md anew, the others as they stand
    python tests/benchmarks/models_table.py bridge:gpt2   # a TransformerBridge of TransformerLens over this class
    python tests/benchmarks/models_table.py whole:t5   # encoder and decoder together, with cross-attention

Each model is made and examined in a process of its own, two at a time. A row says whether the captured
probabilities and the output equal those of `eager`, or the reason of the refusal, and which analyses run.
An error that is no refusal, and a difference, fail the script.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing as mp
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.benchmarks.model_examples import CLASSES, example  # noqa: E402
from tests.lens.hybrids import MODELS as HYBRIDS  # noqa: E402
from tests.lens.hybrids import SIZES as HYBRID_SIZES  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
TYPES = ROOT / "tests" / "benchmarks" / "models.txt"
"""The model types of the table, as transformers calls them, one a line; `bridge:` before one is a `TransformerBridge`,
`whole:` both halves of an encoder-decoder."""
BRIDGE, WHOLE = "bridge:", "whole:"
WORKERS, SECONDS, LARGEST = 2, 100, 12_000_000
EXACT = 1e-4
ANALYSES = ("importance", "weights", "direct", "circuits", "sinks")

_SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim"), 64),
    **dict.fromkeys(("embedding_size", "encoder_hidden_size", "decoder_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("attention_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "n_inner"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "kv_lora_rank", "num_mel_bins"), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 160),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"image_size": 32, "patch_size": 8, "num_frames": 4, "sliding_window": 8},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **{"q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "rotary_dim": 8},
    **{"max_length": 64, "max_source_positions": 32, "moe_num_experts": 4},
}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    **{
        kind: {
            **{"embed_dim": 32, "depths": [2, 2], "num_heads": [4, 4]},
            **{"window_size": 4, "patch_size": 4},
        }
        for kind in ("swin", "swinv2")
    },
    "hiera": {
        **{"embed_dim": 24, "depths": [2, 2, 1], "num_heads": [1, 2, 4], "image_size": [32, 32]},
        **{"patch_size": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1]},
        **{
            "num_query_pool": 2,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, True, False],
        },
    },
    "pvt": {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4]},
    **{
        kind: {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            }
        }
        for kind in ("qwen2_vl_text", "qwen2_5_vl_text")
    },
    **{
        kind: {"image_token_index": 5, "num_query_tokens": 6} for kind in ("blip-2", "instructblip")
    },
    "xmod": {"default_language": "en_XX"},
    "clvp_encoder": {"num_attention_heads": 2, "projection_dim": 64},
    "instructblipvideo": {"video_token_index": 5, "num_query_tokens": 3},
    **{kind: {"projection_dim": 64} for kind in ("paligemma", "siglip_vision_model")},
    "kosmos-2": {"latent_query_num": 6},
    "muse_glimmer_assistant": {"sliding_window": 64},
    "videoprism_vision_model": {"tubelet_size": [1, 8, 8]},
    "kosmos-2.5": {"latent_query_num": 6},
}
_BACKBONE = {
    **{"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    **{"layer_type": "basic", "out_features": ["stage2"]},
}
_OF_TYPE |= {
    kind: {"use_timm_backbone": False, "backbone": None, "backbone_config": _BACKBONE}
    for kind in ("detr", "conditional_detr", "dab-detr", "table-transformer")
}
_OF_TYPE |= {
    kind: {**HYBRID_SIZES, "vocab_size": 160, "num_hidden_layers": 4, **HYBRIDS[kind][0]}
    for kind in HYBRIDS
}
_OF_TYPE["lfm2_moe"] = {"num_hidden_layers": 4, "layer_types": HYBRIDS["lfm2"][0]["layer_types"]}
_OF_TYPE["mamba2"] = {
    "hidden_size": 64,
    "num_heads": 4,
    "head_dim": 32,
    "state_size": 16,
    "n_groups": 1,
}
_BERT = {
    **{"model_type": "bert", "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "intermediate_size": 96},
}
_CROSSING = {**_BERT, "is_decoder": True, "add_cross_attention": True}
_VIT = {**_BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}
_OF_TYPE["encoder-decoder"] = {"encoder": _BERT, "decoder": _CROSSING}
_OF_TYPE["vision-encoder-decoder"] = {"encoder": _VIT, "decoder": _CROSSING}
_OF_TYPE["prophetnet"] = {"num_decoder_layers": 3}
_NO_LAYERS = ("prophetnet",)
"""Whose number of layers is said of each half alone."""
_MAY_BE_NONE = ("num_key_value_heads", "pad_token_id", "head_dim")


def small(config_class: Any) -> Any:
    """A configuration with the sizes above where it has such settings, of its parts too."""
    own = _OF_TYPE.get(config_class.model_type, {})
    default = config_class(**own)
    given: dict[str, Any] = {}
    for name, size in _SIZES.items():
        if name in config_class.attribute_map or isinstance(
            getattr(config_class, name, None), property
        ):
            continue
        try:
            current = getattr(default, name)
        except (AttributeError, RuntimeError):
            continue
        if isinstance(current, int) or (current is None and name in _MAY_BE_NONE):
            given[name] = current if isinstance(current, bool) else size
    if "qk_rope_head_dim" in given:  # latent attention: the width of a head is made of its parts
        given |= {"num_key_value_heads": 4}
        given.pop("head_dim", None)
    for name in config_class.sub_configs or {}:
        try:
            given[name] = small(type(getattr(default, name))).to_dict()
        except Exception:  # of an automatic class, or a part that cannot be so small: as it was
            continue
    if config_class.model_type in _NO_LAYERS:
        given.pop("num_hidden_layers", None)
    return config_class(**given | own)


def class_of(kind: str) -> str:
    """The decoder with its head where there is one, else the bare model."""
    from transformers.models.auto import modeling_auto as auto

    if kind.startswith(BRIDGE):
        return f"TransformerBridge of {class_of(kind.removeprefix(BRIDGE))}"
    if kind in CLASSES:
        return CLASSES[kind]
    if kind.startswith(WHOLE):
        kind = kind.removeprefix(WHOLE)
        several: tuple[Any, ...] = (
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            auto.MODEL_MAPPING_NAMES,
        )
        return next(names[kind] for names in several if kind in names)
    name = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or auto.MODEL_MAPPING_NAMES[kind]
    return name if isinstance(name, str) else name[0]


def make(kind: str, double: bool) -> Any:
    """A model in eval mode whose attention is far from uniform."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = small(transformers.CONFIG_MAPPING[kind.removeprefix(WHOLE)])
    with torch.device("meta"):
        size = sum(one.numel() for one in _made(kind, config).parameters())
    if size > LARGEST:
        raise MemoryError(f"{size:,} weights")
    model = _made(kind, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, one in model.named_parameters():
            drawn = torch.randn(one.shape, generator=generator)
            if one.dim() >= 2:
                factor = 0.8 if "emb" in name or "wte" in name else 1.2 / one[0].numel() ** 0.5
                one.copy_(drawn * factor)
            elif name.endswith("weight"):
                one.add_(0.1 * drawn)
            else:
                one.copy_(0.2 * drawn)
    return (model.double() if double else model).eval()


def bridged(model: Any) -> Any:
    """A `TransformerBridge` over a copy of a model; TransformerLens wants a folder with a tokenizer."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from tests.lens.architectures import save_tokenizer

    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        model.save_pretrained(folder)
        save_tokenizer(Path(folder), model.config.get_text_config().vocab_size)
        return TransformerBridge.boot_transformers(
            folder, hf_model=copy.deepcopy(model), dtype=model.dtype
        )


def _made(kind: str, config: Any) -> Any:
    import transformers

    model = getattr(transformers, class_of(kind))._from_config(config)
    halves = hasattr(model, "get_encoder") and config.is_encoder_decoder
    return model.get_encoder() if halves and not kind.startswith(WHOLE) else model


def examine(kind: str, double: bool = False) -> dict[str, Any]:
    """One row: `class`, `error` or `refused`, and of each analysis whether it runs.

    A model whose logits are so large that float32 is not enough is examined in float64.
    """
    import torch

    import lens
    from lens.common.errors import LensError
    from lens.passes.interface import language_model, switched
    from lens.passes.tiny_inputs import tiny_inputs

    torch.set_num_threads(1)
    row: dict[str, Any] = {"type": kind}
    try:
        bare = make(kind.removeprefix(BRIDGE), double)
        model = bridged(bare) if kind.startswith(BRIDGE) else bare
    except Exception as error:  # the sizes above do not fit this class
        return {**row, "class": class_of(kind), "unbuilt": f"{type(error).__name__}: {error}"[:150]}
    row["class"] = type(model).__name__ if model is bare else class_of(kind)
    step = "load"
    given = example(kind, getattr(model, "config", None))
    try:
        loaded = lens.load(model) if given is None else lens.passes.wrap(model, given)
        inputs = tiny_inputs(loaded)
        step = "capture"
        found = lens.capture(loaded, inputs, block_size=1, progress=False)
        step = "eager"
        towers = loaded.towers or {"": loaded}
        traces = dict(found) if isinstance(found, Mapping) else {"": found}
        errors, layers = [loaded.check or 0.0], sum(len(one.layers) for one in traces.values())
        if given is not None:
            errors += _differences(loaded, traces, inputs)
            row["wrapped"] = True
        for name, one in {}.items() if given is not None else towers.items():
            maps = [
                layer
                for trace in ([traces[name]] if name in traces else traces.values())
                for layer in trace.block_mass.values
            ]
            plain = one.model if model is bare else bare
            with torch.no_grad(), switched(language_model(plain), "eager"):
                own = _attentions(plain, tiny_inputs(one))
            if own is not None and len(own) == len(maps):
                errors += [
                    _difference(torch.from_numpy(probabilities), weights[0].float())
                    for probabilities, weights in zip(maps, own, strict=True)
                    if probabilities.shape == tuple(weights[0].shape)
                    and bool((weights >= 0).all())  # SqueezeBERT returns logits instead
                ]
        if max(errors) > EXACT and not double:
            return examine(kind, double=True)
        row |= {"error": max(errors), "compared": len(errors) - 1, "layers": layers}
        name = next(iter(traces))  # of several towers or stages the first is analysed
        name = "cross" if kind.startswith(WHOLE) else name
        loaded = loaded.part(name) if name else loaded
    except LensError as error:
        # the sizes above make no model of this class
        if re.match(r"\w+ cannot run a tiny prompt \(", str(error)):
            return {**row, "unbuilt": str(error)}
        row["refused"] = str(error)
        alone = step == "capture" and not loaded.info.attending  # of recurrent mixers
        return _analysed(row, ("circuits",), loaded, None) if alone else row
    except Exception as error:
        return {**row, "raw": f"{step}: {type(error).__name__}: {error}"[:300]}
    return _analysed(row, ANALYSES, loaded, traces[name])


def _analysed(row: dict[str, Any], names: Iterable[str], loaded: Any, trace: Any) -> dict[str, Any]:
    """A row with what came of these analyses."""
    from lens.common.errors import LensError

    for name in names:
        try:
            _analyse(name, loaded, trace)
            row[name] = "yes"
        except LensError as error:
            row[name] = str(error)
        except Exception as error:
            return {**row, "raw": f"{name}: {type(error).__name__}: {error}"[:300]}
    return row


def _difference(found: Any, own: Any) -> float:
    """Largest, of a probability; a learned sink's share is left out of some eager probabilities."""
    import torch

    if len(own) > 1 and bool(
        (own == own[:1]).all()
    ):  # WavLM returns the mean of its heads for each
        found, own = found.mean(0), own[0]
    shares = found.sum(-1, keepdim=True)
    if torch.allclose(own.sum(-1), torch.ones(()), atol=1e-4):
        found = torch.where(shares > 0, found / shares, found)
    return float((found - own).abs().max())


def _differences(loaded: Any, traces: Mapping[str, Any], inputs: dict[str, Any]) -> list[float]:
    """Of a wrapped model: those of each layer whose `eager` attention is a function that can be watched."""
    import torch

    from lens.passes.interface import switched

    kept: dict[int, Any] = {}
    named = "eager_attention_forward"
    made = [
        vars(one)
        for name, one in sys.modules.items()
        if name.startswith("transformers.models.") and named in vars(one)
    ]
    before = [one[named] for one in made]

    def watched(own: Any) -> Any:
        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            found = own(module, *args, **kwargs)
            kept[id(module)] = found[1]
            return found

        return run

    for one, own in zip(made, before, strict=True):
        one[named] = watched(own)
    try:
        with torch.no_grad(), switched(loaded.model, "eager"):
            loaded.model(**inputs)
    finally:
        for one, own in zip(made, before, strict=True):
            one[named] = own
    parts = loaded.model.parts or {"": loaded.model.attending}
    errors = []
    for name, trace in traces.items():
        for layer, module in zip(trace.block_mass.values, parts[name], strict=True):
            weights = next((kept[id(one)] for one in module.modules() if id(one) in kept), None)
            if weights is None:
                continue
            rows, heads, queries, keys = weights.shape
            apart = torch.zeros(heads, rows, queries, rows, keys)  # rows side by side
            for row in range(rows):
                apart[:, row, :, row] = weights[row].float()
            own = apart.flatten(3, 4).flatten(1, 2)
            errors.append(_difference(torch.from_numpy(layer), own))
    return errors


def _attentions(model: Any, inputs: dict[str, Any]) -> list[Any] | None:
    """Eager probabilities of the model's own forward pass; None where it returns none."""
    import torch

    try:
        found = model(**inputs, output_attentions=True)
    except Exception:  # it takes no such argument
        return None
    weights = getattr(found, "attentions", None)
    if weights is None:  # of an encoder-decoder, in the order of its parts
        names = (f"{part}_attentions" for part in ("encoder", "decoder", "cross"))
        weights = [one for name in names for one in getattr(found, name, None) or ()]
    kept = [one for one in weights or () if one is not None]
    return (
        kept if kept and all(map(torch.is_tensor, kept)) else None
    )  # PegasusX gives two of each layer


def _analyse(name: str, model: Any, trace: Any) -> None:
    import torch

    import lens
    from lens.passes.tiny_inputs import tiny_inputs
    from lens.tasks import Task

    if name == "weights":
        lens.heads.weights.composition(model)
        return
    if name == "sinks":
        lens.sinks.rate(trace)
        return
    ids = torch.randint(3, 150, (2, 10), generator=torch.Generator().manual_seed(1))
    task = Task(
        "t",
        ids,
        torch.full((2, 1), 9),
        torch.tensor([[5], [6]]),
        "logit_difference",
        corrupt=(ids + 4) % 147 + 3,
        wrong=torch.tensor([[20], [21]]),
    )
    if name == "importance" and model.is_encoder_decoder:  # by the loss of the target
        prompts: Any = [tiny_inputs(model)]
        lens.heads.importance(model, prompts, baseline="zero", progress=False)
    elif name == "circuits":
        lens.circuits.score_edges(model, task, method="eap", progress=False)
    else:
        method = "ablation" if name == "importance" else "direct"
        lens.heads.importance(model, task, method=method, progress=False)


def rows_of(kinds: list[str]) -> list[dict[str, Any]]:
    """Every row, each from a process of its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if any(kind.startswith(BRIDGE) for kind in kinds):
        import transformer_lens.model_bridge  # noqa: F401  (five seconds)
    examine("gpt2")  # reads everything once, before the processes part
    context = mp.get_context("fork")
    waiting, running, rows = list(reversed(kinds)), {}, []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            kind = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(kind, sender))
            process.start()
            sender.close()
            running[kind] = (process, receiver, time.monotonic())
        for kind, (process, receiver, start) in list(running.items()):
            late = time.monotonic() - start > SECONDS
            if receiver.poll() or late or not process.is_alive():
                row: dict[str, Any] = {"type": kind, "class": class_of(kind)}
                try:
                    row = receiver.recv() if receiver.poll() else row | {"raw": "no answer"}
                except EOFError:
                    row["raw"] = f"the process ended with {process.exitcode}"
                process.terminate()
                process.join()
                del running[kind]
                rows.append(row)
                print(json.dumps(row), flush=True)
        time.sleep(0.02)
    return sorted(rows, key=lambda row: kinds.index(row["type"]))


def _send(kind: str, sender: Any) -> None:
    import warnings

    warnings.filterwarnings("ignore")
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        sender.send(examine(kind))


def page(rows: list[dict[str, Any]]) -> str:
    """docs/models.md."""
    return _page([line_of(row) for row in rows])


def refreshed(text: str, rows: list[dict[str, Any]]) -> str:
    """docs/models.md with these rows in the place of theirs."""
    types = {row["type"] for row in rows}
    kept = [
        line for line in text.splitlines() if (found := _ROW.match(line)) and found[1] not in types
    ]
    return _page([*kept, *map(line_of, rows)])


_ROW = re.compile(r"\| [\w ]+ \(([\w.:-]+)\) \|")


def _page(rows: list[str]) -> str:
    exact = [row for row in rows if ") | exact" in row]
    bridges, whole = (sum(f"({kind}" in row for row in rows) for kind in (BRIDGE, WHOLE))
    wrapped = sum("exact (wrapped" in row for row in exact)
    lines = [
        "# Models",
        "",
        f"{len(rows) - bridges} classes of transformers with random small weights, {whole} of them whole encoder-decoders "
        f"(`{WHOLE}`, analysed in their cross-attention; of others the encoder), and {bridges} as a "
        f"`TransformerBridge` of TransformerLens: {len(exact)} are captured, {wrapped} of them by "
        "`lens.passes.wrap(model, inputs)` with an example of what they read, and "
        f"their probabilities and output equal `eager` to {EXACT:.0e} (of the largest; most to 1e-6); "
        f"{len(rows) - len(exact)} are refused by `lens.load` or `lens.capture` with the reason that stands here. "
        "Analyses: `heads.importance` by ablation, `heads.weights.composition`, direct attribution, "
        "`circuits.score_edges`, `sinks.rate`. A bare model has no logits, so those that need them refuse it. "
        "Models of recurrent mixers alone have no attention to capture; their circuits are analysed.",
        "",
        "Made by `make models-table` (tests/benchmarks/models_table.py).",
        "",
        "| class | captured | importance | weights | direct | circuits | sinks |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *sorted(rows, key=str.lower)]) + "\n"


def line_of(row: dict[str, Any]) -> str:
    """One row of the table."""
    name = f"{row['class']} ({row['type']})"
    if "error" not in row:
        reason = re.sub(r"[|<>]", "", row["refused"])
        cells = [f" {_told(row[one])}" if one in row else "" for one in ANALYSES]
        return f"| {name} | refused: {reason} |{' |'.join(cells)} |"
    cells = " | ".join(_told(row[one]) for one in ANALYSES)
    notes = ["wrapped"] * row.get("wrapped", False) + ["output"] * (not row["compared"])
    how = f"exact ({', '.join(notes)})" if notes else "exact"
    return f"| {name} | {how} | {cells} |"


def _told(found: str) -> str:
    return "yes" if found == "yes" else "refused"


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row tells of an error that is no refusal, of a difference, or of no model."""
    return "raw" in row or "unbuilt" in row or row.get("error", 0) > EXACT


def main(arguments: list[str]) -> int:
    """Make the table, or show some rows."""
    some = arguments[:1] == ["--page"]
    kinds = arguments[some:] or TYPES.read_text().split()
    rows = rows_of(kinds)
    bad = [row for row in rows if wrong(row)]
    for row in bad:
        print("WRONG", json.dumps(row))
    if not bad and (some or not arguments):
        PAGE.write_text(refreshed(PAGE.read_text(), rows) if some else page(rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
