"""A name, a folder, a hub id, a model object or a bridge becomes a `LoadedModel`: `lens.load` before its check."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lens.common.errors import LensError, first_line, told
from lens.common.files import on_disk
from lens.common.head_ids import PARTS
from lens.models import dinov2, smollm2, whisper
from lens.models.adapters import CONFIG, adapted, adapter_base, unwrapped
from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel
from lens.models.catalogue import DEFAULT_MODEL, KNOWN, is_hub_id, unknown_model
from lens.models.checkpoints import check_layers, trained
from lens.models.info import ModelInfo
from lens.models.loaded import LoadedModel, is_bridge
from lens.models.processors import check_given, read_processor
from lens.models.quantised import (
    class_of,
    names_tokens,
    readable_weights,
    refuse_torch_quantised,
    tell_rounding_once,
)
from lens.models.sizes import (
    describe,
    describe_bridge,
    in_stages,
    reads_picture_first,
    reads_pictured_text,
)
from lens.models.stacks import stacks
from lens.models.stages import stages
from lens.models.tokens import check_fit
from lens.models.towers import described_towers
from lens.models.words import SymbolTokenizer

_MOST_JSON = 2**28  # bytes of a file; tokenizers of 260,000 words have 33 MB
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
)

_PACKAGED = {one.name: one for one in (smollm2.MODEL, dinov2.MODEL, whisper.MODEL)}
_KERNELS = {"use_mamba_kernels": False, "disable_custom_kernels": True}


def load_unchecked(
    name_or_model: Any = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    processor: Any = None,
) -> LoadedModel:
    """`lens.load` without its self-check, which needs a forward pass; arguments and errors are its own."""
    check_given(tokenizer=tokenizer, processor=processor)
    if isinstance(name_or_model, (str, Path)):
        loaded = _from_name(str(name_or_model), revision, _dtype(dtype), _device(device))
        check_fit(tokenizer or loaded.tokenizer, loaded.info.vocab, loaded.name)
        return replace(
            loaded,
            tokenizer=tokenizer or loaded.tokenizer,
            processor=processor or loaded.processor,
        )
    if revision is not None or dtype is not None or device is not None:
        raise LensError(
            "revision, dtype and device go with a name; a model object is taken as it is "
            "(use model.to(device, dtype) before lens.load)"
        )
    tokenizer = tokenizer or getattr(processor, "tokenizer", None)
    name_or_model = unwrapped(name_or_model)
    loaded = replace(_from_object(name_or_model, tokenizer), processor=processor)
    check_fit(loaded.tokenizer, loaded.info.vocab, loaded.name)
    return loaded


_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
}
"""What wraps a model -> where it keeps it."""


def _from_object(model: Any, tokenizer: Any) -> LoadedModel:
    if isinstance(model, PreTrainedModel):
        if model.training:
            raise LensError(
                f"{type(model).__name__} is in training mode, where dropout makes attention random; "
                "call model.eval() first"
            )
        _refuse_absent_weights(model)
        refuse_torch_quantised(model)
        name = str(model.config.name_or_path or type(model).__name__)
        return _described(model, tokenizer, Path(name).name)
    if is_bridge(model):
        return LoadedModel(
            model,
            tokenizer or model.tokenizer,
            Path(model.cfg.model_name).name,
            None,
            describe_bridge(model),
        )
    inside = _INSIDE.get(type(model).__name__)
    if inside is not None:
        raise LensError(
            f"a model inside {type(model).__name__} is loaded without it: lens.load(model.{inside})"
        )
    raise LensError(
        f"cannot reach the attention of {type(model).__name__}: it is neither a transformers PreTrainedModel "
        "(whose attention goes through AttentionInterface) nor a TransformerBridge; "
        "lens.passes.wrap(module, inputs) takes any nn.Module with attention"
    )


def _from_name(
    name: str, revision: str | None, dtype: torch.dtype | None, device: torch.device
) -> LoadedModel:
    known, folder = KNOWN.get(name), on_disk(name)
    if known is None and is_hub_id(name) and not folder.is_dir():
        return _from_hub(name, revision, dtype, device)
    if revision is not None:
        raise LensError(f"revision goes with a hub id such as owner/name, not with {name}")
    if known is None:
        if folder.suffix == ".gguf" and folder.is_file():
            return _from_folder(folder.parent, dtype, device, gguf_file=folder.name)
        if not folder.is_dir():
            raise LensError(unknown_model(name))
        return _from_any_folder(folder, dtype, device)
    if name == "induction-2l":
        loaded = replace(_from_folder(known.folder, dtype, device), tokenizer=SymbolTokenizer())
    elif made := _PACKAGED.get(name):
        loaded = replace(_from_folder(made.folder(), dtype, device), revision=made.revision)
    else:
        loaded = _from_folder(known.folder, dtype, device)
    return replace(loaded, name=name, info=replace(loaded.info, licence=known.licence))


def _from_any_folder(folder: Path, dtype: torch.dtype | None, device: torch.device) -> LoadedModel:
    """Of a model that `save_pretrained` wrote, of an adapter of peft, or with one GGUF file."""
    for path in folder.glob("*.json"):  # transformers reads them whole, whatever they are
        if path.exists() and (not path.is_file() or path.stat().st_size > _MOST_JSON):
            size = f"has {path.stat().st_size:,} bytes" if path.is_file() else "is no regular file"
            raise LensError(
                f"cannot load the model in {folder}: {path.name} {size}, and at most {_MOST_JSON:,} are read; download "
                "it again"
            )
    if (folder / CONFIG).is_file():
        base = adapter_base(folder)
        inside = (folder / "config.json").is_file()  # transformers reads model and adapter then
        loaded = (
            _from_folder(folder, dtype, device) if inside else _from_name(base, None, dtype, device)
        )
        model = loaded.model if inside else adapted(loaded.model, folder)
        tokenizer = _tokenizer(folder) or loaded.tokenizer
        return replace(_described(model, tokenizer, folder.name), processor=loaded.processor)
    files = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or len(files) != 1:
        return _from_folder(folder, dtype, device)
    return _from_folder(folder, dtype, device, gguf_file=files[0].name)


def _from_folder(
    folder: Path, dtype: torch.dtype | None, device: torch.device, gguf_file: str | None = None
) -> LoadedModel:
    if gguf_file is None and not (folder / "config.json").is_file():
        raise LensError(
            f"{folder} holds no model: config.json is missing; give a folder written by save_pretrained, or a GGUF file"
        )
    with told(lambda why: f"cannot load the model in {folder}: {why}"):
        has_tokens = gguf_file is None or names_tokens(folder / gguf_file)
        model = _pretrained(str(folder), None, dtype, device, local=True, gguf_file=gguf_file)
        tokenizer = _tokenizer(folder, gguf_file) if has_tokens else None
        processor = read_processor(model, str(folder), local_files_only=True)
    name = folder.name if gguf_file is None else Path(gguf_file).stem
    return replace(_described(model, tokenizer, name), processor=processor)


def _tokenizer(folder: Path, gguf_file: str | None = None) -> Any:
    """That of a GGUF file, which holds one, or of a folder: None where there is none."""
    if gguf_file is None and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _from_hub(
    name: str, revision: str | None, dtype: torch.dtype | None, device: torch.device
) -> LoadedModel:
    commit, local = _commit(name, revision)
    with told(lambda why: _no_hub(name, why)):
        model = _pretrained(name, commit, dtype, device, local=local)
        tokenizer = None
        if getattr(model.config.get_text_config(), "vocab_size", None) is not None:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=commit, local_files_only=local, trust_remote_code=False
            )
        processor = read_processor(model, name, revision=commit, local_files_only=local)
    return replace(_described(model, tokenizer, name, commit), processor=processor)


def _commit(name: str, revision: str | None) -> tuple[str, bool]:
    """The commit that a revision stands for, and whether only the local copy of it can be had.

    One quick question: transformers alone would ask for the better part of a minute.

    Raises:
        LensError: the hub does not answer and nothing was fetched before.
    """
    try:
        commit = huggingface_hub.model_info(name, revision=revision, timeout=10).sha
    except Exception as error:  # of whichever HTTP library the hub's client uses
        cached = huggingface_hub.try_to_load_from_cache(
            name, "config.json", huggingface_hub.constants.HF_HUB_CACHE, revision
        )
        if not isinstance(cached, str):
            raise LensError(_no_hub(name, first_line(error))) from error
        return Path(cached).parent.name, True
    return commit or revision or "main", False


def _no_hub(name: str, reason: str) -> str:
    other = "" if "/" in name else f"{name!r} is neither embedded nor a folder here; "
    return (
        f"{other}cannot get {name} from the Hugging Face hub: {reason}; check the name and the network "
        f"(a gated model needs HF_TOKEN), give a folder, or an embedded model: {', '.join(KNOWN)}"
    )


def _pretrained(
    name: str,
    revision: str | None,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    local: bool,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The class that the checkpoint names, in eval mode on `device`."""
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    with _quiet():
        if gguf_file is None:
            check_layers(name, revision=revision, local_files_only=local)
        config = AutoConfig.from_pretrained(
            name, revision=revision, local_files_only=local, trust_remote_code=False, **more
        )
        _forget_kernels(config)
        if gguf_file is not None and not config.architectures:
            config.architectures = [class_of(config)]
        class_name = next(iter(config.architectures or []), "AutoModel")
        model_class: Any = getattr(transformers, class_name, None)
        if isinstance(config, AttentionOnlyConfig):
            model_class = AttentionOnlyModel
        is_class = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        # a base without a forward pass; made once, transformers takes its traits for all others'
        is_class = is_class and not class_name.endswith("PreTrainedModel")
        if not (is_class or class_name.startswith("AutoModel")):
            raise ValueError(
                f"transformers {transformers.__version__} has no class of models {class_name}"
            )
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else None
        with readable_weights(config, name):
            model: Any = trained(
                model_class,
                name,
                config=config,
                revision=revision,
                dtype=dtype or "auto",
                local_files_only=local,
                trust_remote_code=False,
                **more,
            )
    return model.to(device).eval()


def _forget_kernels(config: Any) -> None:
    """Which kernels run is not for a model's files to say: transformers would fetch those that they name."""
    config._attn_implementation = config._experts_implementation = None
    for name, value in _KERNELS.items():
        if hasattr(config, name):
            setattr(config, name, value)


def _described(
    model: PreTrainedModel, tokenizer: Any, name: str, revision: str | None = None
) -> LoadedModel:
    """With its sizes; those of parts (an encoder-decoder's, stages) are measured by the self-check."""
    tell_rounding_once(model)
    found = partial(LoadedModel, model, tokenizer, name, revision)
    takes = inspect.signature(model.forward).parameters
    if halves := stacks(model):
        if {"input_ids", "decoder_input_ids"} <= takes.keys() and reads_picture_first(model):
            raise LensError(
                f"{type(model).__name__} reads a picture and a text by an encoder-decoder, whose source is then no row of "
                "tokens; lens.passes.wrap(model, inputs) takes all of it, lens.load(model.language_model) one part"
            )
        info = describe(model)
        names = PARTS if halves.encoder is not None else PARTS[1:]
        parts: dict[str, ModelInfo] = dict.fromkeys(names, info)
        return found(info, parts=parts)
    if "decoder_input_ids" in takes and not reads_pictured_text(model):
        raise LensError(
            f"{type(model).__name__} reads a decoder's input and has no encoder and decoder of its own that are known "
            "here; lens.passes.wrap(model, inputs) takes all of it, by an example of what it reads"
        )
    if towers := described_towers(model, tokenizer, name, revision):
        first = next(iter(towers.values())).info
        whole = replace(first, class_name=type(model).__name__, parameters=model.num_parameters())
        return found(whole, towers=towers)
    if staged := stages(model):
        info = in_stages(model)
        return found(info, parts=dict.fromkeys(staged, info))
    return found(describe(model))


def _refuse_absent_weights(model: PreTrainedModel) -> None:
    absent = next((name for name, one in model.named_parameters() if one.is_meta), None)
    if absent is not None:
        raise LensError(
            f"weights of {type(model).__name__} are not in memory ({absent} is on the meta device, or "
            "offloaded to disk); load the whole model on one device: from_pretrained(...) without "
            "device_map"
        )


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.zeros(1, device=device or "cpu")
        found.item()  # "meta" holds no numbers
        return found.device
    except Exception as error:  # ModuleNotFoundError too, of a device that another package brings
        raise LensError(
            f"device {str(device)!r} cannot be used ({first_line(error)}); use cpu, or see "
            "what is there with `lens doctor`"
        ) from error


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        found = None
    if dtype is not None and found is None:
        raise LensError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype!r}")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars for reading weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


AutoConfig.register(AttentionOnlyConfig.model_type, AttentionOnlyConfig, exist_ok=True)
