"""Where a comparison lies, and what it found."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.common.errors import LensError
from lens.runs import Run


def check_done(runs: Iterable[Run]) -> None:
    """Raises LensError: a run is being computed right now."""
    for run in runs:
        if run.status == "started":
            raise LensError(f"{run.path} is being computed right now; compare it when it is done")


@dataclass(frozen=True)
class Written:
    """A page with its numbers.

    Attributes:
        html, json: its files.
        what: it is called.
        numbers: of the page.
        told: of these what `--json` says.
    """

    html: Path
    json: Path
    what: str
    numbers: dict[str, Any]
    told: tuple[str, ...]

    def text(self) -> str:
        """What changed most, else every sentence, and where the page lies."""
        refusal = [self.numbers["refusal"]] if self.numbers.get("refusal") else []
        told = [one["text"] for one in self.numbers["headlines"]] or self.numbers["summary"]
        return "\n".join([*refusal, *told, f"{self.what}: {self.html}"])

    def as_json(self) -> dict[str, Any]:
        """For `--json`: where it lies, and the findings."""
        found = {key: self.numbers[key] for key in self.told}
        return {"html": str(self.html), "json": str(self.json), **found}
