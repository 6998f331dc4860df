"""The tokenizer of `induction-2l`: 64 symbols and a BOS, read and written as words `s0 s1 ... s63`."""

from collections.abc import Sequence
from typing import Any

from lens.common.errors import LensError

SYMBOLS = 64


class SymbolTokenizer:
    """Symbols `s0` to `s63` have the ids 0 to 63; BOS is 64 and is put first.

    It has the few members of a transformers tokenizer that the project and TransformerLens' capture need.

    Example:
        >>> SymbolTokenizer()("s3 s5")["input_ids"]
        [64, 3, 5]
    """

    bos_token = "BOS"
    bos_token_id = SYMBOLS
    vocab_size = SYMBOLS + 1
    all_special_ids = (SYMBOLS,)

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        """Ids of the symbols in `text`, BOS first.

        Raises:
            LensError: a word that is no symbol.
        """
        return {"input_ids": [self.bos_token_id, *map(self._id, text.split())]}

    @staticmethod
    def _id(word: str) -> int:
        number = word[1:]
        if word[:1] == "s" and number.isascii() and number.isdigit() and int(number) < SYMBOLS:
            return int(number)
        raise LensError(
            f"induction-2l reads symbols s0 to s{SYMBOLS - 1}, got {word!r}; e.g. 's3 s14 s15'"
        )

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Symbols of the ids."""
        return [self.bos_token if index == self.bos_token_id else f"s{index}" for index in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Symbols separated by spaces."""
        return " ".join(tokens)

    def decode(self, ids: Any) -> str:
        """Symbols of one id or of several."""
        return self.convert_tokens_to_string(
            self.convert_ids_to_tokens([ids] if isinstance(ids, int) else list(map(int, ids)))
        )
