"""`lens.capture(group=)` in processes as torchrun starts them: every process has the trace of the whole; what cannot be split is refused."""

import json
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import lens
from lens.common.errors import LensError
from lens.traces.trace import AttentionTrace
from tests import ranks
from tests.lens.architectures import build
from tests.lens.split_capture import SIZES, ids


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of four processes found; started once."""
    folder = tmp_path_factory.mktemp("processes")
    ranks.run("tests.lens.split_capture", folder)
    return folder, [
        json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks.RANKS)
    ]


# Learned positions, GQA, windows, softcaps, learned sinks, and a model whose tokens see both ways.
@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in SIZES.items() for size in sizes]
)
def test_the_trace_is_that_of_one_process(told, name, size):
    for rank in told[1]:
        ratios = rank["ratios"][f"{name} {size}"]
        assert {"block_mass", "received", "diagonal", "entropy_sink_excluded", "q"} <= ratios.keys()
        assert {key: ratio for key, ratio in ratios.items() if not ratio <= 5e-6} == {}


def test_the_first_process_writes_the_folder(told):
    folder, found = told
    assert [rank["paths"] for rank in found] == [[True, True], *[[False, False]] * 3]
    trace = AttentionTrace.load(folder / "traces" / "p001")
    assert trace.attrs["processes"] == 4
    assert trace.dataset["token_id"].values.tolist() == ids(1)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("alibi", "BloomModel takes no position_ids"),
        ("hybrid", "computes something else when its tokens are split"),
        ("mask", "has a mask that cannot be split over processes"),
        ("twice", "attend twice, which group= does not do"),
        ("both", "in pieces (chunk) or over processes (group)"),
        ("short", "20 tokens in blocks of 4 are 5 blocks, and 4 processes need 8"),
        ("other", "the processes were given different prompts"),
        ("not a member", "this process is not in the group"),
    ],
)
def test_what_is_refused_on_every_process(told, what, expected):
    for rank in told[1]:
        assert expected in rank["refusals"][what]


def test_without_processes():
    with pytest.raises(
        LensError, match=r"group=: torch.distributed was not started: run under torchrun"
    ):
        lens.capture(lens.load(), "Call me Ishmael.", group=object())


def main(folder: Path) -> None:
    """The third process ends in the midst of its model's second layer."""
    dist.init_process_group("gloo")
    rank, model = dist.get_rank(), build("llama")
    loaded = lens.load(model)
    if rank == 2:
        model.model.layers[1].mlp.register_forward_hook(lambda *_: os._exit(0))
    with pytest.raises(LensError) as caught:
        lens.capture(loaded, ids(), block_size=4, group=dist.group.WORLD)
    (folder / f"{rank}.txt").write_text(str(caught.value))
    while not rank and len(list(folder.iterdir())) < ranks.RANKS - 1:
        time.sleep(0.01)  # the processes meet at the first


def test_a_process_that_ends_is_named_by_all_others(tmp_path):
    ranks.run("tests.lens.test_capture_group", tmp_path)
    told = {path.stem: path.read_text() for path in tmp_path.iterdir()}
    assert told.keys() == {"0", "1", "3"}
    for words in told.values():
        assert words.startswith("rank 2 of 4 ended, or does not answer; read what it printed last")
