"""Prompts before anything was computed: a text cut on request, and copied random tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lens.common.errors import LensError
from lens.models import vocabulary
from lens_analyses.config import RunConfig
from lens_analyses.console import UsageError

if TYPE_CHECKING:
    from lens.models.loaded import LoadedModel


@dataclass(frozen=True)
class PlannedPrompt:
    """A prompt before anything was computed.

    Attributes:
        kind: of `lens.runs.schema.PROMPT_KINDS`.
        title: for people: where it comes from and how it was cut.
        text: what the tokens say.
        ids: token ids, the first one included that the tokenizer puts there.
        seed: of a copied prompt, else None.
        given: what `lens.capture` takes, where it is not the ids: a picture, or a pair of one and a text; of an
            encoder-decoder the pair of source and target.
        strings: of positions of a picture or sound.
    """

    kind: str
    title: str
    text: str
    ids: list[int]
    seed: int | None = None
    given: Any = None
    strings: list[str] | None = None

    @property
    def prompt(self) -> Any:
        """As `lens.capture` takes it."""
        return self.ids if self.given is None else self.given


@dataclass(frozen=True)
class Source:
    """A text to analyse: its title, what it says, and of an encoder-decoder what its decoder reads, if it is given."""

    title: str
    text: str
    target: str | None = None


def cut(model: "LoadedModel", config: RunConfig, source: Source) -> list[PlannedPrompt]:
    ids = model.encode(source.text)
    tokens, windows, context = config.prompts.tokens, config.prompts.windows, model.info.context
    if tokens is None:
        if context is not None and len(ids) > context:
            raise LensError(
                f"the text has {len(ids):,} tokens and {model.name} takes {context:,}; --tokens {context} "
                f"takes the first {context:,}, and --windows N with it as many pieces as you like"
            )
        return [PlannedPrompt("text", source.title, source.text, ids)]
    if context is not None and tokens > context:
        there = len(vocabulary.windows(ids, context, vocabulary.around(model)))
        as_much = min(there, -(-tokens * (windows or 1) // context))
        raise LensError(
            f"--tokens {tokens} is more than the {context:,} that {model.name} takes; use --tokens {context}"
            + f", and --windows {as_much} for as much text" * (as_much > 1)
        )
    if windows is not None:
        return _windows(model, source, ids, tokens, windows)
    if tokens > len(ids):
        raise LensError(
            f"the text has {len(ids):,} tokens of {model.name} and --tokens asks for {tokens:,}; "
            "ask for fewer, or leave --tokens out to take all"
        )
    if tokens == len(ids):
        return [PlannedPrompt("text", source.title, source.text, ids)]
    title = f"{source.title}: first {tokens:,} of {len(ids):,} tokens"
    found = vocabulary.windows(ids, tokens, vocabulary.around(model))
    return [_piece(model, title, found[0] if found else ids[:tokens])]


def _windows(
    model: "LoadedModel", source: Source, ids: list[int], tokens: int, windows: int
) -> list[PlannedPrompt]:
    """Consecutive pieces, each between the special tokens that the tokenizer puts round the whole text."""
    pair = vocabulary.around(model)
    start, _, end = vocabulary.split_special(ids, pair)
    found = vocabulary.windows(ids, tokens, pair)
    if len(found) < windows:
        raise LensError(
            f"the text has {len(ids):,} tokens of {model.name}, enough for {len(found)} window{'s' * (len(found) != 1)} of {tokens} "
            f"and not for {windows}; ask for fewer or shorter ones"
        )
    size = tokens - len(start) - len(end)
    return [
        _piece(
            model,
            f"{source.title}: tokens {index * size:,} to {(index + 1) * size - 1:,}",
            piece,
        )
        for index, piece in enumerate(found[:windows])
    ]


def _piece(model: "LoadedModel", title: str, ids: list[int]) -> PlannedPrompt:
    return PlannedPrompt("text", title, say_of(model)(ids), ids)


def copied_prompts(model: "LoadedModel", config: RunConfig) -> list[PlannedPrompt]:
    if not config.prompts.copied:
        return []
    from lens.tasks.prompts import copied

    length = config.prompts.copied_length
    say = say_of(model)
    found = []
    for index in range(config.prompts.copied):
        seed = config.seed + index
        ids = copied(model, length, seed)
        title = f"{length} random tokens, then the same {length} again (seed {seed})"
        found.append(PlannedPrompt("copied", title, say(ids), ids, seed))
    return found


def say_of(model: "LoadedModel") -> Callable[[list[int]], str]:
    """Ids to text, without the BOS, or what else the tokenizer puts round one."""
    pair = ([], []) if model.tokenizer is None else vocabulary.around(model)

    def say(ids: list[int]) -> str:
        body = vocabulary.split_special(ids[1:] if ids[:1] == [model.bos_id] else ids, pair)[1]
        if model.tokenizer is None:
            return " ".join(map(str, body))
        return model.tokenizer.decode(body)

    return say


def asked_of(config: RunConfig) -> Any:
    """What an encoder-decoder shall write for each source (`Asked`); None where `lens generate` was not called.

    Raises:
        UsageError: targets are given to it.
    """
    from lens.passes.sources import Asked

    settings: Any = config.analysis
    if config.what != "generate":
        return None
    if getattr(config.prompts, "target", None) is not None:
        raise UsageError("`lens generate` has the model write the targets; leave --target out")
    return Asked(settings.new, float(settings.temperature), config.seed)
