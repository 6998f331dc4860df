"""Tasks from a file: one JSON object per line, with `clean`, `corrupt`, `correct` and `wrong`."""

from pathlib import Path
from statistics import multimode
from typing import Any

import torch

from lens.common.choices import is_whole
from lens.common.errors import LensError, first_line
from lens.common.files import as_path, json_of_line, read_text
from lens.models.ids import is_ids
from lens.models.loaded import LoadedModel
from lens.passes.logits import check_predicts_tokens, logits_of
from lens.tasks.candidates import Misfit, following
from lens.tasks.task import Task

_LARGEST = 256 << 20  # bytes of a file
_NEEDED = ("clean", "correct", "wrong")
_OPTIONAL = ("corrupt", "position")
_SAME = 1e-3  # of the largest logit, by which a filled-up prompt may differ from the same alone


def from_jsonl(model: LoadedModel, path: str | Path, *, name: str | None = None) -> Task:
    """A task by logit difference, from your own prompts.

    Each line is an object: `clean` (a text or token ids), `corrupt` (the same, of as many tokens;
    in every line or in none), `correct` and `wrong` (a text, with its leading space where the vocabulary
    has one, or a token id), and `position`, where the answer is read if that is not the last token: a
    number from 0, or from the end below 0.

    Answers of several tokens count by the first token in which the two differ, read after those that they
    share. Prompts may have several lengths: shorter ones are filled up behind their own tokens, where a
    model that looks back alone sees nothing of it, which is checked; a model that looks ahead keeps those
    of the most frequent length (the shorter one where two are as frequent). What does not fit is dropped
    and listed in `task.dropped`: answers that are one token or of which one begins the other, an answer
    that changes how its prompt is split, prompts whose corrupt partner has another length, a position
    outside of the prompt.

    Args:
        model: whose tokenizer reads the texts.
        path: of the file.
        name: of the task; None: the file's.

    Raises:
        LensError: a line that is no such object, corrupt prompts in some lines only, no prompt left,
            or a classifier.

    A line of the file:
        {"clean": "The cat and the dog sat; the cat ran to the",
         "corrupt": "The cat and the dog sat; the dog ran to the", "correct": " dog", "wrong": " cat"}

    Example:
        >>> from pathlib import Path
        >>> line = '{"clean": [47, 78, 322], "correct": 408, "wrong": 78}'
        >>> _ = Path("mine.jsonl").write_text(line)
        >>> lens.tasks.from_jsonl(model, "mine.jsonl")
        Task(mine: 1 prompts of 3 tokens...
    """
    check_predicts_tokens(model)
    path = as_path("path", path)
    found: list[dict[str, Any]] = []
    dropped: list[str] = []
    for number, line in enumerate(read_text(path, most=_LARGEST).splitlines(), start=1):
        if line.strip():
            row = _parse(line, number, path)
            try:
                found.append(_encode(model, row, number))
            except Misfit as reason:
                dropped.append(f"line {number}: {reason}")
            except LensError as error:
                raise LensError(f"{path.name}: line {number}: {error}") from error
    if not found:
        raise LensError(
            f"{path.name} has no prompt that can be used; {'; '.join(dropped[:3]) or 'it is empty'}"
        )
    with_corrupt = [row for row in found if row["corrupt"] is not None]
    if 0 < len(with_corrupt) < len(found):
        lacking = next(row["number"] for row in found if row["corrupt"] is None)
        raise LensError(f"{path.name}: line {lacking} has no 'corrupt' and others do; add it")
    kept, left_out = _of_one_length_or_filled(model, found)

    def column(field: str) -> torch.Tensor:
        width = max(len(row["clean"]) for row in kept)
        return torch.tensor([_filled(row[field], width) for row in kept])

    def numbers(field: str) -> torch.Tensor:
        return torch.tensor([row[field] for row in kept])[:, None]

    lengths = [len(row["clean"]) for row in kept]
    return Task(
        name=name or path.stem,
        clean=column("clean"),
        positions=numbers("position"),
        correct=numbers("correct"),
        metric="logit_difference",
        corrupt=column("corrupt") if with_corrupt else None,
        wrong=numbers("wrong"),
        dropped=(*dropped, *left_out),
        lengths=torch.tensor(lengths) if len(set(lengths)) > 1 else None,
    )


def _of_one_length_or_filled(
    model: LoadedModel, rows: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows where filling up changes nothing, else those of the most frequent length; what is left out."""
    lengths = [len(row["clean"]) for row in rows]
    if len(set(lengths)) == 1 or _looks_back_alone(model, [row["clean"] for row in rows]):
        return rows, []
    length = min(multimode(lengths))
    return [row for row in rows if len(row["clean"]) == length], [
        f"line {row['number']}: {len(row['clean'])} tokens, most have {length}, and the model looks ahead"
        for row in rows
        if len(row["clean"]) != length
    ]


def _looks_back_alone(model: LoadedModel, prompts: list[list[int]]) -> bool:
    """Whether the shortest prompt has the same logits alone and filled up to the longest."""
    shortest, longest = min(prompts, key=len), max(map(len, prompts))
    context = model.info.context
    if context is not None and longest > context:
        return True  # which the task refuses by its length
    with torch.no_grad():
        alone = logits_of(model, torch.tensor([shortest]))[0].double()
        filled = logits_of(model, torch.tensor([_filled(shortest, longest)]))[0].double()
    change = (filled[: len(shortest)] - alone).abs().max()
    return bool(change <= _SAME * alone.abs().max())


def _filled(ids: list[int], width: int) -> list[int]:
    """The ids and, behind them, the last one again."""
    return ids + ids[-1:] * (width - len(ids))


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json_of_line(line)
    except ValueError as error:
        raise LensError(f"{path.name}: line {number} is no JSON ({first_line(error)})") from error
    if not isinstance(row, dict) or any(field not in row for field in _NEEDED):
        raise LensError(f"{path.name}: line {number} must be an object with {', '.join(_NEEDED)}")
    if unknown := sorted(set(row) - {*_NEEDED, *_OPTIONAL}):
        raise LensError(f"{path.name}: line {number} has unknown fields {', '.join(unknown)}")
    position = row.get("position", -1)
    if not is_whole(position):
        raise LensError(
            f"{path.name}: line {number} has the position {position!r}, which is no number"
        )
    for field in ("clean", "corrupt"):
        value = row.get(field)
        if (
            not isinstance(value, str)
            and not is_ids(value)
            and not (field == "corrupt" and value is None)
        ):
            raise LensError(f"{path.name}: line {number} needs a text or token ids as {field}")
    for field in ("correct", "wrong"):
        if not isinstance(row[field], str) and not is_whole(row[field]):
            raise LensError(f"{path.name}: line {number} needs a text or a token id as {field}")
    return row


def _encode(model: LoadedModel, row: dict[str, Any], number: int) -> dict[str, Any]:
    clean = _ids(model, row["clean"])
    corrupt = None if row.get("corrupt") is None else _ids(model, row["corrupt"])
    if corrupt is not None and len(corrupt) != len(clean):
        raise Misfit(f"clean has {len(clean)} tokens, corrupt {len(corrupt)}")
    position = row.get("position", -1)
    if not -len(clean) <= position < len(clean):
        raise Misfit(f"position {position} is outside of its {len(clean)} tokens")
    position %= len(clean)
    shared, correct, wrong = _first_difference(
        *(_answer(model, row["clean"], row[field]) for field in ("correct", "wrong"))
    )
    if shared and position != len(clean) - 1:
        raise Misfit("its answers begin alike, which can be read behind the last token alone")
    return {
        "number": number,
        "clean": clean + shared,
        "corrupt": None if corrupt is None else corrupt + shared,
        "position": position + len(shared),
        "correct": correct,
        "wrong": wrong,
    }


def _first_difference(correct: list[int], wrong: list[int]) -> tuple[list[int], int, int]:
    """What both answers begin with, and the first token of each that the other has not there."""
    for at, (right, other) in enumerate(zip(correct, wrong, strict=False)):
        if right != other:
            return correct[:at], right, other
    if correct == wrong:
        raise Misfit("the correct and the wrong answer are the same")
    raise Misfit("one answer begins the other, so that no token tells them apart")


def _ids(model: LoadedModel, prompt: str | list[int]) -> list[int]:
    return model.encode(prompt) if isinstance(prompt, str) else prompt


def _answer(model: LoadedModel, prompt: str | list[int], answer: str | int) -> list[int]:
    """The tokens of an answer: where it follows the prompt, if it begins with a space."""
    if isinstance(answer, int):
        return [answer]
    if isinstance(prompt, str) and answer[:1].isspace():
        return following(model, prompt, answer)
    ids = model.encode(answer)
    if ids[0] == model.bos_id:
        ids = ids[1:]
    if not ids:
        raise Misfit(f"the answer {answer!r} has no token")
    return ids
