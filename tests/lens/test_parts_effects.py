"""Effects, tasks and baselines on one part of an encoder-decoder, against hooks on the model itself."""

from typing import Any

import numpy as np
import pytest
import torch

import lens
from lens import edits
from lens.tasks.task import Task
from tests.tiers import first

from .encoder_decoders import inputs_of, made

SIZE, HEADS, LAYERS = 12, 4, 2  # of the decoder of the small Marian
DRAWN = torch.Generator().manual_seed(3)
SOURCES = torch.randint(3, 97, (3, 6), generator=DRAWN)
TARGETS = torch.cat([torch.full((3, 1), 2), torch.randint(3, 97, (3, 4), generator=DRAWN)], 1)
OTHERS = torch.randint(3, 97, (3, 6), generator=DRAWN)
PAIRS = list(zip(SOURCES.tolist(), TARGETS.tolist(), strict=True))
UNEVEN = [
    ([3, 4, 5, 6], [2, 30, 31, 32]),
    ([9, 8, 7], [2, 40, 41]),
    ([5, 6, 7, 8, 9], [2, 50, 51, 52]),
]


@pytest.fixture(scope="module")
def marian():
    return lens.load(made("marian"))


class Naive:
    """The model with hooks on what its cross heads give, [rows, tokens, heads * size], and nothing of `lens`."""

    def __init__(self, loaded):
        self.model: Any = loaded.model
        self.modules = [one.encoder_attn.out_proj for one in self.model.model.decoder.layers]

    @torch.no_grad()
    def logits(self, source, target, change: Any = None, **more):
        hooks = [
            module.register_forward_pre_hook(lambda _, args, n=n: change(n, args[0]))
            for n, module in enumerate(self.modules)
            if change
        ]
        ids = [torch.as_tensor(one).reshape(1, -1) for one in (source, target)]
        try:
            return self.model(input_ids=ids[0], decoder_input_ids=ids[1], **more).logits[0]
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, source, target, change=None, **more):
        logits = self.logits(source, target, change, **more)
        return torch.nn.functional.cross_entropy(logits[:-1], torch.as_tensor(target)[1:]).item()

    def z(self, source, target):
        """Per layer [tokens, heads * size]."""
        seen = []
        self.logits(source, target, lambda _, z: seen.append(z[0].clone()))
        return seen

    def without(self, head, instead):
        """A change that puts `instead` [tokens, size] (or a number) in place of a head."""
        layer, number = head

        def change(n, z):
            if n != layer:
                return None
            z = z.clone()
            z[0, :, number * SIZE : (number + 1) * SIZE] = instead
            return (z,)

        return change


def part_of(z, head):
    return z[head[0]][:, head[1] * SIZE : (head[1] + 1) * SIZE]


@pytest.mark.parametrize("baseline", ["zero", "mean", "pooled_mean"])
def test_effect_of_a_cross_head_is_that_of_a_hook_and_controls_are_other_heads(marian, baseline):
    naive, every = Naive(marian), [(a, b) for a in range(LAYERS) for b in range(HEADS)]
    seen = [naive.z(*pair) for pair in PAIRS]

    def deltas(head):
        found = []
        for source, target in PAIRS:
            stacked = torch.stack([part_of(z, head) for z in seen])
            instead = {"zero": 0.0, "mean": stacked.mean(0), "pooled_mean": stacked.mean((0, 1))}
            change = naive.without(head, instead[baseline])
            found.append(naive.loss(source, target, change) - naive.loss(source, target))
        return np.array(found)

    known = {head: deltas(head) for head in every}
    cross = marian.part("cross")
    found = lens.effect(cross, PAIRS, edits.Ablate(["L1H2"], baseline), progress=False)
    assert found.values["edit"]["delta_loss"][0] == pytest.approx(known[1, 2], abs=1e-5)
    assert set(found.values) == {"edit", "size", "mass", "layer"}
    for name in ("size", "mass", "layer"):
        control = found.values[name]["delta_loss"][0]
        others = [head for head in every if head != (1, 2) and (name != "layer" or head[0] == 1)]
        for number in range(len(PAIRS)):
            assert min(abs(known[one][number] - control[number]) for one in others) < 1e-5
    assert found.part == "cross"
    assert "heads of the cross part" in lens_kind(found, "limit")
    table = lens.capture(cross, PAIRS, block_size=1, progress=False)
    first = np.mean([one.block_mass.values[1, 2, :, 0].mean() for one in table])
    assert found.values["edit"]["mass"][0].mean() == pytest.approx(first, abs=1e-5)


def lens_kind(found, kind):
    return " ".join(one for one in found.findings() if one.kind == kind)


def test_masked_keys_of_the_source_are_the_model_with_that_mask(marian):
    naive = Naive(marian)
    cross, keys = marian.part("cross"), [1, 4]
    found = lens.effect(cross, PAIRS, edits.Mask(keys), draws=2, amounts=[0.5, 1.0], progress=False)
    for number, (source, target) in enumerate(PAIRS):
        mask = torch.ones(1, 6, dtype=torch.long)
        mask[0, keys] = 0
        encoded = marian.model.get_encoder()(torch.tensor([source]))
        hidden = marian.model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=torch.tensor([target])
        ).logits[0]
        loss = torch.nn.functional.cross_entropy(hidden[:-1], torch.tensor(target[1:])).item()
        change = loss - naive.loss(source, target)
        assert found.values["edit"]["delta_loss"][1, number] == pytest.approx(change, abs=1e-5)
    assert "no rows of the target" in found.missing["self"]
    assert set(found.values) == {"edit", "size", "mass", "position"}
    assert [one.shape for one in found.alphas] == [(2, LAYERS, HEADS, 6)] * 3
    assert found.tokens == (5, 5, 5)
    cut = lens.effect(cross, PAIRS, edits.Knockout([4], keys), scored=[1, 2], progress=False)
    assert np.abs(cut.values["edit"]["delta_loss"]).max() < 1e-6, "query 4 predicts later tokens"
    cut = lens.effect(cross, PAIRS, edits.Knockout([1], keys), scored=[1], progress=False)
    assert np.abs(cut.values["edit"]["delta_loss"]).min() > 1e-6
    held = (edits.Freeze(), edits.Mask(keys))
    assert lens.effect(cross, PAIRS, held, progress=False).values["edit"]["kl"].min() > 0


@pytest.mark.parametrize("name", first(["t5", "whisper", "blip"], "t5", "whisper"))
def test_every_part_of_every_kind_has_effects(name):
    loaded, given = lens.load(made(name)), inputs_of(name)
    for part in loaded.parts:
        edit = edits.Ablate(["L1H1"])
        found = lens.effect(loaded.part(part), given, edit, controls="layer", progress=False)
        assert found.values["edit"]["kl"][0, 0] > 1e-6
        whole = lens.effect(loaded.part(part), given, edits.Mask([2]), progress=False)
        assert whole.values["edit"]["kl"][0, 0] > 1e-7
        with lens.edit(loaded.part(part), edit), torch.no_grad():
            ids = given[next(n for n in ("decoder_input_ids", "input_ids") if n in given)]
            logits = loaded.model(**given).logits[0].log_softmax(-1)
        own = loaded.model(**given).logits[0].log_softmax(-1)
        change = (own - logits)[:-1].gather(1, ids[0, 1:, None]).mean().item()
        assert found.values["edit"]["delta_loss"][0, 0] == pytest.approx(change, abs=1e-5)


@pytest.mark.parametrize("baseline", ["zero", "mean", "pooled_mean", "resample", "counterfactual"])
def test_importance_of_a_task_with_targets_is_that_of_hooks(marian, baseline):
    naive, cross = Naive(marian), marian.part("cross")
    task = lens.tasks.language_modelling(marian, PAIRS)
    assert "3 targets of 5 tokens" in repr(task)
    losses = [naive.loss(*pair) for pair in PAIRS]
    assert task.evaluate(cross).tolist() == pytest.approx(losses, abs=1e-5)
    task = Task(**{**vars(task), "corrupt": OTHERS})
    found = lens.heads.importance(cross, task, baseline=baseline, progress=False)
    seen = [naive.z(*pair) for pair in PAIRS]
    corrupt = [naive.z(*pair) for pair in zip(OTHERS.tolist(), TARGETS.tolist(), strict=True)]
    for head in [(0, 3), (1, 2)]:
        stacked = torch.stack([part_of(z, head) for z in seen])
        for number, (source, target) in enumerate(PAIRS):
            could = {
                "zero": [0.0],
                "mean": [stacked.mean(0)],
                "pooled_mean": [stacked.mean((0, 1))],
                "resample": [one for n, one in enumerate(stacked) if n != number],
                "counterfactual": [part_of(corrupt[number], head)],
            }[baseline]
            changes = [
                naive.loss(source, target, naive.without(head, one)) - losses[number]
                for one in could
            ]
            score = found.per_prompt[head[0], head[1], number]
            assert min(abs(score - one) for one in changes) < 1e-5
    if baseline != "counterfactual":
        pairs = lens.heads.importance(cross, PAIRS, baseline=baseline, progress=False)
        assert pairs.per_prompt == pytest.approx(found.per_prompt, abs=1e-5)


def test_gradients_of_a_task_are_those_of_autograd(marian):
    naive, cross = Naive(marian), marian.part("cross")
    task = Task(**{**vars(lens.tasks.language_modelling(marian, PAIRS)), "corrupt": OTHERS})
    gradient = lens.heads.importance(cross, task, method="gradient", progress=False)
    patching = lens.heads.importance(cross, task, method="attribution", progress=False)
    gate = lens.heads.importance(cross, task, method="gate", progress=False)
    for number, (source, target) in enumerate(PAIRS):
        seen: list[Any] = []

        def keep(_, args, seen=seen):
            z = args[0].detach().requires_grad_() if not seen else args[0]
            z.retain_grad()
            seen.append(z)
            return (z,)

        hooks = [module.register_forward_pre_hook(keep) for module in naive.modules]
        ids = torch.tensor([source]), torch.tensor([target])
        logits = marian.model(input_ids=ids[0], decoder_input_ids=ids[1]).logits[0]
        for hook in hooks:
            hook.remove()
        torch.nn.functional.cross_entropy(logits[:-1], ids[1][0, 1:]).backward()
        other = naive.z(OTHERS[number], target)
        for layer, z in enumerate(seen):
            change = {"gradient": z[0], "attribution": z[0] - other[layer]}
            for found, name in ((gradient, "gradient"), (patching, "attribution")):
                per_head = (z.grad[0] * change[name]).sum(0).unflatten(0, (HEADS, SIZE)).sum(-1)
                mine = found.per_prompt[layer, :, number]
                assert mine == pytest.approx(-per_head.detach().numpy(), abs=1e-5)
        mine = gradient.per_prompt[:, :, number]
        assert gate.per_prompt[:, :, number] == pytest.approx(mine - mine.mean(1, keepdims=True))


def test_a_task_s_metric_stands_beside_the_loss_of_its_targets(marian):
    cross = marian.part("cross")
    task = lens.tasks.language_modelling(marian, PAIRS, metric="accuracy")
    found = lens.effect(cross, task, edits.Ablate(["L1H2"], "mean"), controls=2, progress=False)
    own = lens.effect(cross, PAIRS, edits.Ablate(["L1H2"], "mean"), controls=(), progress=False)
    assert found.values["edit"]["delta_loss"] == pytest.approx(own.values["edit"]["delta_loss"])
    assert found.metric == "accuracy"
    assert task.with_kl(cross).evaluate(cross).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(
    "edit",
    [
        edits.Knockout([2], [1, 2]),
        edits.Ablate(["L0H1"], "mean", over=PAIRS),
        edits.Freeze((PAIRS[0][0], [2, 9, 9, 9, 9])),
    ],
)
def test_edits_of_cross_rows_know_their_place_while_it_writes(marian, edit):
    source = torch.tensor([PAIRS[1][0]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True}
    options |= {"return_dict_in_generate": True, "do_sample": False}
    found = []
    for cached in (True, False):
        with lens.edit(marian.part("cross"), edit):
            made_now = marian.model.generate(source, use_cache=cached, **options)
        found.append(torch.cat(made_now.logits))
    plain = torch.cat(marian.model.generate(source, **options).logits)
    assert (found[0] - found[1]).abs().max() < 1e-4
    assert (found[0] - plain).abs().max() > 1e-3


def test_means_are_over_targets_of_several_lengths(marian):
    naive, cross = Naive(marian), marian.part("cross")
    seen = [part_of(naive.z(*pair), (1, 2)) for pair in UNEVEN]
    pooled = torch.cat(seen).mean(0)
    found = lens.effect(
        cross, UNEVEN, edits.Ablate(["L1H2"], "pooled_mean"), controls=(), progress=False
    )
    scores = lens.heads.importance(cross, UNEVEN, progress=False).per_prompt[1, 2]
    for number, pair in enumerate(UNEVEN):
        change = naive.loss(*pair, naive.without((1, 2), pooled)) - naive.loss(*pair)
        assert found.values["edit"]["delta_loss"][0, number] == pytest.approx(change, abs=1e-5)
        assert scores[number] == pytest.approx(change, abs=1e-5)
    means = [torch.stack([z[place] for z in seen if len(z) > place]).mean(0) for place in range(4)]
    by_place = lens.heads.importance(cross, UNEVEN, baseline="mean", progress=False).per_prompt
    change = naive.loss(*UNEVEN[1], naive.without((1, 2), torch.stack(means[:3])))
    assert by_place[1, 2, 1] == pytest.approx(change - naive.loss(*UNEVEN[1]), abs=1e-5)


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, c: lens.effect(m, PAIRS, edits.Mask()), r"model.part\('cross'\)"),
        (lambda m, c: lens.effect(c, [([3], [2])], edits.Mask()), "at least two tokens"),
        (lambda m, c: lens.effect(c, PAIRS, edits.Ablate("L0.mlp")), "two residual streams"),
        (lambda m, c: lens.effect(c, PAIRS, edits.Activation(0, 0, 0)), "two residual streams"),
        (lambda m, c: lens.heads.importance(m, PAIRS), r"model.part\('cross'\)"),
        (lambda m, c: lens.heads.importance(c, PAIRS, method="gradient"), "other methods take a task"),
        (
            lambda m, c: lens.heads.importance(
                c, lens.tasks.language_modelling(m, PAIRS), method="direct"
            ),
            "has several; take",
        ),
        (lambda m, c: lens.heads.importance(c, UNEVEN, baseline="resample"), "of one length"),
        (lambda m, c: lens.heads.importance(c, UNEVEN[:2], baseline="mean"), "has no mean"),
        (lambda m, c: lens.tasks.language_modelling(m, UNEVEN), "targets of one length"),
        (
            lambda m, c: lens.heads.importance(
                c, Task("x", SOURCES, SOURCES[:, :1] * 0, SOURCES[:, :1], "loss")
            ),
            "has no targets, and MarianMTModel is an encoder-decoder",
        ),
        (
            lambda m, c: lens.tasks.language_modelling(m, PAIRS).evaluate(lens.load("induction-2l")),
            "is no encoder-decoder",
        ),
        (
            lambda m, c: Task(
                "x", SOURCES, SOURCES[:, :1] * 0, SOURCES[:, :1], "loss", targets=TARGETS[:2]
            ),
            "each source needs a target; got 3 and 2",
        ),
        (
            lambda m, c: lens.circuits.find(c, lens.tasks.language_modelling(m, PAIRS)),
            "two residual streams",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(marian, run, said):
    with pytest.raises(lens.LensError, match=said):
        run(marian, marian.part("cross"))
