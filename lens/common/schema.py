"""What a file must hold, said once as a pydantic model; what does not fit is one line that names file and entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lens.common.errors import LensError

_Model = TypeVar("_Model", bound=BaseModel)
_LONGEST = 60
_MOST_SAID = 3


def validated(model: type[_Model], value: Mapping[str, Any], path: Path) -> _Model:
    """The contents of a file as `model`.

    Raises:
        LensError: they do not fit it.
    """
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        said = [in_words(one) for one in error.errors(include_url=False)[:_MOST_SAID]]
        raise LensError(f"{path} is damaged: {'; '.join(said)}; make it again") from error


def in_words(error: Mapping[str, Any]) -> str:
    """One error of pydantic: where it is, what was expected, what came."""
    where = ".".join(map(str, error["loc"])) or "it"
    if error["type"] == "missing":
        return f"{where} is missing"
    message = str(error["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    given = repr(error["input"])
    return f"{where} {message}, got {given[:_LONGEST]}{'...' * (len(given) > _LONGEST)}"
