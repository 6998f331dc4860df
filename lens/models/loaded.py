"""`LoadedModel`: a model with its tokenizer, its sizes and the proof that capture reaches its attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch

from lens.common.choices import check_choice
from lens.common.errors import LensError, told
from lens.common.given import not_loaded
from lens.common.head_ids import Part, layers_in_words
from lens.models.ids import check_ids, check_text, is_ids, numbers_of
from lens.models.info import ModelInfo
from lens.models.tokens import readable
from lens.models.wrapped import Wrapped


@dataclass(frozen=True, repr=False, eq=False)
class LoadedModel:
    """A model as `lens.load` returns it; every function of `lens` takes one.

    Attributes:
        model: the transformers model, or the `TransformerBridge`.
        tokenizer: its tokenizer, or None.
        name: as it was asked for.
        revision: of a hub model (a commit), else None.
        info: sizes and origin.
        check: largest relative difference between the captured output and the model's own (`eager`)
            output on a tiny prompt, measured when it was loaded; None if it was not measured.
        processor: what makes inputs of pictures (and texts), or None.
        parts: of an encoder-decoder, sizes of each attention that it has: "encoder", "decoder", "cross"; of a vision
            model in stages (Swin, SegFormer, PVT) of "stage0", "stage1" and so on; of a TimeSformer "time", "space".
        towers: of a model of several encoders side by side (CLIP: "text", "vision") each of them, as a model.
        chosen: which of these `info` is of and heads are named in (`part`); "": not said yet.
    """

    model: Any
    tokenizer: Any
    name: str
    revision: str | None
    info: ModelInfo
    check: float | None = None
    processor: Any = None
    parts: Mapping[str, ModelInfo] = field(default_factory=dict)
    chosen: str = ""
    towers: Mapping[str, LoadedModel] = field(default_factory=dict)

    def part(self, name: Part | str) -> LoadedModel:
        """The same model with the heads of one of its parts; one tower of a model of several.

        Args:
            name: "encoder"; "decoder", of the decoder to itself; "cross", of the decoder to the encoder. Of stages and
                towers their own names.

        Raises:
            LensError: another model, or a part that it has not got.

        Example:
            >>> translator.part("cross").info.heads
            4
        """
        if self.towers:
            check_choice("part", name, tuple(self.towers))
            return self.towers[name]
        if not self.parts:
            raise LensError(
                f"{self.info.class_name} is no encoder-decoder and goes in no stages, so it has no parts"
            )
        check_choice("part", name, tuple(self.parts))
        return replace(self, info=self.parts[name], chosen=name)

    def check_part(self) -> None:
        """Raises LensError: an encoder-decoder, or towers, of which nobody said whose heads are meant."""
        if self.towers:
            named = " or ".join(f"model.part({name!r})" for name in self.towers)
            raise LensError(
                f"{self.info.class_name} has {len(self.towers)} towers, each with heads of its own; say which: {named}"
            )
        if self.parts and not self.chosen:
            named = " or ".join(f"model.part({name!r})" for name in self.parts)
            raise LensError(
                f"{self.info.class_name} is {'an encoder-decoder' if self.is_encoder_decoder else 'in parts'}, whose "
                f"heads are those of its {', '.join(self.parts)}: say which: {named}"
            )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights that are floating numbers, and of what is handed from layer to layer."""
        types = (parameter.dtype for parameter in self.model.parameters())
        return next((dtype for dtype in types if dtype.is_floating_point), torch.float32)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest type that it computes in: coarser than `dtype` where quantised weights are multiplied."""
        types = [self.dtype]
        for one in self.model.modules():
            if isinstance(computed := getattr(one, "compute_dtype", None), torch.dtype):
                types.append(computed)
            if getattr(one, "support_avx512bf16_for_cpu", False) and self.device.type == "cpu":
                types.append(torch.bfloat16)  # bitsandbytes, whatever type was asked for
        if any(getattr(one, "act_quant_kwargs", None) for one in self.model.parameters()):
            types.append(torch.bfloat16)  # torchao rounds what is multiplied to 8 bit
        return max(types, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def is_bridge(self) -> bool:
        """Whether this is a `TransformerBridge` (TransformerLens 4)."""
        return is_bridge(self.model)

    @property
    def transformer(self) -> Any:
        """The module with the weights: of a bridge, the model that it wraps."""
        return self.model.original_model if self.is_bridge else self.model

    @property
    def module(self) -> Any:
        """What hooks hang on: as `transformer`, and of any module in a model's place the module that was given."""
        root = self.transformer
        return root.module if isinstance(root, Wrapped) else root

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it reads a source and a target; its `parts` are encoder, decoder and cross then."""
        return "cross" in self.parts

    @property
    def bos_id(self) -> int | None:
        """Id of the token that begins a text, or None."""
        return getattr(self.tokenizer, "bos_token_id", None)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer adds itself.

        Raises:
            LensError: no tokenizer, no text, or nothing in it.
        """
        if self.tokenizer is None:
            raise LensError(
                f"{self.name} has no tokenizer, so it cannot read text; "
                "pass token ids, or give one: lens.load(model, tokenizer=...)"
            )
        check_text(text)
        # A fast tokenizer only warns about length; the length is checked in full by `capture`.
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def check_ids(self, ids: Any) -> None:
        """Token ids that the model can take.

        Raises:
            LensError: none, too many, or ids outside the vocabulary; a text.
        """
        check_ids(ids, self.name, self.info.vocab, self.info.context)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """What each token looks like in a text, with its spaces; ids as strings without a tokenizer.

        Bytes that are no whole character stand as `<0xE4>`.
        """
        numbers = numbers_of(ids)
        if self.tokenizer is None:
            return list(map(str, numbers))
        tokens = self.tokenizer.convert_ids_to_tokens(numbers)
        pairs = dict(zip(numbers, tokens, strict=True))
        texts = {index: readable(self.tokenizer, token, index) for index, token in pairs.items()}
        return [texts[index] for index in numbers]

    @torch.no_grad()
    def logits(self, prompts: Any) -> Any:
        """Logits [tokens, vocab] of a prompt (a text, or token ids); a list of them for a list of prompts.

        Raises:
            LensError: no tokenizer for a text, or a model without logits.

        Example:
            >>> model.logits("It was the best").shape[1] == model.info.vocab
            True
        """
        return self._each(prompts, self._logits)

    @torch.no_grad()
    def hidden_states(self, prompts: Any) -> Any:
        """[layers + 1, tokens, width] of a prompt: what enters layer 0, then after each layer; a list for a list.

        As transformers returns it: after the last layer most models normalise it.

        Raises:
            LensError: no tokenizer for a text, or a model that returns none.

        Example:
            >>> len(model.hidden_states("It was the best")) == model.info.layers + 1
            True
        """
        return self._each(prompts, self._hidden_states)

    @torch.no_grad()
    def generate(self, prompt: Any, **options: Any) -> torch.Tensor:
        """Token ids [1, tokens] of a prompt (a text, or token ids) and what the model writes after it.

        Args:
            prompt: one.
            options: of `transformers`' `generate`, such as `max_new_tokens=20`; nothing is sampled unless
                `do_sample=True`.

        Raises:
            LensError: no tokenizer for a text, ids that the model does not take, or options that it does not know.

        Example:
            >>> model.generate("It was the best", max_new_tokens=5)
        """
        ids, name = self._ids(prompt), self.info.class_name
        if not callable(getattr(self.model, "generate", None)):
            raise LensError(
                f"{name} does not write: it has no `generate` (a model of transformers with its head has)"
            )
        if not self.is_bridge:
            options = {"do_sample": False, "pad_token_id": self.bos_id or 0} | options
            # without a mask BOS as padding would be hidden
            if "attention_mask" in signature(self.model.forward).parameters:
                options = {"attention_mask": torch.ones_like(ids)} | options
        with told(lambda why: f"{name} cannot write after this prompt: {why}"):
            return self.model.generate(ids, **options)

    def _each(self, prompts: Any, run: Any) -> Any:
        if self.towers:
            raise LensError(
                f"{self.info.class_name} reads several things at once; run it yourself: model.model(**inputs)"
            )
        if self.is_encoder_decoder:
            raise LensError(
                f"{self.info.class_name} reads a source and a target; run it yourself: "
                "model.model(input_ids=..., decoder_input_ids=...)"
            )
        many = isinstance(prompts, list | tuple) and len(prompts) > 0 and not is_ids(prompts)
        many = many or (isinstance(prompts, torch.Tensor) and prompts.dim() > 1)
        return [run(prompt) for prompt in prompts] if many else run(prompts)

    def _ids(self, prompt: Any) -> torch.Tensor:
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        if isinstance(ids, torch.Tensor) and ids.dim() == 2 and len(ids) == 1:
            ids = ids[0]
        self.check_ids(ids)
        return torch.as_tensor(ids, device=self.device)[None]

    def _run(self, prompt: Any, **options: Any) -> Any:
        ids, name = self._ids(prompt), self.info.class_name
        with told(
            lambda why: (
                f"{name} cannot run on token ids alone ({why}); give it all that it reads: model.model(**inputs)"
            )
        ):
            if self.is_bridge:
                return self.model(ids, **options)
            return self.model(input_ids=ids, **options)

    def _logits(self, prompt: Any) -> torch.Tensor:
        result = self._run(prompt)
        logits = result if isinstance(result, torch.Tensor) else getattr(result, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
            raise LensError(f"{self.info.class_name} returns no logits [prompts, tokens, vocab]")
        return logits[0]

    def _hidden_states(self, prompt: Any) -> torch.Tensor:
        if self.is_bridge:
            raise LensError(
                "a TransformerBridge returns no hidden states; use run_with_cache, or load its model"
            )
        found = self._run(prompt, output_hidden_states=True).hidden_states
        return torch.stack([states[0] for states in found])

    def describe(self) -> dict[str, Any]:
        """The `model` entry of `run.json` (docs/schema/run-folder.md)."""
        info = self.info
        return {
            "name": f"{self.name} ({self.chosen})" if self.chosen else self.name,
            "class": info.class_name,
            "revision": self.revision,
            "layers": info.layers,
            "attending": list(info.attending),
            "heads": info.heads,
            "kv_heads": info.kv_heads,
            "head_dim": info.head_dim,
            "vocab": info.vocab,
            "context": info.context,
            "parameters": info.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "licence": info.licence,
        } | ({"part": self.chosen} if self.chosen else {})

    def __repr__(self) -> str:
        info = self.info
        kv_heads = f" ({info.kv_heads} KV)" if info.kv_heads != info.heads else ""
        context = f", context {info.context}" if info.context else ""
        check = "not self-checked"
        if self.check is not None:
            check = f"self-check passed: captured output within {self.check:.0e} of its own, rows sum to 1"
        sizes = f"{info.layers} layers × {info.heads} heads{kv_heads} of {info.head_dim}"
        if not info.attending:
            sizes = f"{info.layers} layers of recurrent mixers alone"
        elif info.without_attention:
            sizes += f", softmax attention in {layers_in_words(info.attending)}"
        several = {name: tower.info for name, tower in self.towers.items()}
        several |= self.parts if not self.chosen else {}
        if several:
            sizes = "; ".join(
                f"{n}: {i.layers} layers × {i.heads} heads" for n, i in several.items()
            )
        part = f" ({self.chosen})" if self.chosen else ""
        return (
            f"LoadedModel({self.name}: {info.class_name}{part}, {sizes}"
            f"{context}, {info.parameters:,} weights, {info.licence}; {check})"
        )


def check_loaded(model: Any) -> None:
    """Raises LensError: something else than a `LoadedModel`; the line says how it becomes one."""
    if not isinstance(model, LoadedModel):
        raise not_loaded("model", model)


def is_bridge(model: Any) -> bool:
    """Whether `model` is a `TransformerBridge`, without importing TransformerLens (five seconds)."""
    return any(cls.__name__ == "TransformerBridge" for cls in type(model).__mro__)
