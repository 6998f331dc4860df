"""The page of models is of the list that the script reads, and a row says what happened."""

import re

import pytest

from tests.benchmarks import models_table
from tests.tiers import first

ROW = re.compile(
    r"\| ([\w ]+) \(([\w.:-]+)\) \| (exact|exact \([a-z, ]+\)|refused: .+?) \| (.*) \|"
)


def _rows() -> list[tuple[str, str, str, list[str]]]:
    lines = [line for line in models_table.PAGE.read_text().splitlines() if line.startswith("| ")]
    found = [ROW.fullmatch(line) for line in lines[1:]]
    assert all(found), [line for line, match in zip(lines[1:], found, strict=True) if not match]
    return [(m[1], m[2], m[3], [cell.strip() for cell in m[4].split("|")]) for m in found if m]


def test_the_page_has_one_row_for_each_type_of_the_list():
    types = models_table.TYPES.read_text().split()
    assert len(types) == len(set(types)) >= 150
    assert sorted(row[1] for row in _rows()) == sorted(types)


def test_rows_of_the_page_are_exact_or_have_a_reason():
    rows = _rows()
    assert sum(row[2].startswith("exact") for row in rows) >= 150
    for name, _, captured, cells in rows:
        assert len(cells) == len(models_table.ANALYSES)
        if captured.startswith("exact"):
            assert set(cells) <= {"yes", "refused"}
        else:
            circuits = "yes" if "has no softmax attention" in captured else ""
            assert cells == ["", "", "", circuits, ""]
            assert len(captured) > 30, name


@pytest.mark.parametrize(
    ("kind", "analyses"),
    [
        ("llama", {"importance", "weights", "direct", "circuits", "sinks"}),
        ("bloom", {"importance", "weights", "direct", "circuits", "sinks"}),
        ("vit", {"weights", "sinks"}),
    ],
)
def test_a_captured_model_is_exact_and_its_analyses_run(kind, analyses):
    row = models_table.examine(kind)
    assert not models_table.wrong(row)
    assert row["error"] < 1e-5
    assert row["compared"] == row["layers"] == 3
    assert {name for name in models_table.ANALYSES if row[name] == "yes"} == analyses
    assert f"({kind}) | exact | " in models_table.page([row])


def test_a_hybrid_is_made_of_layers_of_both_kinds():
    """A small LFM2 had softmax attention alone, and the page said that its circuits are refused."""
    row = models_table.examine("lfm2")
    assert not models_table.wrong(row)
    assert row["layers"] == 2
    assert "(lfm2) | exact | yes | refused | refused | yes | yes |" in models_table.page([row])


def test_what_is_told_by_an_example_is_held_layer_by_layer():
    row = models_table.examine(
        "bridgetower"
    )  # its pictures have no mask, and eager attention alone
    assert not models_table.wrong(row)
    assert (row["layers"], row["compared"]) == (18, 15)  # three are torch's own
    assert "(bridgetower) | exact (wrapped) | " in models_table.page([row])


@pytest.mark.parametrize("kind", first(["t5", "speecht5", "canary"], "t5"))
def test_a_whole_encoder_decoder_is_held_in_all_three_attentions(kind):
    row = models_table.examine(f"whole:{kind}")
    assert not models_table.wrong(row)
    assert row["error"] < 1e-5
    assert row["compared"] == row["layers"] == 9
    assert row["importance"] == "yes"
    assert f"(whole:{kind}) | exact | yes |" in models_table.page([row])


def test_a_refusal_has_its_reason_and_a_fault_is_wrong(monkeypatch):
    row = models_table.examine("mamba")
    assert not models_table.wrong(row)
    page = models_table.page([row])
    assert "refused: MambaForCausalLM has no softmax attention" in page
    assert page.rstrip().endswith("find and evaluate | | | | yes | |")

    def broken(name, model, trace):
        raise ValueError("a fault")

    monkeypatch.setattr(models_table, "_analyse", broken)
    assert models_table.examine("llama")["raw"] == "importance: ValueError: a fault"
    for fault in ({"raw": "x"}, {"unbuilt": "x"}, {"error": 1e-3}):
        assert models_table.wrong({"type": "a", **fault})
    assert not models_table.wrong({"type": "a", "error": 1e-7})
