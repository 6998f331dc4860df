"""Names of heads."""

import numpy as np
import pandas as pd
import pytest
import torch

from lens.common.errors import LensError
from lens.common.head_ids import HeadId, all_heads, head_columns, head_id, head_of_node, one_or_more


@pytest.mark.parametrize(
    "written",
    [
        *("L3H15", "l3h15", " 3.15 ", (3, 15), [3, 15], HeadId(3, 15)),
        *((np.int64(3), np.int32(15)), np.array([3, 15]), torch.tensor([3, 15])),
        *((torch.tensor(3), torch.tensor(15)), [torch.tensor(3), 15]),
    ],
)
def test_every_way_to_write_a_head(written):
    found = head_id(written, layers=4, heads=16)
    assert (found.layer, found.head) == (3, 15)
    assert str(found) == "L3H15"
    assert [type(part) for part in found] == [int, int]


def test_a_node_of_a_circuit_is_a_head_or_none():
    assert head_of_node("a3.h15") == HeadId(3, 15)
    for other in ("input", "logits", "m3", "a3.kv1", "a3.h15<q>", "a3"):
        assert head_of_node(other) is None


def test_one_and_ten_are_two_heads():
    assert head_id("3.1") != head_id("3.10")


@pytest.mark.parametrize(
    "written",
    [
        *("", "L3", "H5", "L3H", "L-1H2", "3,5", "3.5.1", "L3H5x", "L³H5", b"35", 3.5, 3, None),
        *((3,), (3, 5, 1), (-1, 2), (3, 5.0), (True, 2), ("3", "5")),
        *(
            np.array([3.0, 5.0]),
            np.array([[3, 5], [0, 1]]),
            torch.tensor([3.0, 5.0]),
            torch.zeros(3),
        ),
        *({3, 5}, {3: 5, 4: 6}, torch.tensor(3), np.array([True, False])),
    ],
)
def test_anything_else_is_refused(written):
    with pytest.raises(LensError, match=r"written 'L3H5', '3\.5' or \(3, 5\), counted from 0; got"):
        head_id(written)


def test_one_head_or_several_in_any_form():
    two = [(3, 15), (0, 1)]
    assert one_or_more("heads", "L3H15") == ("L3H15",)
    assert one_or_more("heads", (3, 15)) == ((3, 15),)
    for one in (np.array([3, 15]), torch.tensor([3, 15]), (torch.tensor(3), torch.tensor(15))):
        assert [*map(head_id, one_or_more("heads", one))] == two[:1]
    table = pd.DataFrame({"layer": [3, 0], "head": [15, 1], "name": ["L3H15", "L0H1"]})
    several = (
        two,
        iter(two),
        np.array(two),
        torch.tensor(two),
        table,
        table["name"],
        table[["head", "layer"]],
        ["3.15", "L0H1"],
    )
    for given in several:
        assert [*map(head_id, one_or_more("heads", given))] == two
    for wrong in (3, None, {"L3H15": 1}):
        with pytest.raises(LensError, match="heads must be a list, got"):
            one_or_more("heads", wrong)
    with pytest.raises(LensError, match="got a table with the columns layer, value; one of heads"):
        one_or_more("heads", pd.DataFrame({"layer": [3], "value": [0.5]}))


def test_a_head_that_the_model_lacks_is_refused():
    with pytest.raises(LensError, match="no L4H0: layer must be 0 to 3, got 4"):
        head_id("L4H0", layers=4, heads=6)
    with pytest.raises(LensError, match="no L0H6: head must be 0 to 5, got 6"):
        head_id((0, 6), layers=4, heads=6)


def test_columns_of_heads_are_in_the_order_of_the_model():
    heads = all_heads(range(2), 3)
    assert [tuple(head) for head in heads] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert head_columns([(1, 2), (0, 1)]) == {
        "name": ["L1H2", "L0H1"], "layer": [1, 0], "head": [2, 1],
    }  # fmt: skip
    assert {type(one) for one in head_columns(np.array([[1, 2]]))["layer"]} == {int}
