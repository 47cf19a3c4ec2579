"""The character vocabulary: one id for each character, and id 0 for the end of a text."""

import collections
import json
from collections.abc import Iterable

END_OF_TEXT = 0  # the id of the one special token; no text can spell it, because it has no character
TURN = "\n"  # the character that ends a prompt, before its response
REPLACEMENT = "\ufffd"  # Unicode's own character for one that is not known


class UnknownCharacterError(ValueError):
    """A text holds a character that the vocabulary lacks; the message says which, and where."""


class Tokenizer:
    """Characters to ids and back; ids 1, 2, ... follow the order of `characters`.

    Parameters
    ----------
    characters : str
        The vocabulary, each character once. If U+FFFD is among them it stands for every character that
        is not: unknown characters are then replaced and not refused.

    Raises
    ------
    ValueError
        If a character stands there twice.
    """

    def __init__(self, characters: str):
        if len(set(characters)) < len(characters):
            ((repeated, _),) = collections.Counter(characters).most_common(1)
            raise ValueError(f"characters must differ, but {repeated!a} is there more than once")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters, start=END_OF_TEXT + 1)}

    @classmethod
    def from_text(cls, text: str, replacement: bool = False) -> "Tokenizer":
        """The vocabulary of all characters in `text`, in Unicode order; with U+FFFD if `replacement`."""
        return cls("".join(sorted(set(text) | ({REPLACEMENT} if replacement else set()))))

    @property
    def vocab_size(self) -> int:
        """Number of ids: the characters and end-of-text."""
        return len(self.characters) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without end-of-text.

        Raises
        ------
        UnknownCharacterError
            If a character is not in the vocabulary. The message names it and its position, counted from 0.
        """
        unknown = self._ids.get(REPLACEMENT)
        ids = [self._ids.get(c, unknown) for c in text]
        if None in ids:
            position = ids.index(None)
            raise UnknownCharacterError(
                f"character {text[position]!a} at position {position} is not in the vocabulary of "
                f"{len(self.characters)} characters: remove it, or let the vocabulary have U+FFFD for such "
                "(--replacement, when a model is first trained)"
            )
        return [i for i in ids if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text is no part of it.

        Raises
        ------
        ValueError
            If an id is not in the vocabulary.
        """
        text = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary, 0 <= id < {self.vocab_size}")
            text.append("" if i == END_OF_TEXT else self.characters[i - 1])
        return "".join(text)

    def to_json(self) -> str:
        """The vocabulary as JSON, in ASCII."""
        return json.dumps({"type": "characters", "characters": self.characters})

    @classmethod
    def from_json(cls, document: str) -> "Tokenizer":
        """The vocabulary that `to_json` wrote.

        Raises
        ------
        ValueError
            If the document is not such a vocabulary.
        """
        try:
            content = json.loads(document)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a tokenizer must be JSON ({error})") from error
        if not (isinstance(content, dict) and content.get("type") == "characters"):
            raise ValueError('a tokenizer must be a JSON object of "type": "characters"')
        if not isinstance(content.get("characters"), str):
            raise ValueError('a tokenizer\'s "characters" must be a string')
        return cls(content["characters"])


def printable(text: str) -> str:
    """The text on one line, safe to print: characters that are not printable are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
