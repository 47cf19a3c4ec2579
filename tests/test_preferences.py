"""Every line of a preference file becomes a row, or a fault that says why it cannot be used."""

import bz2
import gzip
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minidpo import preferences
from minidpo.data.preferences import COMPLETIONS, Fault, Row
from minidpo.tokenizer import Tokenizer

TOKENIZER = Tokenizer("abcdef\n")


def pair(prompt="a", chosen="b", rejected="c", **more):
    return json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected, **more})


def jsonl(tmp_path, *lines, ending="\n"):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + ending.encode() for line in lines))
    return path


def row(prompt, *responses, line=1):
    return Row(line, prompt, responses, "...")


def test_rows_come_with_their_line_numbers(tmp_path):
    """Rows and faults carry the line number of the file. A byte order mark and empty lines are skipped."""
    path = jsonl(tmp_path, b"\xef\xbb\xbf" + pair().encode(), "", "   ", pair("\u00e9\n", "x", "", id=3), pair("d"))
    rows, faults = preferences.read(path)
    assert rows == [Row(1, "a", ("b", "c"), pair()), Row(5, "d", ("b", "c"), pair("d"))]
    assert faults == [Fault(4, "rejected is empty", pair("\u00e9\n", "x", "", id=3))]
    assert preferences.read(jsonl(tmp_path, pair(), pair("d"), ending="\r\n")) == (
        [Row(1, "a", ("b", "c"), pair()), Row(2, "d", ("b", "c"), pair("d"))],
        [],
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", ', r"is not JSON \(Expecting property name .*, column 1[67]\)"),
        ("[" * 100_000, "is JSON that Python cannot read: .* too many digits, or the nest"),
        ('{"prompt": ' + "1" * 5000 + "}", "is JSON that Python cannot read: .* too many digits, or the nest"),
        ("[1, 2]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        (b'{"prompt": "\xff"}', r"is not UTF-8 \(byte 12\): save the file as UTF-8"),
        ('{"prompt": "a", "chosen": "b"}', "rejected is missing"),
        ('{"chosen": "b"}', "prompt, rejected are missing"),
        (pair(chosen=None), "chosen is not a string"),
        (pair(prompt=7), "prompt is not a string"),
        (pair(rejected={"role": "user"}), "rejected is not a string"),
        (pair(chosen=""), "chosen is empty"),
        (pair(rejected=""), "rejected is empty"),
        (pair(chosen="c"), "chosen equals rejected"),
        (pair(chosen="x\ud800"), "chosen contains half a surrogate pair, which is not a character"),
        (" " * 2**20 + pair(), "is longer than 1048576 bytes"),
        (pair()[:-1] + ', "chosen": "x"}', "key 'chosen' occurs twice"),
        ('{"question": "a"}', "prompt, chosen, rejected are missing"),
    ],
)
def test_a_line_that_cannot_be_used_is_a_fault(line, reason, tmp_path):
    """A bad line becomes a fault with its number, its reason and its text; the lines around it are read."""
    rows, faults = preferences.read(jsonl(tmp_path, pair("d"), line, pair("e")))
    assert [row.line for row in rows] == [1, 3]
    assert [fault.line for fault in faults] == [2]
    assert re.match(reason, faults[0].reason), faults[0].reason
    assert faults[0].text


def test_a_line_may_have_a_mebibyte(tmp_path):
    """A line of 2**20 bytes is read, its newline not counted; one more byte is a fault."""
    longest = pair() + " " * (2**20 - len(pair()))
    for ending, fine in (("\n", True), ("\r\n", True), ("", True), (" \n", False)):
        rows, faults = preferences.read(jsonl(tmp_path, longest, ending=ending))
        assert (len(rows), len(faults)) == ((1, 0) if fine else (0, 1))


def test_the_last_line_needs_no_newline_and_may_be_too_long(tmp_path):
    """The end of the file ends a line, whether the line is complete or too long."""
    assert len(preferences.read(jsonl(tmp_path, pair(), ending=""))[0]) == 1
    rows, faults = preferences.read(jsonl(tmp_path, pair(), "\n" + "x" * (3 * 2**20), ending=""))
    assert len(rows) == 1 and faults[0].reason.startswith("is longer") and len(faults[0].text) < 200


def test_repeats_and_conflicts(tmp_path):
    """The first of equal rows is used, and neither of two that contradict each other. Rows are compared as ids, so
    characters that the vocabulary replaces are equal.
    """
    path = jsonl(
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
    """A device is refused: it may have no end. So is a pipe, which cannot be read a second time."""
    for function in (preferences.read, preferences.fields_of):
        with pytest.raises(ValueError, match="/dev/zero is not a regular file"):
            function(Path("/dev/zero"))


ROWS_AS_TEXT = f"{pair()}\n{pair('d')}\n"


@pytest.mark.parametrize(
    ("content", "kind", "remedy"),
    [
        (
            f"[\n{pair()},\n{pair('d')}\n]\n".encode(),
            "is a JSON array",
            "minidpo data convert ",
        ),
        (f"\ufeff[{pair()}, {pair('d')}]".encode(), "is a JSON array", "JSON Lines"),
        (("prompt,chosen,rejected\n" + "a,b,c\n" * 20_000).encode(), "is CSV", "read_csv"),
        (b"prompt\tchosen\trejected\na\tb\tc\n", "is CSV", "JSON Lines"),
        (ROWS_AS_TEXT.replace("\n", "\r").encode(), "carriage returns alone", "tr "),
        (json.dumps(json.loads(pair()), indent=2).encode(), "over several lines", "jq -c"),
        (ROWS_AS_TEXT.encode("utf-16"), "is text in UTF-16", "save it as UTF-8"),
        (ROWS_AS_TEXT.encode("utf-16-be"), "is binary, or text in UTF-16", "save it as UTF-8"),
        (ROWS_AS_TEXT.encode("utf-32-le"), "is binary, or text in UTF-16 or UTF-32", "save it as UTF-8"),
        (gzip.compress(ROWS_AS_TEXT.encode(), mtime=0), "is compressed with gzip", "gunzip"),
        (bz2.compress(ROWS_AS_TEXT.encode()), "is compressed with bzip2", "bunzip2"),
        (lzma.compress(ROWS_AS_TEXT.encode()), "is compressed with xz", "unxz"),
        (b"\x28\xb5\x2f\xfd....", "is compressed with zstd", "unzstd"),
        (b"PK\x03\x04....", "is a ZIP archive", "unzip"),
        (b"PAR1....PAR1", "is Parquet", "read_parquet"),
        (b"ARROW1\0\0....", "is Arrow", "read_feather"),
    ],
)
def test_another_format_is_refused_once_by_name(content, kind, remedy, tmp_path):
    """A file that is not JSON Lines is refused whole, in one sentence with its format and the remedy."""
    path = tmp_path / "pairs"
    path.write_bytes(content)
    for fields in (preferences.PAIRS, COMPLETIONS):
        with pytest.raises(ValueError, match=f"{kind}.*{re.escape(remedy)}") as caught:
            preferences.read(path, fields)
        assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 3 * len(str(path)) + 200
    if "UTF" in kind or "compressed" in kind:  # which a plain text may be too
        with pytest.raises(ValueError, match=kind):
            preferences.read_texts(path, blocks=False)


def test_a_text_is_known_by_the_line_that_it_begins_on(tmp_path):
    """Lines and blocks of a text file are numbered by their first line, whatever is empty between them."""
    path = tmp_path / "texts"
    path.write_bytes(b"\n\na\r\nb\n\n\n\nc\n")
    assert preferences.read_texts(path, blocks=False) == {3: "a", 4: "b", 8: "c"}
    assert preferences.read_texts(path, blocks=True) == {3: "a\nb", 8: "c"}


def test_a_pipe_is_not_waited_for(tmp_path):
    """A pipe in place of a file of pairs is refused at once, though nobody writes into it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        preferences.read(tmp_path / "pipe")


def test_a_path_may_be_a_text(tmp_path):
    """A file can be named by a text."""
    path = jsonl(tmp_path, pair())
    assert preferences.read(str(path)) == preferences.read(path)


def test_rows_decide_over_a_strange_beginning(tmp_path):
    """A file of rows is read, whatever its first line is: that line alone is set aside."""
    for line in ("prompt,chosen,rejected", "[1, 2]", "{", "nonsense", "# a comment", "x" * 2**21):
        rows, faults = preferences.read(jsonl(tmp_path, line, pair()))
        assert [row.line for row in rows] == [2] and [fault.line for fault in faults] == [1], line[:20]
    assert preferences.read(jsonl(tmp_path)) == ([], [])


@pytest.mark.parametrize(
    ("line", "name", "hint"),
    [
        (pair(prompt=[{"role": "user", "content": "a"}]), "conversational", "minidpo data convert"),
        (pair(chosen=[{"role": "assistant", "content": "a"}]), "conversational", "makes texts of it"),
        ('{"messages": []}', "conversational", "minidpo data convert"),
        ('{"prompt": "a", "completion": "b", "label": true}', "unpaired-preference", 'as "chosen" and "rejected"'),
        ('{"prompt": "a", "completion": "b"}', "prompt-completion", "`sft` takes it"),
        ('{"question": "a", "chosen": "ab", "rejected": "ac"}', "instruction", 'rename "question" to "prompt"'),
        ('{"instruction": "a", "chosen": "b", "rejected": "c"}', "instruction", 'rename "instruction" to'),
        ('{"chosen": "ab", "rejected": "ac"}', "implicit-prompt", "minidpo data convert"),
        ('{"text": "a"}', "language-modeling", "pass that to `pretrain`"),
    ],
)
def test_other_shapes_are_set_aside_by_name(line, name, hint, tmp_path):
    """A row in another of TRL's shapes is set aside alone; its reason names the shape and says how to convert it."""
    rows, (fault,) = preferences.read(jsonl(tmp_path, pair(), "", line, pair("d")))
    assert [row.line for row in rows] == [1, 4] and fault.line == 3
    assert re.match(f"this is the {name} shape; .*{hint}", fault.reason), fault.reason


@pytest.mark.parametrize("more", [{"messages": []}, {"completion": "x", "label": True}, {"text": "x", "id": [1]}])
def test_columns_that_are_not_asked_for_are_ignored(more, tmp_path):
    """Columns beside good strings change nothing, whatever their names and values."""
    path = jsonl(tmp_path, pair(**more), pair("d", **more))
    rows, faults = preferences.read(path)
    assert [row.responses for row in rows] == [("b", "c")] * 2 and not faults
    assert preferences.fields_of(path) == preferences.PAIRS
    more.pop("completion", None)
    completion = json.dumps({"prompt": "a", "completion": "b", "chosen": [], **more})
    rows, faults = preferences.read(jsonl(tmp_path, completion), COMPLETIONS)
    assert [row.responses for row in rows] == [("b",)] and not faults
    assert preferences.fields_of(jsonl(tmp_path, completion)) == COMPLETIONS


def test_the_shape_of_most_rows_is_the_file_s(tmp_path):
    """A stray row of the other shape at the beginning of a file is the one that is set aside."""
    completion = '{"prompt": "a", "completion": "b"}'
    assert preferences.fields_of(jsonl(tmp_path, completion, pair(), pair("d"))) == preferences.PAIRS
    assert preferences.fields_of(jsonl(tmp_path, pair(), completion, completion)) == COMPLETIONS


def test_a_file_without_a_usable_row_is_refused_with_its_commonest_fault(tmp_path):
    """One sentence says why no row can be used: the reason that most rows have, at its first line."""
    bare = '{"chosen": "ab", "rejected": "ac"}'
    with pytest.raises(ValueError, match=r"line 2: this is the implicit-prompt shape; minidpo data convert"):
        preferences.usable_rows(
            jsonl(tmp_path, '{"prompt": 1}', bare, bare), preferences.PAIRS, TOKENIZER, 8, "none", False
        )


def test_completions_may_repeat(tmp_path):
    """Equal completions are all used, because their frequency is what fine-tuning learns."""
    good = '{"prompt": "a", "completion": "b"}'
    path = jsonl(tmp_path, "nonsense", good, good, '{"prompt": "a"}', '{"prompt": "a", "completion": ""}')
    rows, faults = preferences.read(path, COMPLETIONS)
    assert [row.responses for row in rows] == [("b",), ("b",)]
    assert [f.reason.split(" (")[0] for f in faults] == [
        "is not JSON", "completion is missing", "completion is empty",
    ]  # fmt: skip
    assert len(preferences.encode(rows, TOKENIZER, 8).rows) == 2
    assert preferences.fields_of(path) == COMPLETIONS
    assert preferences.fields_of(jsonl(tmp_path, '{"id": 1}', good)) == COMPLETIONS
    assert preferences.fields_of(jsonl(tmp_path, "", "[]", pair(completion="b"))) == preferences.PAIRS
    assert preferences.fields_of(jsonl(tmp_path, "x")) == preferences.PAIRS


def test_a_prompt_begins_and_a_response_ends_with_end_of_text():
    """End-of-text is before the prompt, as in pre-training, and after each response, so that a model learns to stop."""
    encoded = preferences.encode([row("ab\n", "c", "de")], TOKENIZER, 8)
    assert encoded.ids == [([0, 1, 2, 7], [3, 0], [4, 5, 0])] and not encoded.faults and not encoded.truncated


def test_a_row_with_an_unknown_character_is_a_fault():
    """The reason says which field has it, which character it is, and where."""
    encoded = preferences.encode([row("a", "b", "c"), row("a", "b\u20ac", "c", line=7)], TOKENIZER, 8)
    assert len(encoded.rows) == len(encoded.ids) == 1
    assert encoded.faults[0].line == 7
    assert encoded.faults[0].reason.startswith(
        "character '\\u20ac' at position 1 of the chosen response is not in the vocabulary of 7 characters: remove it"
    )


def test_a_row_that_is_too_long_is_a_fault():
    """The reason names the longer text, its number of tokens and the number that the context allows."""
    fits, too_long = row("aaa", "bbb", "c"), row("aaa", "bbbb", "c", line=2)
    encoded = preferences.encode([fits, too_long, row("aaa", "bbbbb", line=3)], TOKENIZER, 7)
    assert encoded.rows == [fits] and [fault.line for fault in encoded.faults] == [2, 3]
    advice = "but only 8 fit the context: shorten it, choose a truncation, or train a model with a longer context"
    assert encoded.faults[0].reason == f"has 9 tokens with the chosen response, {advice}"
    assert encoded.faults[1].reason == f"has 10 tokens, {advice}"


@given(
    lengths=st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 12)),
    n_positions=st.integers(1, 9),
    truncation=st.sampled_from(["prompt", "response"]),
)
@example(lengths=(3, 3, 1), n_positions=1, truncation="prompt")
@example(lengths=(3, 3, 1), n_positions=1, truncation="response")
@example(lengths=(2, 3, 1), n_positions=6, truncation="prompt")  # fits to the token
def test_truncation_never_empties_a_response(lengths, n_positions, truncation):
    """Truncation cuts the named part first, no more than needed, and keeps a token of each response. A response that
    is cut has no end-of-text; the lines of cut rows are listed.
    """
    prompt, chosen, rejected = ("abcdef" * 2)[: lengths[0]], "b" * lengths[1], "c" * lengths[2]
    encoded = preferences.encode([row(prompt, chosen, rejected)], TOKENIZER, n_positions, truncation)
    full_x = [0, *TOKENIZER.encode(prompt)]
    full = [[*TOKENIZER.encode(y), 0] for y in (chosen, rejected)]
    ((x, *ys),) = encoded.ids
    limit, longest = n_positions + 1, max(map(len, full))
    assert len(x) + max(map(len, ys)) == min(limit, len(full_x) + longest)
    assert encoded.truncated == ([1] if len(full_x) + longest > limit else [])
    assert x[0] == 0 and x[1:] == full_x[len(full_x) - len(x) + 1 :]
    for y, whole in zip(ys, full):
        assert y and y == whole[: len(y)]
    if truncation == "prompt" and longest < limit:
        assert ys == full
    if truncation == "response" and len(full_x) < limit:
        assert x == full_x


def test_responses_that_truncation_makes_equal_are_a_fault():
    """A pair needs two different responses after truncation, not only before it."""
    encoded = preferences.encode([row("a", "bbb", "bbc")], TOKENIZER, 3, "response")
    assert not encoded.rows and encoded.faults[0].reason.startswith("chosen and rejected have the same ids")
    with pytest.raises(ValueError, match="truncation must be one of none, prompt, response, not 'left'"):
        preferences.encode([], TOKENIZER, 3, "left")


def test_truncated_rows_are_rows_that_are_used():
    """Rows that were cut are counted among the rows in use; a cut row that was then set aside is not."""
    rows = [row("aaaaaa", "b", "c"), row("a", "bbbbbb", "bbbbbbc", line=2), row("aaaaaaa", "b", "c", line=3)]
    rows += [row("daaaaaa", "b", "d", line=4), row("eaaaaaa", "d", "b", line=5), row("a", "d", "e", line=6)]
    encoded = preferences.encode(rows, TOKENIZER, 4, "prompt")
    assert [fault.line for fault in encoded.faults] == [2, 3, 4, 5]
    assert [row.line for row in encoded.rows] == [1, 6] and encoded.truncated == [1]


items_with_two_keys = st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda items: len(set(items)) > 1)


@given(items=items_with_two_keys, fraction=st.floats(0, 1), seed=st.integers(0, 9))
def test_no_held_out_key_is_trained_on(items, fraction, seed):
    """The split divides the keys, for pairs the prompts, so that no held-out prompt is in the training data."""
    numbered = list(enumerate(items))
    train, held_out = preferences.split(numbered, fraction, np.random.default_rng(seed), key=lambda item: item[1])
    assert sorted(train + held_out) == numbered and train == sorted(train) and held_out == sorted(held_out)
    keys = {key for _, key in held_out}
    assert not {key for _, key in train} & keys and train and held_out
    assert abs(len(keys) - fraction * len(set(items))) <= 1
    assert preferences.split(items, fraction, np.random.default_rng(seed)) == (
        [k for _, k in train],
        [k for _, k in held_out],
    )


def test_one_key_cannot_be_split():
    """A split needs two keys, one for each side."""
    with pytest.raises(ValueError, match=r"two different prompts or texts .* not 1: add more"):
        preferences.split(["a", "a"], 0.5, np.random.default_rng(0))


def test_strict_refuses_faults_and_the_default_lists_them(tmp_path):
    """Faults become JSON Lines, safe to print; with `strict` the first one is an error that says how many there are."""
    faults = [Fault(3, "is not JSON", "{"), Fault(5, "chosen is empty", "\u001b[31m")]
    lines = preferences.set_aside(tmp_path / "x.jsonl", faults, strict=False).splitlines()
    path = str(tmp_path / "x.jsonl")  # whole, since two files may have one name in two folders
    assert [json.loads(line) for line in lines] == [{"file": path, **fault._asdict()} for fault in faults]
    assert "\x1b" not in "".join(lines)
    with pytest.raises(ValueError, match=r"x\.jsonl, line 3: is not JSON \(2 such rows; without --strict"):
        preferences.set_aside(tmp_path / "x.jsonl", faults, strict=True)
    with pytest.raises(ValueError, match=r"\(1 such row; without"):
        preferences.set_aside(tmp_path / "x.jsonl", faults[:1], strict=True)
    assert preferences.set_aside(tmp_path / "x.jsonl", [], strict=True) == ""


def test_collate_takes_pairs_of_any_lengths():
    """A batch holds each pair as lists of ids, whatever sequences it came in, and the reference's log-probabilities."""
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
        ([([0], [1], [2])], (np.zeros(2), np.zeros(2)), r"must be \(1,\), one entry per pair"),
        ([([0], [1], [2])], (np.zeros(1), None), "one entry per pair, or both None"),
        ([([0], [1], [2])], (None, np.zeros(1)), "one entry per pair, or both None"),
    ],
)
def test_collate_refuses(pairs, reference, sentence):
    """A batch needs three parts with a token in each, and none or two reference log-probabilities for each pair."""
    with pytest.raises(ValueError, match=sentence):
        preferences.collate(pairs, *reference)


def test_remarks_about_usable_rows(tmp_path):
    """Rows that are used but look odd are counted: no final newline, a repeated prompt, replaced characters."""
    rows = [pair("ab\n", "cd", "d"), pair("ab", "c", "d"), pair("abc\n", "abc\nd", "d"), pair("\n", "c", "de")]
    rows += [pair("de\n", "f", "de")]  # as it should be: repeating it is not preferred
    path = jsonl(tmp_path, *rows)
    remarks = preferences.usable_rows(path, preferences.PAIRS, TOKENIZER, 20, "none", False).remarks
    assert remarks == [
        f"{path}: 1 of 5 rows have a prompt without a final newline, so that the response continues its last line "
        "(first: line 2)",
        f"{path}: 1 of 5 rows have a chosen response or completion that repeats the prompt, so that the model "
        "learns to say it again (first: line 3)",
    ]
    path = jsonl(tmp_path, rows[0], rows[3])
    assert not preferences.usable_rows(path, preferences.PAIRS, TOKENIZER, 20, "none", False).remarks
    tokenizer = Tokenizer.from_text("abc\n", replacement=True)
    (remark,) = preferences.usable_rows(path, preferences.PAIRS, tokenizer, 20, "none", False).remarks
    assert remark == f"{path}: warning: 4 of 10 characters (40.0%) are unknown and read as U+FFFD"
