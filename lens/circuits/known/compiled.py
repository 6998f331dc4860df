"""Programs that tracr compiled into transformer weights: what every component does is written down.

Each residual dimension has a meaning, each head and MLP a list of the dimensions that it reads and
writes, so the circuit is exact; components that the compiler did not need write 0.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lens.circuits.known.circuit import KnownCircuit
from lens.circuits.known.making import loaded
from lens.circuits.known.program import ProgramConfig, ProgramModel
from lens.common.errors import LensError
from lens.models.catalogue import ASSETS
from lens.models.words import WordTokenizer
from lens.tasks.task import Task

PROGRAMS = ("reverse", "frac_prevs", "hist", "sort_unique", "pair_balance", "induction_causal")
"""The embedded programs."""

_FOLDER = ASSETS / "tracr"
_BOS = "BOS"
_NUMBER, _ZERO = "value", "zero"  # what a program that computes a number answers with


def tracr(program: str, *, dtype: str = "float32") -> KnownCircuit:
    """A compiled program as a model, with its exact circuit.

    `reverse` reverses its input; `frac_prevs` gives the fraction of `x` up to each token; `hist` counts
    each token's copies; `sort_unique` sorts; `pair_balance` gives how far brackets are open, as a
    fraction; `induction_causal` repeats what followed the last copy of the token (causal; the others see
    all tokens). Logits are the dimensions of the output: 1 for the right symbol, 0 for the others. A
    number is the logit of `value`, beside `zero`, which is always 0.

    The task is the program's published cases of the longest length but one (at full length a missing
    count reads as the right one), each corrupted into the next: the logit difference between the case's
    output and the other's, at every token after BOS, for the causal program at the last. Where both have
    the same output, the next symbol stands for the wrong one.

    Args:
        program: one of `PROGRAMS`.
        dtype: "float32" or "float64".

    Raises:
        LensError: an unknown program or dtype.

    Reference: Lindner et al., Tracr: Compiled Transformers as a Laboratory for Interpretability, 2023,
        arXiv 2301.05062.

    Example:
        >>> known = tracr("reverse")
        >>> known.components["a0.h0"], known.components["m3"]
        (True, False)
    """
    if program not in PROGRAMS:
        raise LensError(f"unknown program {program!r}; known: {', '.join(PROGRAMS)}")
    facts = json.loads((_FOLDER / f"{program}.json").read_text(encoding="utf-8"))
    tokenizer = WordTokenizer(_words(facts), _BOS)
    model = ProgramModel(
        ProgramConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=facts["d_model"],
            num_hidden_layers=facts["n_layers"],
            num_attention_heads=facts["n_heads"],
            head_dim=facts["key_size"],
            mlp_size=facts["mlp_hidden"],
            scaling=facts["key_size"] ** -0.5,
            is_causal=facts["causal"],
            max_position_embeddings=facts["max_seq_len_incl_bos"],
        )
    )
    with torch.no_grad():
        _write(model, load_file(_FOLDER / f"{program}.safetensors"))
        for label in _outputs(facts):
            word = label.partition(":")[2] or _NUMBER
            model.unembed.weight[tokenizer.id(word), facts["residual_labels"].index(label)] = 1
    return KnownCircuit(
        name=program,
        model=loaded(model, tokenizer, f"tracr {program}", "Apache-2.0 (Google DeepMind)", dtype),
        tasks={"other case": _task(facts, tokenizer)},
        edges=_edges(facts, model),
        inactive=tuple(_node(name) for name in facts["inactive"]),
        visible={},
    )


def cases(program: str) -> list[tuple[list[str], list[str | float]]]:
    """The published cases of an embedded program: its input with BOS, and its output after BOS."""
    facts = json.loads((_FOLDER / f"{program}.json").read_text(encoding="utf-8"))
    return [
        ([str(token) for token in case["tokens"]], _expected(facts, case))
        for case in facts["cases"]
    ]


def _expected(facts: Mapping[str, Any], case: Mapping[str, Any]) -> list[Any]:
    """Output of a case after BOS: words, or numbers."""
    return [str(value) if facts["output_encoding"] else value for value in case["output"][1:]]


def _words(facts: Mapping[str, Any]) -> list[str]:
    """Input symbols by id, then the output symbols that are none."""
    words = sorted(facts["input_vocab"], key=facts["input_vocab"].get)
    answers = facts["output_encoding"] or (_NUMBER, _ZERO)
    return words + [word for word in answers if word not in words]


def _write(model: ProgramModel, weights: Mapping[str, Tensor]) -> None:
    """Tracr's matrices [in, out] into the model's."""
    names = {"query": "q", "key": "k", "value": "v", "linear": "o"}
    mlp = {"linear_1": "fc_in", "linear_2": "fc_out"}
    for layer, block in enumerate(model.blocks):
        for group, parts in (("attn", names), ("mlp", mlp)):
            for theirs, ours in parts.items():
                linear = block.get_submodule(f"{group}.{ours}")
                assert isinstance(linear, nn.Linear)
                linear.weight.copy_(weights[f"layer_{layer}.{group}.{theirs}.w"].T)
                linear.bias.copy_(weights[f"layer_{layer}.{group}.{theirs}.b"])
    tokens = weights["token_embed.embeddings"]
    model.embed.weight[: len(tokens)] = tokens
    model.pos_embed.weight.copy_(weights["pos_embed.embeddings"])


def _outputs(facts: Mapping[str, Any]) -> list[str]:
    """Residual labels that hold the output: what the last active component writes."""
    *_, last = facts["circuit_writes"].values()
    if facts["output_encoding"] is None:
        return last
    return [label for label in last if label.partition(":")[2] in facts["output_encoding"]]


def _edges(facts: Mapping[str, Any], model: ProgramModel) -> tuple[str, ...]:
    """An edge wherever a component reads a dimension that an earlier one writes."""
    labels = facts["residual_labels"]
    embedded = (model.embed.weight != 0).any(0) | (model.pos_embed.weight != 0).any(0)
    writers = {"input": [labels[index] for index in embedded.nonzero().flatten().tolist()]}
    readers = {_node(name): read for name, read in facts["circuit_reads"].items()}
    readers["logits"] = _outputs(facts)
    for name, written in facts["circuit_writes"].items():
        writers[_node(name)] = written
    return tuple(
        f"{writer}->{reader}"
        for reader, read in readers.items()
        for writer, written in writers.items()
        if _order(writer) < _order(reader) and set(read) & set(written)
    )


def _node(name: str) -> str:
    """Our name of tracr's `head_1.0.query` or `mlp_0`: `a1.h0<q>`, `m0`."""
    if name.startswith("mlp_"):
        return f"m{name.removeprefix('mlp_')}"
    layer, head, *part = name.removeprefix("head_").split(".")
    return f"a{layer}.h{head}" + (f"<{part[0][0]}>" if part else "")


def _order(node: str) -> tuple[int, int]:
    """Where a node comes in the model: layer, and attention before MLP."""
    if node in ("input", "logits"):
        return (-1, 0) if node == "input" else (1 << 30, 0)
    return int(node[1:].split(".")[0]), int(node[0] == "m")


def _task(facts: Mapping[str, Any], tokenizer: WordTokenizer) -> Task:
    """The distinct cases of the greatest length but one, each corrupted into the next."""
    found = {tuple(map(str, case["tokens"])): _expected(facts, case) for case in facts["cases"]}
    length = facts["max_seq_len_incl_bos"] - 1
    prompts = [tokens for tokens in found if len(tokens) == length]
    read = slice(-1, None) if facts["causal"] else slice(None)  # early on there is nothing to copy
    answers = [found[tokens][read] for tokens in prompts]
    pairs = [
        [_answers(facts, mine, other) for mine, other in zip(here, there, strict=True)]
        for here, there in zip(answers, answers[1:] + answers[:1], strict=True)
    ]
    clean = torch.tensor([[tokenizer.id(word) for word in prompt] for prompt in prompts])
    both = torch.tensor([[[tokenizer.id(word) for word in two] for two in row] for row in pairs])
    return Task(
        name=f"tracr {facts['program']}",
        clean=clean,
        positions=torch.arange(1, length)[read].expand(len(clean), -1),
        correct=both[..., 0],
        metric="logit_difference",
        corrupt=clean.roll(-1, 0),
        wrong=both[..., 1],
    )


def _answers(facts: Mapping[str, Any], mine: Any, other: Any) -> Sequence[str]:
    """The right and the wrong word at one token, given the outputs of both cases."""
    if facts["output_encoding"] is None:  # so that the clean case has the larger difference
        return (_NUMBER, _ZERO) if mine >= other else (_ZERO, _NUMBER)
    if mine == other:
        words = list(facts["output_encoding"])
        other = words[(words.index(mine) + 1) % len(words)]
    return mine, other
