"""`lens.effect`: equal to transformers with the keys hidden, controls, migration, known models."""

import numpy as np
import pytest
import torch

import lens
from lens.common.errors import LensError
from lens.edits import Ablate, Bias, Drop, Mask, Move
from lens.edits._others import control_keys
from lens.edits.watching import Watch
from lens.passes.sessions import listening
from tests.lens.architectures import build
from tests.lens.naive import rms_ratio

LENGTH = 37
IDS = torch.randint(3, 97, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def hidden_by_transformers(model, keys: list[int]):
    """Logits and probabilities by layer, with `keys` hidden from every later query, by `eager`."""
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    own = torch.eye(LENGTH, dtype=torch.bool)[:, keys]
    allowed[..., keys] &= own if keys == [0] else torch.zeros_like(own)
    model.set_attn_implementation("eager")
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model(input_ids=IDS, attention_mask=additive, output_attentions=True)
    model.set_attn_implementation("sdpa")
    return found.logits[0, :-1].log_softmax(-1), torch.cat(found.attentions)


def test_loss_kl_and_flips_equal_those_of_transformers_with_the_key_hidden():
    network = build("llama")
    torch.nn.init.normal_(network.lm_head.weight, std=0.7)
    base, _ = hidden_by_transformers(network, [])
    edited, _ = hidden_by_transformers(network, [0])
    result = lens.effect(lens.load(network), IDS[0], Mask("first"), controls=())
    values = {name: found[0] for name, found in result.values["edit"].items()}
    target = IDS[0, 1:]
    losses = [torch.nn.functional.nll_loss(logits, target) for logits in (base, edited)]
    assert abs(losses[1] - losses[0]) > 1e-4
    assert values["delta_loss"][0] == pytest.approx(float(losses[1] - losses[0]), abs=1e-5)
    kl = torch.nn.functional.kl_div(edited, base, log_target=True, reduction="sum") / len(target)
    assert values["kl"][0] == pytest.approx(float(kl), rel=1e-3)
    flips = (base.argmax(-1) != edited.argmax(-1)).float().mean()
    assert values["flip_rate"][0] == pytest.approx(float(flips))


@pytest.mark.parametrize("keys", [[0], [3, 11]])
def test_alpha_after_masking_is_that_of_transformers_with_the_keys_hidden(keys):
    network = build("llama")
    model = lens.load(network)
    _, p = hidden_by_transformers(network, keys)
    edit = Watch(Mask(keys).start(model, "auto").done)
    with torch.no_grad(), listening(model, edit.on_layer):
        model.model(input_ids=IDS)
    expected = p.sum(-2)[..., : LENGTH - 15] / torch.arange(LENGTH, 15, -1)
    assert rms_ratio(edit.alpha()[..., : LENGTH - 15], expected) < 1e-5
    assert edit.alpha()[..., LENGTH - 15 :].isnan().all()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt_oss"])
def test_without_an_edit_alpha_is_that_of_a_trace(architecture):
    model = lens.load(build(architecture))
    edit = Watch()
    with torch.no_grad(), listening(model, edit.on_layer):
        model.model(input_ids=IDS)
    trace = lens.capture(model, IDS[0], statistics=["received"])
    expected = lens.sinks.find(trace).profile.alpha if architecture != "mistral" else None
    if expected is None:  # with a window of 11 no key but the first has 16 viewers
        expected = np.full((3, 6, LENGTH), np.nan)
        expected[..., 0] = trace.received.values[..., 0] / 11
    assert rms_ratio(edit.alpha(), expected) < 1e-5


def test_dropping_takes_the_keys_part_only_from_the_chosen_heads():
    model = lens.load(build("llama"))
    plain = lens.sinks.find(lens.capture(model, IDS[0], statistics=["received"])).profile.alpha
    edit = Watch(Drop([0, 5], 0.25, heads=["L0H2"]).start(model, "auto").done)
    with torch.no_grad(), listening(model, edit.on_layer):
        model.model(input_ids=IDS)
    expected = plain[0].copy()
    expected[2, [0, 5]] *= 0.75
    assert rms_ratio(edit.alpha()[0], expected) < 1e-5
    assert rms_ratio(edit.alpha()[2], plain[2]) > 1e-6  # the stream has changed


def test_nothing_moves_at_amount_zero():
    model = lens.load(build("llama"))
    result = lens.effect(model, [IDS[0], IDS[0, :31]], Mask("first", 0.0))
    for condition in ("edit", "size", "mass", "position", "self"):
        for measure in ("delta_loss", "kl", "flip_rate"):
            assert (result.values[condition][measure] == 0).all(), (condition, measure)
    moved = result.migration
    assert (moved["source_before"] == moved["source_after"]).all()
    assert (moved["other_before"] == moved["other_after"]).all()
    assert result.tokens == (LENGTH, 31)


def test_controls():
    random = np.random.default_rng(7)
    sources = np.zeros(23, bool)
    sources[[0, 11]] = True
    mass = np.full(23, 0.02)
    mass[[0, 11]] = 0.05, 0.03
    assert control_keys("position", sources, mass, random) == [1, 10]
    size = control_keys("size", sources, mass, random)
    assert len(size) == 2
    assert not sources[size].any()
    matched = control_keys("mass", sources, mass, random)
    assert mass[matched].sum() == pytest.approx(0.08)
    assert not sources[matched].any()
    mass[0] = 0.9  # cannot be reached: all others
    assert len(control_keys("mass", sources, mass, random)) == 21
    draws = {tuple(control_keys("size", sources, mass, random)) for _ in range(20)}
    assert len(draws) > 10
    with pytest.raises(LensError, match="12 are, and 11 others may stand in"):
        control_keys("size", np.arange(23) < 12, mass, random)


# --- known models ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_lm():
    """The model and seven prompts of 120 tokens out of the text that it was not trained on."""
    model = lens.load("text-lm-3l")
    ids = model.encode(lens.tasks.text("moby-dick"))
    starts = range(int(len(ids) * 0.96), len(ids) - 119, 119)
    return model, [[0, *ids[start : start + 119]] for start in starts]


def test_the_strongest_sink_of_text_lm_hardly_matters(text_lm):
    """L1H0 gives BOS 0.9 of its attention; without it the loss of 2.9 nats rises by less than 1 %.

    What BOS contributes is another matter: as a constant it is needed (drop), as the model's README
    says of the head's mean.
    """
    model, prompts = text_lm
    assert len(prompts) == 7
    result = lens.effect(model, prompts, Mask("first", heads=["L1H0"]))
    table = result.table().set_index("condition")
    assert table.loc["edit", "mass"] > 0.85
    assert 0 < table.loc["edit", "delta_loss"] < 0.03
    assert table.loc["edit", "delta_loss_low"] < table.loc["edit", "delta_loss"]
    assert table.loc["mass", "mass"] < 0.15  # the rest cannot match the sink's mass, and says so
    assert (table["bos"] == "added").all()
    assert (table["n"] == 7).all()
    moved = result.migration.set_index(["layer", "head"]).loc[(1, 0)]
    assert moved["source_before"] > 0.85
    assert moved["source_after"] < 0.01
    assert moved["other_after"] > 5 * moved["other_before"]
    assert moved["other_key"] == 1  # the next token becomes the sink
    others = result.migration.query("layer == 1 and head != 0")
    assert (others["source_before"] == others["source_after"]).all()
    dropped = lens.effect(model, prompts, Drop("first", heads=["L1H0"]), controls=())
    assert dropped.values["edit"]["delta_loss"].mean() > 0.05


def test_the_sink_of_induction_2l_matters_less_than_as_much_mass_elsewhere():
    model = lens.load("induction-2l")
    prompts = [lens.tasks.copied(model, 25, seed) for seed in range(8)]
    table = lens.effect(model, prompts, Mask("first")).table().set_index("condition")
    assert table.loc["mass", "mass"] == pytest.approx(table.loc["edit", "mass"], rel=0.1)
    assert table.loc["mass", "keys"] > 10
    assert table.loc["mass", "excess_high"] < 0
    assert table.loc["size", "excess_low"] > 0
    assert table.loc["edit", "delta_loss_low"] > 0.2
    assert np.isnan(table.loc["edit", "excess"])


def test_the_loss_grows_with_the_amount(text_lm):
    model, prompts = text_lm
    drop = Drop("first", heads=["L1H0"])
    result = lens.effect(model, prompts[:3], drop, amounts=[1.0, 0.0, 0.5])
    table = result.table()
    sources = table[table["condition"] == "edit"]
    assert sources["amount"].tolist() == [0, 0.5, 1]
    assert sources["delta_loss"].iloc[0] == 0
    assert sources["delta_loss"].is_monotonic_increasing
    alone = lens.effect(model, prompts[:3], Drop("first", 0.5, heads=["L1H0"]))
    half = table[table["amount"] == 0.5].reset_index(drop=True)
    assert half.equals(alone.table())  # the same control keys, too
    figure = result.plot("kl")
    assert [curve.name for curve in figure.data] == ["edit", "size", "mass", "position", "self"]
    assert np.array_equal(figure.data[0].y, sources["kl"])
    assert [curve.name for curve in result.plot("excess").data] == [
        "size",
        "mass",
        "position",
        "self",
    ]
    with pytest.raises(
        LensError, match=r"measure must be one of 'delta_loss', 'kl', .* got 'mass'"
    ):
        result.plot("mass")
    with pytest.raises(LensError, match="amounts must be different, at least one"):
        lens.effect(model, prompts, drop, amounts=[0.5, 0.5])


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "edit", "arguments"),
    [
        ("edit must be one of lens.edits, such as Mask.'first'., or several; got 'mask'", "mask", {}),
        ("or several; got .'mask': 1", lambda prompt: {"mask": 1}, {}),
        ("Ablate to zero has no amount", Ablate("L0H1"), {"amounts": [0.5]}),
        ("draws must be a positive integer, got 0", Mask(), {"draws": 0}),
        ("effect edits at least one head", Mask(heads=[]), {}),
        (r"is a fraction 0\.\.1, got 2", Mask(), {"amounts": [2]}),
        ("amounts must be different, at least one", Mask(), {"amounts": []}),
        ("controls must be one of 'size', 'mass', .* got 'few'", Mask(), {"controls": ["few"]}),
        ("none of the keys is in a prompt of 37 tokens", Mask([40]), {}),
        ("20 are, and 17 others may stand in; use longer", Mask(range(20)), {}),
    ],
)  # fmt: skip
def test_refusals(match, edit, arguments):
    model = lens.load(build("llama"))
    with pytest.raises(LensError, match=match):
        lens.effect(model, IDS[0], edit, **arguments)


def test_a_bias_is_a_mask_by_the_logarithm_and_so_are_its_alphas():
    model = lens.load(build("llama"))
    masked = lens.effect(model, IDS[0], Mask([0, 7], 0.75), controls=("mass",))
    biased = lens.effect(model, IDS[0], Bias([0, 7], float(np.log(0.25))), controls=("mass",))
    assert rms_ratio(masked.alphas[0][1], biased.alphas[0][1]) < 1e-5
    for condition in ("edit", "mass"):
        expected = masked.values[condition]["kl"]
        assert biased.values[condition]["kl"] == pytest.approx(expected, rel=1e-3)
        assert expected.min() > 0


def test_control_keys_of_a_move_are_none_that_receive():
    """A receiver moved onto itself would change nothing: no control."""
    random, sources, mass = np.random.default_rng(2), np.arange(9) == 0, np.full(9, 0.1)
    free = np.isin(np.arange(9), [4, 8])
    for control in ("size", "mass", "position"):
        assert set(control_keys(control, sources, mass, random, free)) <= {4, 8}
    model = lens.load(build("llama"))
    result = lens.effect(model, IDS[0, :6], Move("first", to=[2, 3, 4, 5]), controls=("size",))
    alone = lens.effect(model, IDS[0, :6], Move([1], to=[2, 3, 4, 5]), controls=())
    found = result.values["size"]["delta_loss"]
    assert found == pytest.approx(alone.values["edit"]["delta_loss"], abs=1e-7)
    assert result.alphas[0][1].shape == (3, 6, 6)
    assert np.isnan(result.alphas[0][1]).all()
    assert "Where the attention went is not known" in " ".join(result.findings())


def test_a_control_that_is_the_edit_itself_is_said_to_be_none():
    """The first row sees nothing but the first key, so sparing it changes nothing of a mask."""
    model = lens.load(build("llama"))
    said = lens.effect(model, IDS, Mask("first"), controls=("size", "self")).findings()
    texts = {sentence.kind: str(sentence) for sentence in said}
    assert texts["self"].startswith("The self control changes the same as the edit")
    assert "the size control (" in texts["size"]


def test_prompts_and_models_without_a_next_token_are_refused():
    with pytest.raises(LensError, match="at least two tokens"):
        lens.effect(lens.load(build("llama")), [5], Mask())
    with pytest.raises(LensError, match=r"BertModel lets tokens see later ones.* load a causal"):
        lens.effect(lens.load(build("bert")), IDS[0], Mask())
    with pytest.raises(LensError, match=r"gives no logits \[1, tokens, vocab\]"):
        lens.effect(lens.load(build("llama").model), IDS[0], Mask())


def test_sinks_has_no_other_names():
    with pytest.raises(AttributeError, match=r"'lens.sinks' has no attribute 'outcome'"):
        lens.sinks.outcome  # noqa: B018


def test_the_self_control_spares_the_keys_own_rows():
    """transformers with keys 3 and 11 hidden from all rows but 3 and 11, which see what they saw."""
    network = build("llama")
    torch.nn.init.normal_(network.lm_head.weight, std=0.7)
    allowed = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    base = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for row in set(range(LENGTH)) - {3, 11}:
        allowed[..., row, [3, 11]] = False
    spared = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(
                network(input_ids=IDS, attention_mask=mask).logits[0, :-1], IDS[0, 1:]
            )
            for mask in (base, spared)
        )
    found = lens.effect(lens.load(network), IDS[0], Mask([3, 11]), controls=("self",)).values
    assert found["self"]["delta_loss"][0, 0] == pytest.approx(float(after - before), abs=1e-5)
    assert abs(found["self"]["delta_loss"] - found["edit"]["delta_loss"]).max() > 1e-4


def test_controls_take_keys_of_among_and_heads_of_the_layer():
    model = lens.load(build("llama"))
    found = lens.effect(model, IDS[0], Mask("first"), controls=("size", "mass"), among=[5])
    five = lens.effect(model, IDS[0], Mask([5]), controls=()).values["edit"]
    for control in ("size", "mass"):
        for name in ("delta_loss", "kl", "mass"):
            assert found.values[control][name] == pytest.approx(five[name], rel=1e-5, abs=1e-9)
    some, others = ([(1, head) for head in heads] for heads in ((0, 1, 2), (3, 4, 5)))
    layer = lens.effect(model, IDS[0], Mask("first", heads=some), controls=("layer",))
    rest = lens.effect(model, IDS[0], Mask("first", heads=others), controls=()).values["edit"]
    for name in ("delta_loss", "kl", "mass"):
        assert layer.values["layer"][name] == pytest.approx(rest[name], rel=1e-5, abs=1e-9)
    with pytest.raises(LensError, match="1 are, and 0 others may stand in"):
        lens.effect(model, IDS[0], Mask("first"), controls=("size",), among=[0])


def test_scored_positions_alone_are_measured():
    model = lens.load(build("llama"))
    found = lens.effect(model, IDS[0], Mask("first"), controls=(), scored=[10, 20, 36])
    logits = []
    with torch.no_grad():
        for several in ((), (Mask("first"),)):
            with lens.edit(model, *several):
                logits.append(model.model(input_ids=IDS).logits[0, [10, 20]].log_softmax(-1))
    change = (logits[0] - logits[1]).gather(1, IDS[0, [11, 21], None]).mean()
    assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(float(change), abs=1e-6)
    with pytest.raises(LensError, match="scored holds no position"):
        lens.effect(model, IDS[0], Mask("first"), scored=[36])


def test_draws_are_averaged():
    """Of two keys that may stand in, twenty draws have both; their mean lies between the two."""
    model = lens.load(build("llama"))
    ends = [
        float(lens.effect(model, IDS[0], Mask([key]), controls=()).values["edit"]["kl"][0, 0])
        for key in (5, 9)
    ]
    found = lens.effect(
        model, IDS[0], Mask("first"), controls=("size",), among=[5, 9], draws=20
    ).values["size"]["kl"][0, 0]
    share = (found - ends[0]) / (ends[1] - ends[0])
    assert 0.1 < share < 0.9
    assert share * 20 == pytest.approx(round(share * 20), abs=1e-2)


def test_a_control_that_a_later_prompt_lacks_is_refused_and_not_the_edit_itself():
    model = lens.load(build("llama"))
    most = [(layer, head) for layer in range(2) for head in range(6)]

    def heads(prompt):
        return Ablate(["L0H1"] if len(prompt.ids) == LENGTH else most)

    prompts = [IDS[0], IDS[0, :31]]
    found = lens.effect(model, prompts, heads, controls=())
    assert found.values["edit"]["keys"][0].tolist() == [1, 12]
    with pytest.raises(
        LensError, match="the first prompt has a size control and prompt 1 has none"
    ):
        lens.effect(model, prompts, heads, controls=("size",))
