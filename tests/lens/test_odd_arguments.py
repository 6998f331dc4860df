"""Whatever a public function is given in place of what it needs is refused in words, and never by an error of Python."""

import importlib
import inspect
from typing import Any

import pytest

import lens
from docs.public import rooms
from lens.circuits.graph.graph import Graph
from lens.common.errors import LensError

ODD = {"an object": object(), "a text": "a text", "a number": 3.5, "nothing": None, "no list": []}
ANY = ("lens.edit", "lens.traces.capturing", "lens.traces.denoising")  # look when they are entered
EMPTY = ("lens.stats.interval", "lens.stats.ranks", "lens.stats.spearman")  # of no values it is NaN


def callables():
    """Dotted name -> each public function and class that needs an argument, with the names of these."""
    for room, names in rooms().items():
        for name in names if room.split(".")[0] == "lens" else ():
            found = getattr(importlib.import_module(room), name)
            if not callable(found) or not found.__module__.startswith("lens."):
                continue
            given = inspect.signature(found).parameters.values()
            needed = [one for one in given if one.default is one.empty and one.kind not in (2, 4)]
            is_record = inspect.isclass(found) and issubclass(found, tuple)
            if needed and not is_record:
                yield f"{room}.{name}", found, needed


@pytest.mark.parametrize("odd", ODD)
def test_what_is_of_no_kind_is_refused_in_words(odd):
    raw, names = [], []
    for name, call, needed in callables():
        names.append(name)
        alone = {one.name: ODD[odd] for one in needed if one.kind is one.KEYWORD_ONLY}
        try:
            call(*[ODD[odd]] * (len(needed) - len(alone)), **alone)
        except LensError:
            continue
        except Exception as error:
            raw.append(f"{name}: {type(error).__name__}: {error}")
        else:
            takes = name in ANY or (odd == "no list" and name in EMPTY) or inspect.isclass(call)
            raw += [] if takes else [f"{name} takes it"]
    assert len(names) > 150
    assert raw == []


def test_an_ablation_that_is_none_is_refused_before_it_is_kept():
    odd: Any = object()
    with pytest.raises(LensError, match=r"ablation must be an Ablation .*got object"):
        lens.circuits.make_circuit(Graph(2, 4, 4, mlps=False), [], ablation=odd)
