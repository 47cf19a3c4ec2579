"""The character vocabulary: one id for each character, and id 0 for the end of a text."""

import collections
from collections.abc import Iterable

END_OF_TEXT = 0  # the only special token; no text can spell it, because it has no character
END = "<|endoftext|>"  # its name, where it needs one
TURN = "\n"  # the character that ends a prompt, before its response
REPLACEMENT = "\ufffd"  # U+FFFD, Unicode's stand-in for an unknown character


class UnknownCharacterError(ValueError):
    """A text contains a character that is not in the vocabulary; the message says which, and where."""


class Tokenizer:
    """Characters to ids and back: ids 1, 2, ... follow the order of `characters`, which must differ.

    With `replacement`, unknown characters are encoded as U+FFFD, which must be one of them, instead of being refused.
    """

    def __init__(self, characters: str, replacement: bool = False):
        if len(set(characters)) < len(characters):
            ((repeated, _),) = collections.Counter(characters).most_common(1)
            raise ValueError(f"characters must differ, but {repeated!a} occurs more than once")
        if replacement and REPLACEMENT not in characters:
            raise ValueError("a vocabulary with replacement needs U+FFFD")
        self.characters, self.replacement = characters, replacement
        self._ids = {c: i for i, c in enumerate(characters, start=END_OF_TEXT + 1)}

    @classmethod
    def from_text(cls, text: str, replacement: bool = False) -> "Tokenizer":
        """The characters of `text` in Unicode order, and U+FFFD if `replacement`."""
        return cls("".join(sorted(set(text) | ({REPLACEMENT} if replacement else set()))), replacement)

    @property
    def vocab_size(self) -> int:
        """Number of ids: one for each character, and one for end-of-text."""
        return len(self.characters) + 1

    def encode(self, text: str, name: str = "the text") -> list[int]:
        """The ids of a text, without end-of-text; an error message calls the text by its name."""
        unknown = self._ids[REPLACEMENT] if self.replacement else None
        ids = [self._ids.get(c, unknown) for c in text]
        if None in ids:
            position = ids.index(None)
            raise UnknownCharacterError(
                f"character {text[position]!a} at position {position} of {name} is not in the vocabulary "
                f"of {len(self.characters)} characters: remove it, or train a new model with --replacement, which "
                "encodes unknown characters as U+FFFD"
            )
        return [i for i in ids if i is not None]

    def replaced(self, texts: Iterable[str]) -> str:
        """How many characters of texts are read as U+FFFD, in words; an empty string if all are known."""
        count = collections.Counter(c for text in texts for c in text)
        unknown, total = sum(n for c, n in count.items() if c not in self._ids), count.total()
        if not (unknown and self.replacement):
            return ""
        warning = "warning: " if unknown > 0.01 * total else ""
        return f"{warning}{unknown} of {total} characters ({unknown / total:.1%}) are unknown and read as U+FFFD"

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; end-of-text adds nothing to it."""
        text = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary, 0 <= id < {self.vocab_size}")
            text.append("" if i == END_OF_TEXT else self.characters[i - 1])
        return "".join(text)


def printable(text: str) -> str:
    """The text on one line, safe to print: characters that cannot be printed are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
