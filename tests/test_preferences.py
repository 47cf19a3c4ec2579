"""Preference data: every line that cannot be used is named with its reason, and none is lost."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minidpo import preferences
from minidpo.data.preferences import COMPLETIONS, Fault, Row, ShapeError
from minidpo.tokenizer import Tokenizer

TOKENIZER = Tokenizer("abcdef\n")


def pair(prompt="a", chosen="b", rejected="c", **more):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


def written(tmp_path, *lines, ending="\n"):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + ending.encode() for line in lines))
    return path


def row(prompt, *responses, line=1):
    return Row(line, prompt, responses, "...")


def test_rows_come_with_their_lines(tmp_path):
    """Otherwise a reader cannot find in the file what a report speaks of. A BOM and empty lines are no rows."""
    path = written(tmp_path, b"\xef\xbb\xbf" + pair().encode(), "", "   ", pair("\u00e9\n", "x", "", id=3), pair("d"))
    rows, faults = preferences.read(path)
    assert rows == [Row(1, "a", ("b", "c"), pair()), Row(5, "d", ("b", "c"), pair("d"))]
    assert faults == [Fault(4, "rejected is empty", pair("\u00e9\n", "x", "", id=3))]
    assert preferences.read(written(tmp_path, pair(), pair("d"), ending="\r\n")) == (
        [Row(1, "a", ("b", "c"), pair()), Row(2, "d", ("b", "c"), pair("d"))],
        [],
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", ', r"is not JSON \(Expecting property name .*, column 1[67]\)"),
        ("[" * 100_000, "is not JSON that can be read"),
        ('{"prompt": ' + "1" * 5000 + "}", "is not JSON that can be read"),
        ("[1, 2]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        (b'{"prompt": "\xff"}', r"is not UTF-8 \(byte 12\)"),
        ('{"prompt": "a", "chosen": "b"}', "rejected is missing"),
        ('{"chosen": "b", "rejected": "c"}', "prompt is missing"),
        (pair(chosen=None), "chosen is not a string"),
        (pair(prompt=7), "prompt is not a string"),
        (pair(rejected={"role": "user"}), "rejected is not a string"),
        (pair(chosen=""), "chosen is empty"),
        (pair(rejected=""), "rejected is empty"),
        (pair(chosen="c"), "chosen equals rejected"),
        (pair(chosen="x\ud800"), "chosen holds half a surrogate pair, which is no character"),
        (" " * 2**20 + pair(), "is longer than 1048576 bytes"),
        (pair()[:-1] + ', "chosen": "x"}', "'chosen' is there twice"),
        ('{"question": "a"}', "prompt, chosen, rejected are missing"),
    ],
)
def test_what_cannot_be_used_is_named(line, reason, tmp_path):
    """Otherwise a broken row is trained on, or stops a run that could do without it, or vanishes."""
    rows, faults = preferences.read(written(tmp_path, pair("d"), line, pair("e")))
    assert [row.line for row in rows] == [1, 3]
    assert [fault.line for fault in faults] == [2]
    assert re.match(reason, faults[0].reason), faults[0].reason
    assert faults[0].text


def test_the_longest_line_that_is_read(tmp_path):
    """Its newline does not count: otherwise the number in the sentence is false by one."""
    longest = pair() + " " * (2**20 - len(pair()))
    for ending, fine in (("\n", True), ("\r\n", True), ("", True), (" \n", False)):
        rows, faults = preferences.read(written(tmp_path, longest, ending=ending))
        assert (len(rows), len(faults)) == ((1, 0) if fine else (0, 1))


def test_the_last_line_needs_no_newline_and_may_be_too_long(tmp_path):
    """Otherwise the end of a file is lost, or read forever."""
    assert len(preferences.read(written(tmp_path, pair(), ending=""))[0]) == 1
    rows, faults = preferences.read(written(tmp_path, pair(), "\n" + "x" * (3 * 2**20), ending=""))
    assert len(rows) == 1 and faults[0].reason.startswith("is longer") and len(faults[0].text) < 200


def test_repeats_and_conflicts(tmp_path):
    """The first of equal rows stands; of two that contradict each other neither can be believed. As ids: what the
    vocabulary makes equal is equal.
    """
    path = written(
        tmp_path, pair(), pair(), pair("d", "b", "c"), pair("d", "c", "b"), pair("e"), pair("d", "b", "a"), pair("d")
    )
    rows, faults = preferences.read(path)
    encoded = preferences.encode(rows, TOKENIZER, 8)
    assert len(rows) == 7 and not faults and [row.line for row in encoded.rows] == [1, 5, 6]
    assert encoded.ids == [tuple(ids) for ids in encoded.ids] and encoded.ids[0] == ([0, 1], [2, 0], [3, 0])
    assert [(fault.line, fault.reason) for fault in encoded.faults] == [
        (2, "repeats line 1"),
        (3, "conflicts with line 4, which prefers the other response"),
        (4, "conflicts with line 3, which prefers the other response"),
        (7, "repeats line 3"),
    ]
    rows = [row("x", "a", "b"), row("y", "a", "b", line=2), row("z", "b", "a", line=3)]
    replaced = preferences.encode(rows, Tokenizer.from_text("ab", replacement=True), 8)
    assert not replaced.rows and [fault.line for fault in replaced.faults] == [1, 2, 3]


def test_only_regular_files_are_read(tmp_path):
    """Otherwise a pipe is empty the second time, and its hash is that of nothing; /dev/zero has no end."""
    for function in (preferences.read, preferences.fields_of):
        with pytest.raises(ValueError, match="/dev/zero: is no regular file"):
            function(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        (pair(prompt=[{"role": "user", "content": "a"}]), "conversational", "apply the chat template"),
        (pair(chosen=[{"role": "assistant", "content": "a"}]), "conversational", "every field is a string"),
        ('{"messages": []}', "conversational", "apply"),
        ('{"prompt": "a", "completion": "b", "label": true}', "unpaired-preference", 'as "chosen" and "rejected"'),
        ('{"prompt": "a", "completion": "b"}', "prompt-completion", "`sft` takes it"),
        ('{"text": "a"}', "language-modeling", "use it for pretrain"),
    ],
)
def test_other_shapes_are_refused_by_name(line, name, hint, tmp_path):
    """Otherwise a whole file is set aside row by row, and nobody is told that one step is missing."""
    with pytest.raises(ShapeError, match=f"line 3: this is the {name} shape; .*{hint}"):
        preferences.read(written(tmp_path, pair(), "", line))


def test_the_implicit_prompt_shape_is_refused_by_name(tmp_path):
    """Where no row has a prompt, the file is of that shape; where one lacks it, the row is."""
    bare = '{"chosen": "ab", "rejected": "ac"}'
    with pytest.raises(
        ShapeError, match=r'line 2: no row has a prompt, this is the implicit-prompt shape; move .* "prompt"'
    ):
        preferences.read(written(tmp_path, "nonsense", bare, bare))
    rows, faults = preferences.read(written(tmp_path, bare, pair()))
    assert len(rows) == 1 and faults[0].reason == "prompt is missing"


def test_completions(tmp_path):
    """They may repeat, which says how often they are right: otherwise fine-tuning learns another distribution."""
    good = '{"prompt": "a", "completion": "b"}'
    path = written(tmp_path, "nonsense", good, good, '{"prompt": "a"}', '{"prompt": "a", "completion": ""}')
    rows, faults = preferences.read(path, COMPLETIONS)
    assert [row.responses for row in rows] == [("b",), ("b",)]
    assert [f.reason.split(" (")[0] for f in faults] == [
        "is not JSON", "completion is missing", "completion is empty",
    ]  # fmt: skip
    assert len(preferences.encode(rows, TOKENIZER, 8).rows) == 2
    assert preferences.fields_of(path) == COMPLETIONS
    assert preferences.fields_of(written(tmp_path, '{"id": 1}', good)) == COMPLETIONS
    assert preferences.fields_of(written(tmp_path, "", "[]", pair(completion="b"))) == preferences.PAIRS
    assert preferences.fields_of(written(tmp_path, "x")) == preferences.PAIRS


def test_a_prompt_begins_and_a_response_ends_with_end_of_text():
    """Otherwise the model never learns to stop, or begins unlike it was pre-trained."""
    encoded = preferences.encode([row("ab\n", "c", "de")], TOKENIZER, 8)
    assert encoded.ids == [([0, 1, 2, 7], [3, 0], [4, 5, 0])] and not encoded.faults and not encoded.truncated


def test_unknown_characters_are_named():
    """Otherwise a row disappears, or is scored with another character in it."""
    encoded = preferences.encode([row("a", "b", "c"), row("a", "b\u20ac", "c", line=7)], TOKENIZER, 8)
    assert len(encoded.rows) == len(encoded.ids) == 1
    assert encoded.faults[0].line == 7 and "character '\\u20ac' at position 1" in encoded.faults[0].reason


def test_a_row_that_is_too_long_is_a_fault():
    """Both numbers: otherwise nobody knows how much longer the context would have to be."""
    fits, too_long = row("aaa", "bbb", "c"), row("aaa", "bbbb", "c", line=2)
    encoded = preferences.encode([fits, too_long], TOKENIZER, 7)
    assert encoded.rows == [fits]
    assert encoded.faults[0][:2] == (2, "has 9 tokens, 8 fit: choose a truncation, or a longer context")


@given(
    lengths=st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 12)),
    n_positions=st.integers(1, 9),
    truncation=st.sampled_from(["prompt", "response"]),
)
@example(lengths=(3, 3, 1), n_positions=1, truncation="prompt")
@example(lengths=(3, 3, 1), n_positions=1, truncation="response")
@example(lengths=(2, 3, 1), n_positions=6, truncation="prompt")  # fits to the token
def test_truncation_never_empties_a_response(lengths, n_positions, truncation):
    """It cuts what it says, no more than it must, and counts; a response that was cut has no end-of-text."""
    prompt, chosen, rejected = ("abcdef" * 2)[: lengths[0]], "b" * lengths[1], "c" * lengths[2]
    encoded = preferences.encode([row(prompt, chosen, rejected)], TOKENIZER, n_positions, truncation)
    full_x = [0, *TOKENIZER.encode(prompt)]
    full = [[*TOKENIZER.encode(y), 0] for y in (chosen, rejected)]
    ((x, *ys),) = encoded.ids
    most, longest = n_positions + 1, max(map(len, full))
    assert len(x) + max(map(len, ys)) == min(most, len(full_x) + longest)
    assert encoded.truncated == ([1] if len(full_x) + longest > most else [])
    assert x[0] == 0 and x[1:] == full_x[len(full_x) - len(x) + 1 :]
    for y, whole in zip(ys, full):
        assert y and y == whole[: len(y)]
    if truncation == "prompt" and longest < most:
        assert ys == full
    if truncation == "response" and len(full_x) < most:
        assert x == full_x


def test_what_becomes_equal_by_truncation_is_set_aside():
    """Otherwise a pair of one and the same text counts as a tie."""
    encoded = preferences.encode([row("a", "bbb", "bbc")], TOKENIZER, 3, "response")
    assert not encoded.rows and encoded.faults[0].reason == "chosen equals rejected, as ids"
    with pytest.raises(ValueError, match="truncation must be one of none, prompt, response, not 'left'"):
        preferences.encode([], TOKENIZER, 3, "left")


several = st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda items: len(set(items)) > 1)


@given(items=several, share=st.floats(0, 1), seed=st.integers(0, 9))
def test_what_is_held_out_is_never_trained_on(items, share, seed):
    """By key, which for pairs is the prompt: otherwise a prompt is learnt by heart and then asked for."""
    numbered = list(enumerate(items))
    train, held_out = preferences.split(numbered, share, np.random.default_rng(seed), key=lambda item: item[1])
    assert sorted(train + held_out) == numbered and train == sorted(train) and held_out == sorted(held_out)
    keys = {key for _, key in held_out}
    assert not {key for _, key in train} & keys and train and held_out
    assert abs(len(keys) - share * len(set(items))) <= 1
    assert preferences.split(items, share, np.random.default_rng(seed)) == (
        [k for _, k in train],
        [k for _, k in held_out],
    )


def test_one_key_cannot_be_split():
    """Otherwise the held-out loss is that of nothing."""
    with pytest.raises(ValueError, match="two different prompts or lines"):
        preferences.split(["a", "a"], 0.5, np.random.default_rng(0))


def test_strict_refuses_and_the_default_keeps(tmp_path):
    """Otherwise "strict" is a word, or what was set aside is gone."""
    faults = [Fault(3, "is not JSON", "{"), Fault(5, "chosen is empty", "\u001b[31m")]
    lines = preferences.set_aside(tmp_path / "x.jsonl", faults, strict=False).splitlines()
    assert [json.loads(line) for line in lines] == [{"file": "x.jsonl", **fault._asdict()} for fault in faults]
    assert "\x1b" not in "".join(lines)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: is not JSON \(2 such rows; without --strict"):
        preferences.set_aside(tmp_path / "x.jsonl", faults, strict=True)
    assert preferences.set_aside(tmp_path / "x.jsonl", [], strict=True) == ""


def test_collate():
    """Ragged pairs, arrays or lists: otherwise a batch is what its first row is."""
    batch = preferences.collate([(np.array([0, 1]), [2], (3, 0)), ([0], [1, 2, 0], [0])])
    assert batch.pairs == [([0, 1], [2], [3, 0]), ([0], [1, 2, 0], [0])] and batch.ref_logp_w is None
    with_reference = preferences.collate(batch.pairs, np.zeros(2), np.ones(2))
    assert with_reference.ref_logp_l.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("pairs", "reference", "sentence"),
    [
        ([], (), "nothing to score"),
        ([([0], [], [1])], (), "example 0: the chosen has no token"),
        ([([0], [1])], (), "a pair is"),
        ([([0], [1], [2])], (np.zeros(2), np.zeros(2)), "1 pairs need as many"),
        ([([0], [1], [2])], (np.zeros(1), None), "twice or not at all"),
        ([([0], [1], [2])], (None, np.zeros(1)), "twice or not at all"),
    ],
)
def test_collate_refuses(pairs, reference, sentence):
    """Otherwise a reference of other pairs is broadcast over these."""
    with pytest.raises(ValueError, match=sentence):
        preferences.collate(pairs, *reference)
