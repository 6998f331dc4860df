"""Prompts: the embedded texts, copied random tokens, cutting to a length, and the loss on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lens.common.choices import Seed, check_counts, is_whole
from lens.common.errors import LensError
from lens.models.catalogue import ASSETS
from lens.models.vocabulary import ordinary_ids

if TYPE_CHECKING:
    import torch

    from lens.models.loaded import LoadedModel

LONGEST = 1 << 24
"""Tokens of a drawn prompt, for a model that takes any length."""
_CHUNK = 1 << 25  # logits that are in memory at a time


@dataclass(frozen=True)
class Text:
    """An embedded text.

    Attributes:
        name: as given to `text`.
        title: for people, with its author.
    """

    name: str
    title: str

    def read(self) -> str:
        """The text itself."""
        return (ASSETS / "texts" / f"{self.name}.txt").read_text(encoding="utf-8")


_TABLE = (
    Text("moby-dick", "Moby-Dick, chapters 134 and 135, by Herman Melville"),
    Text("pride-and-prejudice", "Pride and Prejudice, chapters 59 to 61, by Jane Austen"),
    Text("sherlock-holmes", "The Adventure of the Copper Beeches, by Arthur Conan Doyle"),
    Text("shakespeare", "The Taming of the Shrew and The Tempest, by William Shakespeare"),
    Text("lily", "Lily and the red ball, a children's story"),
)

TEXTS: dict[str, Text] = {text.name: text for text in _TABLE}


def text(name: str) -> str:
    """An embedded text by its name in `TEXTS`.

    Raises:
        LensError: no such text.

    Example:
        >>> lens.tasks.text("lily")[:17]
        'Once upon a time,'
    """
    if not isinstance(name, str) or name not in TEXTS:
        raise LensError(f"unknown text {name!r}; known: {', '.join(TEXTS)}")
    return TEXTS[name].read()


def take(model: "LoadedModel", text: str, tokens: int) -> list[int]:
    """Ids of the first `tokens` tokens of `text`, the tokenizer's special tokens included.

    This is the explicit way to cut a text: nothing else here ever does.

    Raises:
        LensError: the text has fewer tokens, or `tokens` is no positive number that the model takes.

    Example:
        >>> lens.tasks.take(model, lens.tasks.text("lily"), 5)
        [0, 47, 78, 322, 408]
    """

    context = model.info.context
    if not is_whole(tokens) or tokens < 1 or (context is not None and tokens > context):
        raise LensError(f"tokens must be 1 to {context} for {model.name}, got {tokens}")
    ids = model.encode(text)
    if len(ids) < tokens:
        raise LensError(
            f"the text has {len(ids):,} tokens of {model.name}, {tokens:,} were asked for; take fewer"
        )
    return ids[:tokens]


def copied(model: "LoadedModel", length: int, seed: Seed = 0) -> list[int]:
    """Ids of `BOS + r + r`, r being `length` uniform random tokens: the probe for induction heads.

    Special tokens are never drawn. Without a BOS token the prompt is `r + r`.

    Reference: Olsson et al., In-context Learning and Induction Heads, 2022, arXiv 2209.11895.

    Raises:
        LensError: the model has no vocabulary, or the prompt would be longer than it takes.

    Example:
        >>> ids = lens.tasks.copied(small, 3)
        >>> len(ids), ids[-3:] == ids[-6:-3]  # this model has a BOS
        (7, True)
    """

    import torch

    ordinary = torch.tensor(ordinary_ids(model))
    start = [] if model.bos_id is None else [model.bos_id]
    check_counts(0, length=length)
    total, most = len(start) + 2 * length, model.info.context or LONGEST
    if length < 1 or total > most:
        raise LensError(
            f"a copied prompt of 2 × {length} tokens has {total}; {model.name} takes "
            f"{most}: length must be 1 to {(most - len(start)) // 2}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = ordinary[torch.randint(len(ordinary), (length,), generator=generator)].tolist()
    return start + drawn + drawn


def token_losses(model: "LoadedModel", tokens: Sequence[int]) -> "torch.Tensor":
    """Next-token cross-entropy at each position: [tokens - 1] in nats, `[i]` of predicting token i + 1.

    The head runs over pieces of the sequence, so that logits [tokens, vocab] are never all there.

    Raises:
        LensError: the model predicts no next token, or the tokens do not fit it.

    Example:
        >>> ids = lens.tasks.take(model, lens.tasks.text("lily"), 24)
        >>> token_losses(model, ids).shape
        torch.Size([23])
    """
    import torch

    from lens.passes.sessions import base

    model.check_ids(tokens)
    if (why := _no_loss(model)) is not None:
        raise LensError(f"{model.info.class_name} has no next-token loss: {why}")
    ids = torch.tensor([list(tokens)], device=model.device)
    targets = ids[0, 1:]
    with torch.no_grad():
        step = max(1, _CHUNK // (model.info.vocab or 1))
        if len(tokens) <= step:
            logits = model.model(input_ids=ids).logits[0, :-1]
            return torch.nn.functional.cross_entropy(
                logits.float(), targets, reduction="none"
            ).cpu()
        hidden = base(model)(input_ids=ids, use_cache=False)[0][0]
        losses = [
            torch.nn.functional.cross_entropy(
                _logits(model, hidden[start : start + step])[: len(targets) - start].float(),
                targets[start : start + step],
                reduction="none",
            )
            for start in range(0, len(targets), step)
        ]
        _check_head(model, ids, hidden)
    return torch.cat(losses).cpu()


def loss(model: "LoadedModel", tokens: str | Sequence[int]) -> float:
    """Mean next-token cross-entropy in nats of a text or token ids; errors as in `token_losses`.

    Example:
        >>> round(lens.tasks.loss(model, lens.tasks.take(model, lens.tasks.text("lily"), 24)), 1)
        2.9
    """

    losses = token_losses(model, model.encode(tokens) if isinstance(tokens, str) else tokens)
    if not len(losses):
        raise LensError("a prompt of one token predicts no other; pass at least two")
    return float(losses.mean())


def _no_loss(model: "LoadedModel") -> str | None:
    """Why there is no next-token loss; None where there is one."""
    if model.is_bridge:
        return "it is a TransformerBridge; load the transformers model"
    if "MaskedLM" in type(model.model).__name__:
        return "it predicts masked tokens and no next token"
    if model.info.sees_later:
        return "its tokens see later ones, so that a next token was read before it is predicted"
    if model.model.get_output_embeddings() is None:
        return "it has no language-model head, so it predicts no next token"
    return None


def _logits(model: "LoadedModel", hidden: "torch.Tensor") -> "torch.Tensor":
    """Logits [tokens, vocab] of hidden states, with the final softcap of Gemma 2."""
    logits = model.model.get_output_embeddings()(hidden)
    softcap = getattr(model.model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def _check_head(model: "LoadedModel", ids: "torch.Tensor", hidden: "torch.Tensor") -> None:
    """The head applied by hand must be the model's own head: some scale their logits.

    Raises:
        LensError: it is not.
    """
    length = min(16, ids.shape[1])
    own = model.model(input_ids=ids[:, :length]).logits[0].float()
    by_hand = _logits(model, hidden[:length]).float()
    if not (own - by_hand).abs().max() <= 1e-3 * own.abs().max():
        raise LensError(
            f"{model.info.class_name} does more to its logits than capture knows, so their loss cannot "
            f"be computed in pieces; use fewer than {_CHUNK // (model.info.vocab or 1)} tokens"
        )
