"""A sequence split over ranks gives what one process gives: simulated links, and processes on this machine."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lens_kernels import AttentionMask, attention
from lens_kernels.distributed import Layout, Message, Processes, Simulated, ring_attention, traffic
from safetensors.torch import load_file

from tests import ranks as processes
from tests.kernels.helpers import assert_close, rms_ratio
from tests.kernels.split_sequence import (
    BLOCK,
    LENGTH,
    NAMES,
    SINKS,
    inputs,
    joined,
    labels,
    one_rank,
)
from tests.tiers import first

GROUPS = (torch.arange(LENGTH) != 0).int()[None].expand(2, -1)
CASES = {
    "causal": {},
    "window": {"window": 21},
    "window of a few": {"window": 3},
    "both ways": {"causal": False},
    "window both ways": {"causal": False, "window": 13},
    "softcap, scale and learned sinks": {"softcap": 2.0, "scale": 0.4, "sink_logits": SINKS},
}


def _whole(dtype=torch.float32, causal=True, window=None, **options):
    mask = AttentionMask(causal=causal, window=window)
    result = attention(
        *inputs(dtype),
        mask=mask,
        statistics=NAMES,
        match=labels(),
        prefix=3,
        groups=GROUPS,
        block_size=BLOCK,
        backend="reference",
        **options,
    )
    found = {"output": result.output, **{name: result.statistics[name] for name in NAMES}}
    for number, state in enumerate(result.groups.states):  # pyright: ignore
        found |= {f"group {number} output": state.output, f"group {number} lse": state.lse}
        found |= {f"group {number} {name}": part for name, part in state.statistics.items()}
    return found


def _same(found, expected, limit=1e-5):
    assert found.keys() == expected.keys()
    ratios = {name: rms_ratio(found[name], expected[name]) for name in expected}
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= limit} == {}


def _simulated(ranks, **options):
    both = Simulated.run(ranks, lambda links: one_rank(links, **options))
    return joined(both[0][0], [result for _, result in both])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("transfer", ["keys", "queries"])
@pytest.mark.parametrize("ranks", first([1, 2, 4], 2, 4))
def test_every_statistic_is_that_of_the_whole(ranks, transfer, case):
    _same(_simulated(ranks, transfer=transfer, **CASES[case]), _whole(**CASES[case]))


@pytest.mark.parametrize("ranks", [3, 5])
@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_ranks_of_unequal_parts(ranks, order):
    _same(_simulated(ranks, order=order, transfer="queries"), _whole())
    _same(_simulated(ranks, order=order), _whole())


def test_other_types_and_statistics():
    found = _simulated(2, dtype=torch.float64)
    _same(found, _whole(torch.float64), 1e-8)
    assert found["lse"].dtype == torch.float64
    low = _simulated(2, dtype=torch.bfloat16)
    assert low["output"].dtype == torch.bfloat16
    expected = _whole(torch.bfloat16)
    assert_close(low["lse"], expected["lse"], 1e-5)
    assert_close(low["received"], expected["received"], 1e-5)
    assert_close(low["output"], expected["output"], 1e-2)
    for transfer in ("keys", "queries"):
        some = _simulated(3, statistics=("block_max",), match=None, groups=None, transfer=transfer)
        assert [*some] == ["output", "block_max"]
        assert_close(some["block_max"], _whole()["block_max"], 1e-5)


def test_the_merger_of_torch_gives_the_same():
    """Context parallelism of torch: the same pieces, merged by its own class."""
    attention_of_torch = pytest.importorskip(
        "torch.distributed.tensor.experimental._context_parallel._attention"
    )
    layout = Layout(80, 2)
    whole: Any = [tensor[:, :, :80] for tensor in inputs()]
    for rank in range(2):
        own = layout.take(whole[0], rank, 2)
        merger = attention_of_torch._SDPAMerger(convert_to_f32=True, seq_dim=2)
        positions = layout.positions(rank)
        for step in range(2):
            other = (rank - step) % 2
            key, value = (layout.take(tensor, other, 2) for tensor in whole[1:])
            allowed = positions[:, None] >= layout.positions(other)
            part = attention(own, key, value, mask=AttentionMask(allowed=allowed))
            merger.step(part.output, part.statistics.lse, partial=False)
        output, lse = merger.results()
        found = Simulated.run(
            2,
            lambda links: ring_attention(
                layout.take(whole[0], links.rank, 2),
                layout.take(whole[1], links.rank, 2),
                layout.take(whole[2], links.rank, 2),
                layout,
                links,
            ),
        )[rank]
        assert_close(found.output, output, 1e-6)
        assert_close(found.statistics["lse"], lse.reshape(found.statistics["lse"].shape), 1e-6)


# --- layout, work, traffic ------------------------------------------------------------------------


def test_layouts_deal_out_every_token_once():
    for ranks in range(1, 6):
        for order in ("zigzag", "contiguous"):
            layout = Layout(LENGTH, ranks, BLOCK, order)  # pyright: ignore
            places = [layout.positions(rank) for rank in range(ranks)]
            assert torch.cat(places).sort().values.tolist() == list(range(LENGTH))
            assert torch.equal(layout.join(places, 0), torch.arange(LENGTH))
            assert [len(place) for place in places] == [layout.size(rank) for rank in range(ranks)]
            for rank in range(ranks):
                assert all(start % BLOCK == 0 for start, _ in layout.pieces(rank))


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 9), (False, None), (False, 9)])
def test_work_counts_the_pairs_that_see_each_other(causal, window):
    layout = Layout(48, 3, 4)
    place = torch.arange(48)
    distance = place[:, None] - place
    seen = torch.ones(48, 48, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    for rank in range(3):
        expected = int(seen[layout.positions(rank)].sum())
        assert layout.work(rank, causal=causal, window=window) == expected


def test_zigzag_balances_causal_work():
    for order, least, most in (("zigzag", 1.0, 1.001), ("contiguous", 1.8, 2.0)):
        layout = Layout(8192, 8, order=order)  # pyright: ignore
        work = [layout.work(rank) for rank in range(8)]
        assert least <= max(work) / (sum(work) / 8) <= most


def test_traffic_of_a_rotation():
    """Keys go round one way; queries go on while what was found comes back the other way."""
    names = {"statistics": ("lse",), "match": None, "groups": None}
    found = {}
    for transfer in ("keys", "queries"):
        messages: list[Message] = []
        for links in Simulated.run(
            4, lambda links, t=transfer: (one_rank(links, transfer=t, **names), links)[1]
        ):
            messages += links.messages
        found[transfer] = messages
    sizes = [Layout(LENGTH, 4, BLOCK).size(rank) for rank in range(4)]
    key_bytes = 2 * 2 * (16 + 24) * 4  # batch, key heads, both widths, float32
    keys = traffic(found["keys"], 4, "ring")
    assert keys.steps == 3
    assert keys.total == 3 * sum(sizes) * key_bytes
    one_way = {(m.target - m.source) % 4 for m in found["keys"]}
    assert one_way == {1}
    there, back = 2 * 4 * 16 * 4, 2 * 4 * (24 + 1) * 4  # queries; outputs and LSE
    direct = traffic(found["queries"], 4, "direct")
    assert direct.total == 3 * sum(sizes) * (there + back)
    ring = traffic(found["queries"], 4, "ring")
    assert ring.total == 3 * sum(sizes) * there + (1 + 2 + 1) * sum(sizes) * back
    assert direct.critical < ring.critical < ring.total


# --- refusals -------------------------------------------------------------------------------------


def test_what_is_refused():
    with pytest.raises(
        ValueError, match="10 tokens in blocks of 4 are 3 blocks, and 2 processes need 4"
    ):
        Layout(10, 2, 4)
    with pytest.raises(ValueError, match="order must be one of zigzag, contiguous, got 'random'"):
        Layout(10, 2, order="random")  # pyright: ignore
    with pytest.raises(ValueError, match="ranks must be a positive integer, got 0"):
        Layout(10, 0)
    with pytest.raises(ValueError, match="was not started: run under torchrun"):
        Processes()
    layout, x = Layout(8, 1), torch.zeros(1, 1, 8, 4)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"statistics": ("moments",)}, "a split sequence has no moments; it has block_mass"),
        ({"statistics": ("match_mass",)}, "go together"),
        ({"transfer": "both"}, "transfer must be 'keys' or 'queries', got 'both'"),
    )
    for options, expected in wrong:
        with pytest.raises(ValueError, match=expected):
            Simulated.run(1, lambda links, o=options: ring_attention(x, x, x, layout, links, **o))
    with pytest.raises(ValueError, match="the layout is for 1 ranks and there are 2"):
        Simulated.run(2, lambda links: ring_attention(x, x, x, layout, links))
    with pytest.raises(
        ValueError, match=r"query of rank 0 must hold its 8 tokens, .* got \[1, 1, 7, 4\]"
    ):
        Simulated.run(1, lambda links: ring_attention(x[:, :, :7], x, x, layout, links))


def test_who_ended_is_never_who_says_so(monkeypatch):
    of_torch: Any = torch.distributed
    store = of_torch.HashStore()
    links = Processes.__new__(Processes)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 4)

    def said(rank, words):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
        with pytest.raises((ConnectionError, RuntimeError)) as error, links._meeting(range(4)):
            raise RuntimeError(words)
        return str(error.value)

    for words in ("CUDA error: peer access is not supported between these two devices",
                  "CUDA error: the launch timed out and was terminated"):  # fmt: skip
        assert said(0, words) == words
    closed = "Connection closed by peer [127.0.0.1]:4711"
    assert "one of the ranks 1, 2, 3 of 4 ended" in said(0, closed)  # it was rank 3
    assert "one of the ranks 2, 3 of 4 ended" in said(1, closed)
    assert "rank 3 of 4 ended" in said(2, "Timed out waiting 1000ms for recv operation")


# --- processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_processes(tmp_path_factory):
    """Four processes of gloo on 127.0.0.1, started once: what each wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.run("tests.kernels.split_sequence", folder)
    return folder


@pytest.mark.parametrize("transfer", ["keys", "queries"])
@pytest.mark.parametrize("size", first([1, 2, 4], 2, 4))
def test_processes_give_what_one_gives(of_processes, size, transfer):
    layout = Layout(LENGTH, size, BLOCK)
    for start in range(0, 4, size):  # every group of that size
        files = [
            load_file(of_processes / f"{size}-{transfer}-{rank}.safetensors")
            for rank in range(start, start + size)
        ]
        messages = [Message(*row) for file in files for row in file.pop("messages").tolist()]
        results = [
            SimpleNamespace(
                output=file["output"],
                statistics={name: file[name] for name in NAMES},
                groups=[
                    SimpleNamespace(
                        output=file[f"group {n} output"], lse=file[f"group {n} lse"], statistics={}
                    )
                    for n in range(2)
                ],
            )
            for file in files
        ]
        found = joined(layout, results)
        whole = {name: part for name, part in _whole(sink_logits=SINKS).items() if name in found}
        _same(found, whole)
        noted: list[Message] = []
        options = {"transfer": transfer, "sink_logits": SINKS}
        for links in Simulated.run(size, lambda links, o=options: (one_rank(links, **o), links)[1]):
            noted += links.messages
        assert sorted(messages, key=repr) == sorted(
            noted, key=repr
        )  # simulated links tell the truth
