"""What the commands on split sequences and known LSEs print, in small."""

import pytest
import torch

from tests.benchmarks import known_lse, split_sequence


def test_pieces_are_those_of_tensors():
    pieces = split_sequence.measured(256, 2, 16)
    assert pieces.payload == 2 * 8 * 64 * 4 + 4  # keys and values of 8 heads, and a group
    assert pieces.states == 3 * 8 * 64 * 4 + 8 * 4 * (
        6 + 2 * 5
    )  # three outputs, rows and two groups
    assert pieces.maps == 2 * 8 * 4
    one, many = (pieces.memory(2**20, ranks, 1024) for ranks in (1, 64))
    assert 40 < one / many < 64  # diagonals do not get smaller
    assert pieces.sent(1024, 1) == 0


def test_tables_have_a_row_for_each_case(capsys):
    split_sequence.transfers(256)
    split_sequence.growth(split_sequence.measured(256, 2, 16))
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + 24 + 2 + 12
    ring = next(row for row in rows if row.startswith("| 4 | 8 | keys | ring |"))
    assert ring == "| 4 | 8 | keys | ring | 3 | 12,288 | 3,072 | 3,072 |"


def test_errors_grow_with_the_step():
    query, key = torch.randn(2, 1, 2, 96, 16, generator=torch.Generator().manual_seed(1))
    still, small, large = (known_lse.errors(query, key, share) for share in (0.0, 0.02, 0.2))
    assert still[:2] == pytest.approx((0, 0), abs=1e-5)
    assert still[2] == 1
    assert still[0] < small[0] < large[0]
    assert still[1] < small[1] < large[1]
