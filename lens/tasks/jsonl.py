"""Tasks from a file: one JSON object per line, with `clean`, `corrupt`, `correct` and `wrong`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lens.common.errors import LensError
from lens.models.loaded import LoadedModel
from lens.tasks.candidates import Misfit, following
from lens.tasks.task import Task

_NEEDED = ("clean", "correct", "wrong")


def from_jsonl(model: LoadedModel, path: str | Path, *, name: str | None = None) -> Task:
    """A task by logit difference at the last token, from your own prompts.

    Each line is an object: `clean` (a text or token ids), `corrupt` (the same, of as many tokens;
    in every line or in none), `correct` and `wrong` (a text of a single token, with its leading space
    where the vocabulary has one, or an id). What does not fit is dropped and listed in
    `task.dropped`: answers of several tokens or that are one token, an answer that changes how its
    prompt is split, prompts whose corrupt partner has another length, and
    prompts of another length than most (the shorter one where two are as frequent).

    Args:
        model: whose tokenizer reads the texts.
        path: of the file.
        name: of the task; None: the file's.

    Raises:
        LensError: a line that is no such object, corrupt prompts in some lines only, or no prompt
            left.

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
    path = Path(path)
    found: list[dict[str, Any]] = []
    dropped: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            row = _parse(line, number, path)
            try:
                found.append(_encode(model, row, number))
            except Misfit as reason:
                dropped.append(f"line {number}: {reason}")
    if not found:
        raise LensError(f"{path.name} has no prompt that can be used; {'; '.join(dropped[:3])}")
    with_corrupt = [row for row in found if row["corrupt"] is not None]
    if 0 < len(with_corrupt) < len(found):
        lacking = next(row["number"] for row in found if row["corrupt"] is None)
        raise LensError(f"{path.name}: line {lacking} has no 'corrupt' and others do; add it")
    counts = Counter(len(row["clean"]) for row in found)
    length = min(counts, key=lambda size: (-counts[size], size))
    for row in found:
        if len(row["clean"]) != length:
            dropped.append(f"line {row['number']}: {len(row['clean'])} tokens, most have {length}")
    kept = [row for row in found if len(row["clean"]) == length]

    def column(field: str) -> torch.Tensor:
        return torch.tensor([row[field] for row in kept])

    return Task(
        name=name or path.stem,
        clean=column("clean"),
        positions=torch.full((len(kept), 1), length - 1),
        correct=column("correct")[:, None],
        metric="logit_difference",
        corrupt=column("corrupt") if with_corrupt else None,
        wrong=column("wrong")[:, None],
        dropped=tuple(dropped),
    )


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LensError(f"{path.name}: line {number} is no JSON ({error.msg})") from error
    if not isinstance(row, dict) or any(field not in row for field in _NEEDED):
        raise LensError(f"{path.name}: line {number} must be an object with {', '.join(_NEEDED)}")
    if unknown := sorted(set(row) - {*_NEEDED, "corrupt"}):
        raise LensError(f"{path.name}: line {number} has unknown fields {', '.join(unknown)}")
    return row


def _encode(model: LoadedModel, row: dict[str, Any], number: int) -> dict[str, Any]:
    clean = _ids(model, row["clean"])
    corrupt = None if row.get("corrupt") is None else _ids(model, row["corrupt"])
    if corrupt is not None and len(corrupt) != len(clean):
        raise Misfit(f"clean has {len(clean)} tokens, corrupt {len(corrupt)}")
    answers = {field: _answer(model, row["clean"], row[field]) for field in ("correct", "wrong")}
    if answers["correct"] == answers["wrong"]:
        raise Misfit("the correct and the wrong answer are the same token")
    return {"number": number, "clean": clean, "corrupt": corrupt, **answers}


def _ids(model: LoadedModel, prompt: str | list[int]) -> list[int]:
    return model.encode(prompt) if isinstance(prompt, str) else [int(index) for index in prompt]


def _answer(model: LoadedModel, prompt: str | list[int], answer: str | int) -> int:
    """The single token of an answer: where it follows the prompt, if it begins with a space."""
    if isinstance(answer, int):
        return answer
    if isinstance(prompt, str) and answer[:1].isspace():
        return following(model, prompt, answer)
    ids = model.encode(answer)
    if ids[0] == model.bos_id:
        ids = ids[1:]
    if len(ids) != 1:
        raise Misfit(f"the answer {answer!r} has {len(ids)} tokens, one was expected")
    return ids[0]
