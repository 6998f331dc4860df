"""Effects of patches and knock-outs against doing each of them, one by one, in float64."""

import dataclasses

import pytest
import torch
from lens_kernels import AttentionMask, reference
from lens_kernels.complements import complements, removal_effect
from lens_kernels.patching import PatchEffects, patch_effects
from lens_kernels.validation import make_problem

from tests.kernels.helpers import CASES, PART_OF_OTHERS, Case, assert_close, few, tensors

CAUSAL = AttentionMask(causal=True)
SINKS = torch.tensor([0.5, -1.0, 3.0, 1.5])
FIELDS = [field.name for field in dataclasses.fields(PatchEffects)]


class Setting:
    """A case in float64 with patches for everything, and the metric `sum dO . o`."""

    def __init__(self, case: Case, **options):
        shape = (2, 4, 2, case.queries, case.keys, 8, 6)
        self.inputs = [part.double() for part in tensors(*shape)]
        self.patches = [part.double() for part in tensors(*shape, seed=1)]
        generator = torch.Generator().manual_seed(2)
        shape = (2, 4, case.queries, 6)
        self.gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.options = {"mask": case.mask(4, case.queries, case.keys), **options}

    def problem(self, *inputs, **more):
        return make_problem(*(inputs or self.inputs), **(self.options | more))

    def rows(self, output):
        """The metric by row: [batch, heads, queries]."""
        return (self.gradient * output).sum(-1)

    def effects(self, dtype=torch.float64, **more) -> PatchEffects:
        patches = [patch.to(dtype) for patch in self.patches]
        return patch_effects(
            *(part.to(dtype) for part in self.inputs),
            self.gradient.to(dtype),
            patched_query=patches[0],
            patched_key=patches[1],
            patched_value=patches[2],
            knock_out=True,
            block_size=(5, 7),
            **(self.options | more),
        )


def naive(setting: Setting) -> PatchEffects:
    """Each patch by itself: attention run anew, metric compared."""
    _, key, value = setting.inputs
    problem = setting.problem()
    before = setting.rows(reference.run(problem).output)
    keys = key.shape[2]

    def after(**parts):
        return setting.rows(reference.run(dataclasses.replace(problem, **parts)).output)

    def only(index, old, new):
        mixed = old.clone()
        mixed[:, :, index] = new[:, :, index]
        return mixed

    by_key = [after(key=only(t, problem.key, setting.patches[1])) - before for t in range(keys)]
    by_value = [
        after(value=only(t, problem.value, setting.patches[2])) - before for t in range(keys)
    ]
    probability = reference.probabilities(problem)
    values = value.repeat_interleave(2, 1)
    out, drop = [], []
    for t in range(keys):
        out.append(without(setting, problem, [t]) - before)
        drop.append(-setting.rows(probability[..., t : t + 1] * values[:, :, t : t + 1]))
    blocks = [
        without(setting, problem, list(range(start, min(start + 7, keys)))) - before
        for start in range(0, keys, 7)
    ]
    block_rows = torch.stack(blocks, -1)
    short = -block_rows.shape[2] % 5
    block_rows = torch.nn.functional.pad(block_rows, (0, 0, 0, short)).unflatten(2, (-1, 5)).sum(3)
    stacked = [torch.stack(part, -1).sum(2) for part in (by_key, by_value, out, drop)]
    return PatchEffects(
        after(query=setting.problem(setting.patches[0], key, value).query) - before,
        *stacked,
        block_rows,
    )


def without(setting, problem, hidden):
    """The metric by row with some keys masked."""
    keep = torch.ones(2, problem.keys, dtype=torch.bool)
    keep[:, hidden] = False
    plan = problem.plan
    keep = keep if plan.keep is None else keep & plan.keep
    plan = dataclasses.replace(plan, keep=keep)
    return setting.rows(reference.run(dataclasses.replace(problem, plan=plan)).output)


def same(actual: PatchEffects, expected: PatchEffects, limit: float) -> None:
    for name in FIELDS:
        assert_close(getattr(actual, name), getattr(expected, name), limit, name)


@pytest.mark.parametrize("case", few(CASES, *PART_OF_OTHERS))
def test_every_effect_is_what_doing_it_gives(case):
    setting = Setting(case)
    expected = naive(setting)
    same(setting.effects(), expected, 1e-12)
    same(setting.effects(torch.float32), expected, 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 1.5},
        {"sink_logits": SINKS},
        {"scale": 0.9, "softcap": 3.0, "sink_logits": SINKS},
    ],
    ids=["softcap", "sinks", "all"],
)
def test_softcap_and_learned_sinks(options):
    setting = Setting(Case("causal", 23, 29, lambda h, q, k: CAUSAL), **options)
    same(setting.effects(), naive(setting), 1e-12)


def test_float32_stays_right_where_one_key_has_nearly_all_the_mass():
    setting = Setting(Case("causal", 23, 29, lambda h, q, k: CAUSAL))
    query, key, _ = setting.inputs
    query[..., 0], key[..., 0] = 6, 0
    key[:, :, 2, 0] = 9  # about 1 - 1e-8 of every row that sees it
    expected = naive(setting)
    largest = reference.probabilities(setting.problem()).amax()
    assert float(largest) > 1 - 1e-7
    same(setting.effects(torch.float32), expected, 2e-5)


def test_the_plain_formula_fails_there():
    """What `complements` is for: 1 - P and a - A as they stand are wrong in float32."""
    probability = torch.tensor([[1 - 3e-8, 2e-8, 1e-8]], dtype=torch.float64)
    through = torch.tensor([[1.0, 5.0, -2.0]], dtype=torch.float64)
    single, other = probability.float(), through.float()
    exact = removal_effect(probability, through, *complements(probability, through))
    plain = single * ((single * other).sum(-1, keepdim=True) - other) / (1 - single)
    good = removal_effect(single, other, *complements(single, other))
    assert_close(good, exact, 1e-6)
    assert not bool(((plain - exact).abs() < 0.1 * exact.abs())[0, 0])


def test_an_infinite_change_of_the_logit_is_the_whole_mass():
    """Patched keys whose logits are 1e4 higher or lower neither overflow nor give NaN."""
    setting = Setting(Case("none", 7, 11, lambda h, q, k: None))
    setting.inputs[0][..., 0] = 1.0
    setting.patches[1][..., 0] = 1e5
    setting.patches[1][:, :, ::2, 0] = -1e5
    expected = naive(setting)
    assert_close(setting.effects(torch.float32).key, expected.key, 1e-4)


def test_a_patched_key_of_minus_infinity_is_a_knock_out():
    setting = Setting(Case("none", 7, 11, lambda h, q, k: None))
    setting.inputs[0][..., 0] = 1.0
    setting.patches[1][..., 0] = -1e6
    effects = setting.effects()
    assert_close(effects.key, effects.knock_out, 1e-12)


def test_only_what_is_asked_for():
    setting = Setting(Case("none", 7, 11, lambda h, q, k: None))
    effects = patch_effects(*setting.inputs, setting.gradient, patched_value=setting.patches[2])
    assert [name for name in FIELDS if getattr(effects, name) is not None] == ["value"]


def test_nan_in_padding_of_a_patch_does_not_spread():
    case = Case("padded", 13, 17, lambda h, q, k: AttentionMask(key_lengths=[11, 17]))
    setting = Setting(case)
    for patch in setting.patches[1:]:
        patch[0, :, 11:] = torch.nan
    effects = setting.effects()
    assert not bool(effects.key.isnan().any())
    assert not bool(effects.value.isnan().any())
    assert bool((effects.value[0, :, 11:] == 0).all())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({}, ValueError, "nothing to compute: give patched_query, patched_key or patched_value"),
        ({"patched_key": (1, 1, 5, 3)}, ValueError, r"patched_key must be of shape \[1, 1, 5, 2\]"),
        ({"patched_query": torch.zeros(1, 2, 3, 2).double()}, TypeError, "is torch.float64, the q"),
        (
            {"output_gradient": (1, 2, 3, 7)},
            ValueError,
            r"output_gradient must be of shape \[1, 2,",
        ),
        ({"patched_key": torch.zeros(1, 1, 5, 2, device="meta")}, ValueError, "is on meta, the qu"),
    ],
    ids=["nothing", "shape", "dtype", "gradient", "device"],
)
def test_refusals(change, error, message):
    change = {
        name: torch.zeros(part) if isinstance(part, tuple) else part
        for name, part in change.items()
    }
    gradient = change.pop("output_gradient", torch.zeros(1, 2, 3, 2))
    if change == {} and gradient.shape[-1] == 7:
        change = {"knock_out": True}
    query, key = torch.zeros(1, 2, 3, 2), torch.zeros(1, 1, 5, 2)
    with pytest.raises(error, match=message):
        patch_effects(query, key, key, gradient, **change)
