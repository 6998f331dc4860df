"""Which cases `make test` runs and which are left to `make exhaustive`: those that go the same way on one more model."""

from collections.abc import Iterable
from typing import Any

import pytest


def first(cases: Iterable[Any], *always: Any) -> list[Any]:
    """Cases as parameters: those named always, the others marked `exhaustive`.

    Example:
        `@pytest.mark.parametrize("name", first(MODELS, "gpt2", "bert"))`
    """
    cases = [*cases]
    assert all(one in cases for one in always), f"{always} of {cases}"
    return [case if case in always else later(case) for case in cases]


def later(*case: Any) -> Any:
    """One case that is left to `make exhaustive`."""
    return pytest.param(*case, marks=pytest.mark.exhaustive)
