"""Characters become ids, and ids become the same characters again."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo.tokenizer import END_OF_TEXT, REPLACEMENT, Tokenizer, UnknownCharacterError

texts = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates and controls too


@given(text=texts, more=texts)
def test_round_trip(text, more):
    """Decoding the ids of a text gives the text; ids are positive, one for each character."""
    tokenizer = Tokenizer.from_text(text + more)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)
    assert all(0 < i < tokenizer.vocab_size for i in ids)
    assert tokenizer.vocab_size == len(set(text + more)) + 1
    assert tokenizer.characters == "".join(sorted(tokenizer.characters))  # not in the order of a set


@given(text=texts)
def test_no_text_spells_end_of_text(text):
    """Only the model can end a text: no character has the id of end-of-text."""
    assert END_OF_TEXT not in Tokenizer.from_text(text).encode(text)
    assert Tokenizer.from_text(text).decode([END_OF_TEXT]) == ""


@given(known=texts.filter(bool), unknown=st.characters())
def test_an_unknown_character_is_named(known, unknown):
    """The message says which character is unknown, and where it is in the text."""
    tokenizer = Tokenizer.from_text(known + "\n")
    if unknown in tokenizer.characters:
        return
    text = f"{known}\n{unknown}"
    where = f"character {unknown!a} at position {len(known) + 1}"
    with pytest.raises(UnknownCharacterError, match=re.escape(f"{where} of the text is not in the vocabulary")):
        tokenizer.encode(text)


def test_replacement_is_a_choice():
    """Unknown characters become U+FFFD if the vocabulary has it, and are refused if it does not."""
    tokenizer = Tokenizer.from_text("ab", replacement=True)
    assert tokenizer.decode(tokenizer.encode("axb\ufffd")) == f"a{REPLACEMENT}b{REPLACEMENT}"
    with pytest.raises(UnknownCharacterError):
        Tokenizer.from_text("ab").encode("x")


def test_replacement_needs_its_character():
    """U+FFFD is a character of a vocabulary that reads unknown characters as it; characters differ."""
    with pytest.raises(UnknownCharacterError):
        Tokenizer.from_text("ab\ufffd").encode("x")
    with pytest.raises(ValueError, match=r"needs U\+FFFD"):
        Tokenizer("ab", replacement=True)
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        Tokenizer("aba")


def test_replaced_characters_are_counted():
    """The sentence has the count and the share, and warns above 1 %."""
    tokenizer = Tokenizer.from_text("ab", replacement=True)
    assert tokenizer.replaced(["ab" * 49, "xa"]) == "1 of 100 characters (1.0%) are unknown and read as U+FFFD"
    assert tokenizer.replaced(iter(["ab" * 49, "xy"])).startswith("warning: 2 of 100 characters (2.0%)")
    assert tokenizer.replaced(["ab\ufffd", ""]) == tokenizer.replaced([]) == Tokenizer("a").replaced("b") == ""


@pytest.mark.parametrize("bad", [-1, 3, 99])
def test_an_id_outside_is_refused(bad):
    """Only ids of the vocabulary are decoded; -1 is not the last character."""
    with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary, 0 <= id < 3"):
        Tokenizer("ab").decode([1, bad])
