"""Edges of models without plain softmax attention: each replaced by hand, slopes by hand, the stream added up, what is refused."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers as hf

import lens
from lens.circuits.graph.mixed import Mixed
from lens.common.errors import LensError
from lens.figures.circuits import head_map, layered_graph

PLAIN = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
MLSTM = {**PLAIN, "num_heads": 4, "num_blocks": 2, "use_cache": False}
ATTENDING = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
CLEAN = torch.tensor([list(range(3, 12)), list(range(40, 49))])
CORRUPT = CLEAN.clone()
CORRUPT[:, 5] = 60
ANSWERS = torch.tensor([[20], [21]])
LAST = CLEAN.shape[1] - 1


class Made(NamedTuple):
    """A kind of model, and where a head of its layer 0 writes and what reads it.

    Attributes:
        make: the model.
        output: the projection that the heads of layer 0 write through.
        columns: those of its input that are head 1.
        edge: from head 1 to something of layer 1.
        norm: that this reads through.
        last: the norm before the logits.
    """

    make: Callable[[], Any]
    output: Callable[[Any], Any]
    columns: slice
    edge: str
    norm: Callable[[Any], Any]
    last: Callable[[Any], Any]


def of_mamba(make: Callable[[], Any], columns: slice) -> Made:
    return Made(
        make, lambda m: m.backbone.layers[0].mixer.out_proj, columns, "a0.h1->a1",
        lambda m: m.backbone.layers[1].norm, lambda m: m.backbone.norm_f,
    )  # fmt: skip


ONE = slice(1, 2)  # a channel
KINDS = {
    "mamba2": of_mamba(
        lambda: hf.Mamba2ForCausalLM(
            hf.Mamba2Config(**PLAIN, num_heads=4, head_dim=16, state_size=8, n_groups=2, chunk_size=8)
        ),
        slice(16, 32),
    ),
    "mamba": of_mamba(
        lambda: hf.MambaForCausalLM(hf.MambaConfig(**PLAIN, state_size=4, expand=1)), ONE
    ),
    "falcon_mamba": of_mamba(
        lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**PLAIN, state_size=4, expand=1)), ONE
    ),
    "rwkv": Made(
        lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**PLAIN, attention_hidden_size=32)),
        lambda m: m.rwkv.blocks[0].attention.output, ONE, "a0.h1->m1",
        lambda m: m.rwkv.blocks[1].ln2, lambda m: m.rwkv.ln_out,
    ),
    "xlstm": Made(
        lambda: hf.xLSTMForCausalLM(hf.xLSTMConfig(**MLSTM)),
        lambda m: m.backbone.blocks[0].mlstm_layer.out_proj, slice(8, 16), "a0.h1->m1",
        lambda m: m.backbone.blocks[1].norm_ffn, lambda m: m.backbone.out_norm,
    ),
    "diffllama": Made(
        lambda: hf.DiffLlamaForCausalLM(hf.DiffLlamaConfig(**PLAIN, **ATTENDING)),
        lambda m: m.model.layers[0].self_attn.o_proj, slice(16, 32), "a0.s1->m1",
        lambda m: m.model.layers[1].post_attention_layernorm, lambda m: m.model.norm,
    ),
}  # fmt: skip


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model, generator = KINDS[kind].make(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()


def task_of():
    place = torch.full((2, 1), LAST)
    return lens.tasks.Task("made", CLEAN, place, ANSWERS, "loss", CORRUPT)


def losses(model, ids=CLEAN):
    return -model(ids).logits[:, LAST].log_softmax(-1).gather(1, ANSWERS)[:, 0]


def read_of(module, model, ids=CLEAN):
    """What a module read in a pass."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(ids)
    hook.remove()
    return found[0]


def changed(kind, model):
    """By what head 1 of layer 0 writes more in the clean than in the corrupt prompts."""
    one = KINDS[kind]
    with torch.no_grad():
        clean, corrupt = (read_of(one.output(model), model, ids) for ids in (CLEAN, CORRUPT))
        return (clean - corrupt)[..., one.columns] @ one.output(model).weight[:, one.columns].T


def moved(model, norm, change):
    """Losses where one norm reads more."""
    hook = norm.register_forward_pre_hook(lambda _, args: (args[0] + change,))
    found = losses(model)
    hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_a_head_are_replaced_and_have_the_slopes_of_their_definition(kind):
    one, model = KINDS[kind], made(kind)
    loaded, task, change = lens.load(model), task_of(), changed(kind, model)
    exact, eap = (
        lens.circuits.score_edges(loaded, task, method=method, progress=False, batch_size=64)
        for method in ("exact", "eap")
    )
    own = losses(model).detach()
    to_logits = one.edge.partition("->")[0] + "->logits"
    for edge, norm in ((one.edge, one.norm(model)), (to_logits, one.last(model))):
        (number,) = exact.graph.find([edge])
        with torch.no_grad():
            replaced = moved(model, norm, -change) - own
        assert exact.per_prompt[:, number] == pytest.approx(replaced.numpy(), abs=1e-6)
        assert replaced.abs().max() > 1e-4
        more = torch.zeros_like(change, requires_grad=True)
        (slope,) = torch.autograd.grad(moved(model, norm, more).sum(), more)
        by_hand = -(change * slope).sum((1, 2))  # less is better of a loss
        assert eap.per_prompt[:, number] == pytest.approx(by_hand.numpy(), rel=1e-4, abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_adds_up_to_the_logits(kind):
    model = made(kind)
    mixed = Mixed(lens.load(model))
    found = mixed.run(CLEAN)
    stream = found.input + sum(
        mixed.written(n, heads).sum(1) for n, heads in enumerate(found.heads)
    )
    head = model.get_output_embeddings()
    logits, own = head(KINDS[kind].last(model)(stream)), model(CLEAN).logits
    if kind == "xlstm":
        cap = model.config.output_logit_soft_cap
        logits = cap * torch.tanh(logits / cap)
    assert (logits - own).abs().max() < 1e-5 * own.abs().max()
    assert (found.logits - own).abs().max() < 1e-5 * own.abs().max()


@pytest.mark.parametrize("kind", ["mamba2", "diffllama"])
def test_circuits_are_found_saved_evaluated_and_drawn(kind, tmp_path):
    loaded, task = lens.load(made(kind)), task_of()
    found = lens.circuits.find(loaded, task, method="eap-ig", edges=10, progress=False)
    found.circuit.save(tmp_path / "c.json", scores=found.scores.values)
    again = lens.circuits.load_circuit(tmp_path / "c.json")
    assert (again.edges, again.graph) == (found.circuit.edges, found.circuit.graph)
    outcome = lens.circuits.run_circuit(loaded, task, again, progress=False)
    (row,) = found.table()[found.table()["chosen"]].to_dict("records")
    assert outcome.faithfulness() == pytest.approx([row["faithfulness"]], abs=1e-4)
    curve = lens.circuits.evaluate(loaded, task, found, draws=1, progress=False)
    assert curve.absolute.faithfulness()[-1] == pytest.approx(1, abs=1e-4)
    nodes = next(
        one for one in layered_graph(again, found.scores).data if one.mode == "markers+text"
    )
    assert set(again.nodes) <= set(nodes.customdata)
    heads = head_map(again, found.scores).data[0]
    letter, count = ("S", 2) if kind == "diffllama" else ("H", 4)
    assert heads.z.shape == (2, count)
    assert heads.hovertemplate.startswith(f"L%{{y}}{letter}%{{x}}")
    assert np.isfinite(heads.z).any()


def test_pairs_of_heads_are_not_taken_for_heads():
    """Head 1 of DiffLlama's output projection is a pair of softmax heads, and none of those of a trace."""
    loaded, task = lens.load(made("diffllama")), task_of()
    scores = lens.circuits.score_edges(loaded, task, method="eap", progress=False)
    assert {"a0.s0", "a0.s1"} < set(scores.graph.writers)
    with pytest.raises(LensError, match="there are no heads in it"):
        lens.circuits.head_parts(loaded, task, scores.top(21), progress=False)


IDS = list(range(3, 25))


@pytest.mark.parametrize(
    "run",
    [
        lambda m: lens.capture(m, IDS),
        lambda m: lens.effect(m, [IDS], lens.edits.Mask("first"), progress=False),
        lambda m: lens.effect(m, [IDS], lens.edits.Ablate(["L0H0"]), progress=False),
        lambda m: lens.edit(m, lens.edits.Mask("first")).__enter__(),
        lambda m: lens.heads.importance(m, task_of(), method="ablation", progress=False),
        lambda m: lens.circuits.head_parts(m, task_of(), ["L0H0"], progress=False),
        lambda m: lens.reading.explain(m, IDS, "L0H0", query=-1, key=2),
        lambda m: lens.circuits.patch(m, task_of(), progress=False),
        lambda m: lens.policies.evaluate(m, [IDS], lens.policies.AShape(4, 8), block_size=4),
        lambda m: lens.traces.capturing(m).__enter__(),
    ],
)
def test_what_is_about_softmax_attention_refuses_mixers_alone(run):
    with pytest.raises(LensError, match="Mamba2ForCausalLM has no softmax attention") as caught:
        run(lens.load(made("mamba2")))
    assert "\n" not in str(caught.value)


def test_what_is_of_any_model_takes_mixers_alone():
    model = made("mamba2")
    loaded = lens.load(model)
    assert "2 layers of recurrent mixers alone" in repr(loaded)
    assert loaded.info.attending == ()
    with torch.no_grad():
        assert torch.equal(loaded.logits(IDS), model(torch.tensor([IDS])).logits[0])
        with lens.edit(loaded, lens.mixers.Ablate("L0H1")) as (done,):
            without = loaded.logits(IDS)
            assert torch.equal(without, model(torch.tensor([IDS])).logits[0])
    assert done.calls == 2
    found = lens.effect(loaded, [IDS, IDS[::-1]], lens.mixers.Ablate("L0H1"), progress=False)
    own = [lens.tasks.loss(loaded, ids) for ids in (IDS, IDS[::-1])]
    with lens.edit(loaded, lens.mixers.Ablate("L0H1")):
        less = [lens.tasks.loss(loaded, ids) for ids in (IDS, IDS[::-1])]
    expected = np.subtract(less, own)
    assert found.values["edit"]["delta_loss"].ravel() == pytest.approx(expected, abs=1e-6)
    assert {"size"} <= found.values.keys(), "beside as many other heads of mixers"
    assert "nan" not in " ".join(found.findings())


def test_a_stream_that_is_halved_and_a_prompt_in_pieces_are_refused():
    deep = hf.RwkvConfig(
        **{**PLAIN, "num_hidden_layers": 3}, attention_hidden_size=32, rescale_every=2
    )
    with pytest.raises(LensError, match="a2 of RwkvForCausalLM does not read the sum"):
        Mixed(lens.load(hf.RwkvForCausalLM(deep).eval()))
    deep.rescale_every = 0
    assert Mixed(lens.load(hf.RwkvForCausalLM(deep).eval())).graph.readers[-2] == "m2"
    sizes = {**MLSTM, "hidden_size": 128, "max_inference_chunksize": 8}
    pieces = hf.xLSTMForCausalLM(hf.xLSTMConfig(**sizes)).eval()
    with pytest.raises(LensError, match="one piece of the prompt after another"):
        lens.circuits.score_edges(lens.load(pieces), task_of(), method="exact", progress=False)
