"""The settings of `lens vision`: the section `analysis` of its runs."""

from typing import Annotated

from pydantic import AfterValidator, field_validator

from lens_analyses.config.analyses import AnalysisSettings
from lens_analyses.config.listed import (
    MOVES,
    check_amounts,
    check_loss,
    check_moves,
    check_overlays,
    check_ratio,
    listed,
)
from lens_analyses.config.settings import setting


class VisionSettings(AnalysisSettings):
    """Of `lens vision`."""

    overlays: Annotated[str | None, AfterValidator(check_overlays)] = setting(
        None,
        'Heads to lay on the pictures, with commas, e.g. "L11H2,L5,mean"; chosen if not given.',
        min_length=2,
    )
    tau: Annotated[str, AfterValidator(check_loss)] = setting(
        "0.5", "Divergence of rows up to which patches are one segment, nats."
    )
    phi: Annotated[str, AfterValidator(check_ratio)] = setting(
        "20", "From which size on an image token is a sink of a vision-language model."
    )
    edits: Annotated[str, AfterValidator(check_moves)] = setting(
        ",".join(MOVES),
        f"Of a vision-language model's attention, with commas, of {', '.join(MOVES)}.",
    )
    amounts: Annotated[str, AfterValidator(check_amounts)] = setting(
        "0,0.3,0.6", "Of these edits, 0 to below 1, with commas: the dose-response curves."
    )
    emphasise: str | None = setting(
        None, "Words of the question that PASTA emphasises; the picture if not given.", min_length=1
    )

    @property
    def doses(self) -> tuple[float, ...]:
        """The amounts as numbers, in the given order."""
        return tuple(map(float, listed(self.amounts)))

    @field_validator("amounts")
    @classmethod
    def _are_shares(cls, words: str) -> str:
        if not all(0 <= float(word) < 1 for word in listed(words)):
            raise ValueError(f"must be numbers from 0 to below 1, with commas; got {words!r}")
        return words
