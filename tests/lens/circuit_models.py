"""Small float64 models of each kind of block, with tasks, and naive twins of what circuits compute."""

from dataclasses import dataclass, replace

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import lens
from lens.circuits.graph.activations import Activations
from lens.circuits.graph.graph import Graph
from lens.circuits.scores.methods import named
from lens.models.attention_only import AttentionOnlyConfig, AttentionOnlyModel
from lens.models.loaded import LoadedModel
from lens.tasks import Task

VOCAB, ROWS, TOKENS = 23, 5, 7
KINDS = ("llama", "gpt2", "gpt_neox", "attention_only")


class _Rms(nn.Module):
    """RMSNorm that stays in float64; that of transformers goes through float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.double())
        self.eps = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def stepped(method, steps=5, rule="midpoint"):
    """The method, with steps and a rule where it has any."""
    word, integrated = named(method)
    return word if integrated is None else replace(integrated, steps=steps, rule=rule)


def small_model(kind: str) -> LoadedModel:
    torch.manual_seed(3)
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, head_dim=4, max_position_embeddings=16,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=15, n_layer=2, n_head=3, n_inner=11
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "gpt_neox":
        config = transformers.GPTNeoXConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=20, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        model = transformers.GPTNeoXForCausalLM(config)
    else:
        model = AttentionOnlyModel(
            AttentionOnlyConfig(
                vocab_size=VOCAB, hidden_size=12, num_hidden_layers=3, num_attention_heads=3,
                max_position_embeddings=16, bos_token_id=None,
            )
        )  # fmt: skip
    loaded = lens.load(model.eval())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for block in nn.Module.modules(model):
        for name, part in list(block.named_children()):
            if type(part).__name__ == "LlamaRMSNorm":
                setattr(block, name, _Rms(part.get_parameter("weight").detach()))
    nn.Module.double(model)
    return loaded


def small_task(seed: int = 0, rows: int = ROWS) -> Task:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    return Task(
        "drawn",
        draw(rows, TOKENS),
        torch.full((rows, 1), TOKENS - 1),
        draw(rows, 1),
        "logit_difference",
        draw(rows, TOKENS),
        wrong=draw(rows, 1),
    )


@dataclass
class Naive:
    """A Llama, GPT-2 or GPT-NeoX written out again, reader by reader, with the N×N matrix."""

    loaded: LoadedModel

    def logits(
        self, ids: Tensor, reference: Activations, mask: Tensor, graph: Graph, head_output=None
    ) -> Tensor:
        """[rows, tokens, vocab]; `mask` is [readers, writers], of numbers or [rows, tokens, 1]; `head_output` instead of
        the softmax, of (layer, head, q, k, v)."""
        model = self.loaded.model
        kind = model.config.model_type
        layers = {
            "llama": lambda: model.model.layers,
            "gpt2": lambda: model.transformer.h,
            "gpt_neox": lambda: model.gpt_neox.layers,
        }[kind]()
        if kind == "gpt2":
            embedded = model.transformer.wte(ids) + model.transformer.wpe.weight[: ids.shape[1]]
        else:
            embedded = model.get_input_embeddings()(ids)
        outputs = {"input": embedded}
        refs = {"input": reference.input}
        biases = torch.zeros(embedded.shape[-1], dtype=embedded.dtype)

        def read(name: str, constant: Tensor) -> Tensor:
            reader = graph.readers.index(name)
            total = constant.expand_as(embedded)
            for number, writer in enumerate(graph.writers):
                if graph.allowed[reader, number]:
                    alpha = mask[reader, number]
                    total = total + outputs[writer] + alpha * (refs[writer] - outputs[writer])
            return total

        for number, layer in enumerate(layers):
            weights = self._weights(layer, kind, graph)
            written = {}
            for head in range(graph.heads):
                other = head // (graph.heads // graph.kv_readers)
                word = "h" if graph.kv_readers == graph.heads else "kv"
                q, k, v = (
                    self._norm(layer, kind)(read(f"a{number}.{at}<{part}>", biases)) @ weight + bias
                    for part, at, (weight, bias) in zip(
                        "qkv",
                        (f"h{head}", f"{word}{other}", f"{word}{other}"),
                        (weights[part][head] for part in "qkv"),
                        strict=True,
                    )
                )
                q, k = self._rotate(q, k, kind)
                if head_output is not None:
                    z = head_output(number, head, q, k, v)
                else:
                    scores = q @ k.mT * q.shape[-1] ** -0.5
                    hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
                    z = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
                written[f"a{number}.h{head}"] = z @ weights["o"][head]
                refs[f"a{number}.h{head}"] = reference.heads[number][:, head] @ weights["o"][head]
            if not graph.parallel:
                outputs.update(written)
                biases = biases + weights["b_o"]
            norm = {"gpt2": "ln_2"}.get(kind, "post_attention_layernorm")
            m = layer.mlp(getattr(layer, norm)(read(f"m{number}", biases)))
            if graph.parallel:
                outputs.update(written)
                biases = biases + weights["b_o"]
            outputs[f"m{number}"], refs[f"m{number}"] = m, reference.mlps[number]
        last = {
            "llama": lambda: model.model.norm,
            "gpt2": lambda: model.transformer.ln_f,
            "gpt_neox": lambda: model.gpt_neox.final_layer_norm,
        }[kind]()
        return model.get_output_embeddings()(last(read("logits", biases)))

    @staticmethod
    def _norm(layer, kind):
        return layer.ln_1 if kind == "gpt2" else layer.input_layernorm

    def _weights(self, layer, kind, graph):
        heads, group = graph.heads, graph.heads // graph.kv_heads
        if kind == "llama":
            a = layer.self_attn
            size = a.head_dim
            found = {
                part: [
                    (getattr(a, f"{part}_proj").weight[size * at : size * (at + 1)].T, 0.0)
                    for at in (head if part == "q" else head // group for head in range(heads))
                ]
                for part in "qkv"
            }
            o, b_o = a.o_proj.weight.T, torch.zeros(layer.self_attn.o_proj.out_features)
        elif kind == "gpt2":
            a = layer.attn
            size, width = a.head_dim, a.embed_dim
            found = {
                part: [
                    (a.c_attn.weight[:, start : start + size], a.c_attn.bias[start : start + size])
                    for start in (width * number + size * head for head in range(heads))
                ]
                for number, part in enumerate("qkv")
            }
            o, b_o = a.c_proj.weight, a.c_proj.bias
        else:
            a = layer.attention
            size, joint = a.head_size, a.query_key_value
            found = {
                part: [
                    (joint.weight[start : start + size].T, joint.bias[start : start + size])
                    for start in (3 * size * head + size * number for head in range(heads))
                ]
                for number, part in enumerate("qkv")
            }
            o, b_o = a.dense.weight.T, a.dense.bias
        return {**found, "o": o.unflatten(0, (heads, -1)), "b_o": b_o.detach().double()}

    def _rotate(self, q, k, kind):
        if kind == "gpt2":
            return q, k
        model = self.loaded.model
        rotary = (model.model if kind == "llama" else model.gpt_neox).rotary_emb
        cos, sin = rotary(q, torch.arange(q.shape[1])[None])
        size = cos.shape[-1]

        def turn(x):
            part, rest = x[..., :size], x[..., size:]
            left, right = part.chunk(2, -1)
            return torch.cat([part * cos + torch.cat([-right, left], -1) * sin, rest], -1)

        return turn(q), turn(k)


def error(found, expected) -> float:
    """Size of the difference over the size of what was expected."""
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
