"""Directions that a head tells its keys by, and what taking them out leaves, beside controls."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.common.results import of_kind
from lens.passes.calls import attend
from lens.passes.replay import proved
from lens.passes.sessions import listening
from lens.reading import removing, subspaces
from lens.reading._head import read_head
from lens.reading._pairs import pairs_of
from lens.reading._rows import row_at
from lens.reading.directions import BASES
from tests.lens.layouts import layout_model
from tests.lens.vision_models import build


@pytest.fixture(scope="module")
def copying():
    model = lens.load("induction-2l")
    return model, [lens.tasks.copied(model, 15, seed) for seed in range(6)]


@pytest.fixture(scope="module")
def found(copying):
    return lens.reading.subspace(*copying, "L1H0", rank=6, draws=4, progress=False)


def heads_of(copying, name="L1H0"):
    model, prompts = copying
    layout = proved(model)
    ids = [{"input_ids": torch.tensor([list(prompt)])} for prompt in prompts]
    return [read_head(layout, one, model.info.head(name)) for one in ids]


def test_the_contrast_is_that_of_the_pairs_one_by_one(copying):
    total, count = 0, 0
    heads = heads_of(copying)[:2]
    for head in heads:
        for query, key in pairs_of(head, "induction", 0).tolist():
            others = [other for other in range(query + 1) if other != key]
            away = head.key[key] - head.key[others].mean(0)
            total, count = total + torch.outer(head.query[query], away), count + 1
    contrast = subspaces._found(heads, ["induction"] * 2)[0]
    assert torch.allclose(contrast, total / count)


def test_what_is_left_is_what_the_model_looks_at_without_the_directions(copying, found):
    """Of the contrast, by a run whose head has other queries; and nothing taken out is the head itself."""
    model, prompts = copying
    contrast = subspaces._found(heads_of(copying)[::2], ["induction"] * 3)[0]
    basis = torch.linalg.svd(contrast).U[:, :6]
    head = heads_of(copying)[1]
    chosen = pairs_of(head, "induction", 0)
    rows = chosen[:, 0]
    clean, edited = [], []

    def on_layer(call):
        if call.layer == 1:
            clean.append(row_at(call, rows)[0])
            query = call.query.clone()
            query[:, 0] -= query[:, 0] @ (basis @ basis.T).to(query)
            edited.append(row_at(replace(call, query=query), rows)[0])
        return attend(call, statistics=()).output

    with torch.no_grad(), listening(model, on_layer):
        model.model(torch.tensor([list(prompts[1])]))
    places = torch.arange(len(chosen)), chosen[:, 1]
    assert found.mass[0, 0] == pytest.approx(float(clean[0][places].mean()), abs=1e-5)
    assert found.mass[1, 0] == pytest.approx(float(edited[0][places].mean()), abs=1e-5)


def test_the_loss_is_the_models_own(copying, found):
    model, prompts = copying
    head = heads_of(copying)[1]
    rows = pairs_of(head, "induction", 0)[:, 0].unique()
    rows = rows[rows < head.tokens - 1]
    logits = model.logits(torch.tensor(list(prompts[1])))
    correct = torch.tensor(list(prompts[1]))[rows + 1]
    loss = -logits[rows].log_softmax(-1)[torch.arange(len(rows)), correct].mean()
    assert found.loss[0, 0] == pytest.approx(float(loss), abs=1e-5)


def test_the_contrast_stands_beside_every_control(found):
    table = found.table().set_index("basis")
    assert tuple(table.index) == BASES[1:]
    assert table.loc["contrast", "mass"] < table.loc["queries", "mass"]
    assert table.loc["contrast", "mass_high"] < found.mass[0].mean()
    assert (table["n"] == 3).all()
    kinds = [one.kind for one in found.findings()]
    assert kinds == ["contrast", "control", "specific"]
    lowest = min(table["mass"].drop("contrast"))
    said = "larger than that of every control" in found.findings()[1]
    assert said <= (table.loc["contrast", "mass"] < lowest)


def test_the_drop_is_said_to_be_larger_only_where_it_is(found):
    """The same table with the masses of a larger, an unsure and a smaller drop."""
    prompts = found.mass.shape[1]

    def said(contrast):
        mass = np.full_like(found.mass, 0.5)
        mass[1] = contrast
        (sentence,) = of_kind(replace(found, mass=mass).findings(), "control")
        return sentence.rpartition(": the drop alone ")[2]

    assert said(0.2) == "is larger than that of every control."
    apart = f"is not told apart from that of every control on {prompts} prompts."
    assert said(0.5) == apart
    assert said(0.8) == "is smaller than that of a control."
    first = np.arange(prompts) == 0
    assert said(np.where(first, 0.0, 0.5 + 0.1 / prompts)) == apart  # larger on average
    assert said(np.where(first, 1.0, 0.5 - 0.1 / prompts)) == apart  # smaller on average


def test_all_directions_that_matter_taken_out_leave_uniform_attention():
    """A head with a planted map: keys differ in one direction, which the contrast finds and whose loss is all."""
    root = layout_model("gpt2")
    model = lens.load(root)
    width = model.info.head_dim
    with torch.no_grad():
        attention = root.transformer.h[1].attn.c_attn
        attention.weight[:, :width] = 0  # queries of L1H0: a bias in one direction alone
        attention.bias[:width] = torch.eye(width)[2] * 3
    prompts = [
        torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(s)) for s in range(4)
    ]
    found = lens.reading.subspace(model, prompts, "L1H0", "strongest", rank=1, progress=False)
    assert found.spectrum[1] < 1e-9 * found.spectrum[0]
    uniform = np.mean([1 / (row + 1) for row in range(1, 12)])
    assert found.mass[1] == pytest.approx(uniform)
    assert found.mass[0].min() > uniform
    automatic = lens.reading.subspace(model, prompts, "L1H0", "strongest", progress=False)
    assert automatic.rank == 1


def test_a_prompt_without_such_pairs_is_left_out_and_counted(copying, found):
    """Different tokens once each: no earlier copy; the numbers are those of the others."""
    model, prompts = copying
    given = [*prompts[:3], list(range(20)), *prompts[4:]]
    some = lens.reading.subspace(model, given, "L1H0", rank=6, draws=4, progress=False)
    assert np.isnan(some.mass[:, 1]).all()
    table = some.table()
    assert table["n"].tolist() == [2] * 5
    assert table["n_other"].tolist() == [3] * 5
    assert table["clean"][0] == pytest.approx(found.mass[0, [0, 2]].mean())
    assert table["mass"][0] == pytest.approx(found.mass[1, [0, 2]].mean())
    assert table["mass_low"].notna().all()
    said = some.findings()
    assert "(on the 2 of 3 prompts with such pairs)" in said[0]
    assert "nan" not in " ".join(said)
    given = [prompts[0], list(range(20)), prompts[2], list(range(10))]
    with pytest.raises(LensError, match="none of the 2 prompts that directions are judged on"):
        lens.reading.subspace(model, given, "L1H0", rank=6, draws=1, progress=False)


def test_a_head_alone_in_its_layer_has_no_other_beside_it():
    """Its own contrast stood there as that of another head."""
    model = lens.load(layout_model("gpt2", n_head=1))
    prompts = [
        torch.randint(3, 60, (12,), generator=torch.Generator().manual_seed(s)) for s in range(4)
    ]
    found = lens.reading.subspace(model, prompts, "L1H0", "strongest", rank=2, progress=False)
    rows = found.table().set_index("basis")
    assert np.isnan(rows.loc["other head", "mass"])
    assert rows.drop("other head")["mass"].notna().all()
    said = found.findings()[1]
    assert "another head" not in said
    assert "nan" not in said


def test_what_has_no_subspace_is_refused(copying):
    model, prompts = copying
    with pytest.raises(LensError, match="needs at least two prompts"):
        lens.reading.subspace(model, prompts[0], "L1H0", progress=False)
    with pytest.raises(LensError, match="rank must be 1 to 15, got 16"):
        lens.reading.subspace(model, prompts[:2], "L1H0", rank=16, progress=False)
    with pytest.raises(LensError, match="no prompt has any 'duplicate' pairs"):
        lens.reading.subspace(model, [[64, 1, 2], [64, 3, 4]], "L1H0", "duplicate", progress=False)


def test_a_users_labels_name_the_pairs(copying):
    """Labels that say what "duplicate" says give its numbers; None is of no pair."""
    model, prompts = copying
    labels = [list(prompt) for prompt in prompts]
    asked = {"rank": 3, "draws": 2, "progress": False}
    own = lens.reading.subspace(model, prompts, "L1H1", labels=labels, **asked)
    same = lens.reading.subspace(model, prompts, "L1H1", "duplicate", **asked)
    assert own.pairs == "labelled"
    assert np.allclose(own.mass, same.mass)
    assert np.allclose(own.basis, same.basis)
    none = [[None] * len(prompt) for prompt in prompts]
    with pytest.raises(LensError, match="no two tokens of the prompts"):
        lens.reading.subspace(model, prompts, "L1H1", labels=none, **asked)
    with pytest.raises(LensError, match="one per token of each of 6 prompts"):
        lens.reading.subspace(model, prompts, "L1H1", labels=labels[:2], **asked)


@pytest.mark.parametrize("of", ["query", "key"])
def test_the_edit_is_what_the_logits_without_the_directions_say(copying, of):
    model, prompts = copying
    head, ids = heads_of(copying)[1], torch.tensor([list(prompts[1])])
    basis = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    projector = basis @ torch.linalg.pinv(basis)
    query, key = head.query, head.key
    query, key = (
        (query - query @ projector, key) if of == "query" else (query, key - key @ projector)
    )
    rows = torch.arange(head.tokens)
    expected = head.rows(rows, head.call.scale * query @ key.T) @ head.call.value[0, 0].double()
    outputs = []
    weight = head.layout.blocks[1].output.detach().double()
    lens.passes.head_outputs.read_heads(model, ids, lambda layer, z: outputs.append(z))
    clean = outputs[1][0].double()
    with lens.edit(model, lens.edits.Subspace(basis, of, heads=["L1H0"])) as (done,):
        edited = model.logits(ids[0])
    assert done.calls == 1
    with lens.edit(model, lens.edits.Subspace(basis, of, heads=["L1H0"], amount=0.0)):
        assert torch.equal(model.logits(ids[0]), model.logits(ids[0]))
    change = (expected - clean[0]) @ weight[0]
    assert float(change.abs().max()) > 1e-3
    final = []
    layer = lens.models.layout.blocks(model)[1]
    with layer.register_forward_hook(
        lambda _, __, out: final.append(out[0] if isinstance(out, tuple) else out)
    ):
        model.logits(ids[0])
        with lens.edit(model, lens.edits.Subspace(basis, of, heads=["L1H0"])):
            again = model.logits(ids[0])
    assert torch.allclose((final[1] - final[0])[0].double(), change, atol=1e-4)
    assert torch.allclose(again, edited)


def test_the_edit_of_the_residual_stream_and_its_control(copying):
    model, prompts = copying
    width = model.model.config.hidden_size
    basis = torch.randn(width, 2, generator=torch.Generator().manual_seed(1))
    left = []
    blocks = lens.models.layout.blocks(model)
    edit = lens.edits.Subspace(basis, "residual", layers=[0])
    with (
        lens.edit(model, edit),
        blocks[1].register_forward_pre_hook(lambda _, args: left.append(args[0])),
    ):
        model.logits(prompts[0])
    assert float((left[0].double() @ edit.basis).abs().max()) < 1e-4
    found = lens.effect(model, prompts[:2], edit, draws=2, progress=False).table()
    assert found["condition"].tolist() == ["edit", "size"]
    assert (found["keys"] == 2).all()
    picture = lens.load(build("llava")[0])
    basis = torch.ones(picture.model.config.text_config.hidden_size, 1)
    with lens.edit(picture, lens.edits.Subspace(basis, "residual", layers=[0])):
        pass
    with pytest.raises(LensError, match="has no heads; give layers"):
        lens.edits.Subspace(basis, "residual", heads=["L1H0"])
    with (
        pytest.raises(LensError, match="must have 16 rows"),
        lens.edit(model, lens.edits.Subspace(basis)),
    ):
        pass
    with pytest.raises(LensError, match="independent columns"):
        lens.edits.Subspace(torch.zeros(16, 2))


def test_the_plot_has_every_control(found):
    figure = found.plot()
    assert [list(one.x) for one in figure.data] == [list(BASES[1:])] * 2
    assert figure.data[0].y[0] == pytest.approx(found.table()["mass"][0])


def test_bars_of_directions_and_of_removals_reach_their_end(copying, monkeypatch):
    model, prompts = copying
    for module, ask, given in (
        (subspaces, lens.reading.subspace, prompts),
        (removing, lens.reading.removal, [prompts[0], [1, 2, 3, 4]]),  # no token comes again
    ):
        done = []

        @contextmanager
        def advancing(_title, total, _shown, done=done):
            yield done.append
            assert sum(done) == total

        monkeypatch.setattr(module, "advancing", advancing)
        ask(model, given, "L1H0")
        assert done
