"""Where a comparison lies, and what it found."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
