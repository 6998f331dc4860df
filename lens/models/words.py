"""Tokenizers of small vocabularies: words between spaces, the begin-of-text word put first."""

from collections.abc import Sequence
from typing import Any

from lens.common.errors import LensError

_SYMBOLS = 64


class WordTokenizer:
    """Words and their ids; it has the few members of a transformers tokenizer that the project and TransformerLens' capture need.

    Args:
        words: the vocabulary, in the order of the ids.
        bos: the word that begins a text.

    Example:
        >>> WordTokenizer(["a", "b", "BOS"], "BOS")("b a")["input_ids"]
        [2, 1, 0]
    """

    def __init__(self, words: Sequence[str], bos: str) -> None:
        self._words = tuple(words)
        self._ids = {word: index for index, word in enumerate(words)}
        self.bos_token = bos
        self.bos_token_id = self._ids[bos]
        self.vocab_size = len(words)
        self.all_special_ids = (self.bos_token_id,)

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        """Ids of the words in `text`, BOS first.

        Raises:
            LensError: an unknown word.
        """
        return {"input_ids": [self.bos_token_id, *map(self.id, text.split())]}

    def id(self, word: str) -> int:
        """Id of a word.

        Raises:
            LensError: an unknown word.
        """
        if word not in self._ids:
            raise LensError(f"the vocabulary is {' '.join(self._words)}; got {word!r}")
        return self._ids[word]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Words of the ids."""
        return [self._words[index] for index in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Words separated by spaces."""
        return " ".join(tokens)

    def decode(self, ids: Any) -> str:
        """Words of one id or of several."""
        return self.convert_tokens_to_string(
            self.convert_ids_to_tokens([ids] if isinstance(ids, int) else list(map(int, ids)))
        )


class SymbolTokenizer(WordTokenizer):
    """That of `induction-2l`: symbols `s0` to `s63` have the ids 0 to 63; BOS is 64.

    Example:
        >>> SymbolTokenizer()("s3 s5")["input_ids"]
        [64, 3, 5]
    """

    def __init__(self) -> None:
        super().__init__([*(f"s{number}" for number in range(_SYMBOLS)), "BOS"], "BOS")

    def id(self, word: str) -> int:
        """See `WordTokenizer`; a text has no BOS of its own."""
        if word not in self._ids or word == self.bos_token:
            raise LensError(
                f"induction-2l reads symbols s0 to s{_SYMBOLS - 1}, got {word!r}; e.g. 's3 s14 s15'"
            )
        return self._ids[word]
