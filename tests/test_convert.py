"""Rows in TRL's other shapes become rows of texts, or are named with the reason."""

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import cli, preferences
from minidpo.data.convert import convert, standard


def said(role, content):
    return {"role": role, "content": content}


ASKED = [said("system", "be kind."), said("user", "late?")]
W, L = [said("assistant", "sorry!")], [said("assistant", "so what?")]
STANDARD = {"prompt": "a\n", "chosen": "b", "rejected": "c"}
TEXTS = {"prompt": "system: be kind.\nuser: late?\n", "chosen": "sorry!", "rejected": "so what?"}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        (STANDARD, STANDARD),
        ({"id": 3, **STANDARD, "label": 1}, STANDARD),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        ({"prompt": ASKED, "chosen": W, "rejected": L}, TEXTS),
        ({"chosen": ASKED + W, "rejected": ASKED + L}, TEXTS),
        ({"prompt": ASKED, "completion": W}, {"prompt": TEXTS["prompt"], "completion": "sorry!"}),
        ({"messages": ASKED + W}, {"prompt": TEXTS["prompt"], "completion": "sorry!"}),
        ({"chosen": "x: a b", "rejected": "x: a c"}, {"prompt": "x: a", "chosen": " b", "rejected": " c"}),
        ({"chosen": "x\nab", "rejected": "x\ncd"}, {"prompt": "x\n", "chosen": "ab", "rejected": "cd"}),
    ],
)
def test_each_shape_becomes_the_standard_one(row, texts):
    """Prompts are lines of role and content, responses their content; what a pair has in common is its prompt."""
    assert standard(row) == texts


words = st.text(st.sampled_from("ab \n"), min_size=1, max_size=9)


@given(prompt=words, w=words, l=words)
def test_an_implicit_prompt_is_trl_s(prompt, w, l):
    """A pair that differs has the prompt that TRL's own extract_prompt finds, and nothing of its texts is lost."""
    chosen, rejected = prompt + w, prompt + l
    row = standard({"chosen": chosen, "rejected": rejected})
    assert row["prompt"] + row["chosen"] == chosen and row["prompt"] + row["rejected"] == rejected
    trl = pytest.importorskip("trl", reason="trl is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extract_prompt = trl.extract_prompt
    if not (chosen.startswith(rejected) or rejected.startswith(chosen)) and chosen[0] == rejected[0]:
        assert row == extract_prompt({"chosen": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired-preference shape"),
        ({"prompt": ASKED, "chosen": W + W, "rejected": L}, "chosen has 2 messages; a response is one"),
        ({"chosen": ASKED, "rejected": ASKED}, "chosen has 0 messages; a response is one"),
        ({"prompt": [{"role": "user"}], "chosen": W, "rejected": L}, "prompt is neither a text nor messages"),
        ({"prompt": [3], "chosen": W, "rejected": L}, "prompt is neither a text nor messages"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt is neither a text nor messages"),
        ({"prompt": [said("user", [{"text": "a"}])], "chosen": W, "rejected": L}, "role or content is not a text"),
        ({"chosen": "a", "rejected": W}, "chosen and rejected are neither two texts nor"),
        ({"chosen": "ab", "rejected": "ab"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected"),
        ({"messages": 3}, "prompt, chosen, rejected are missing"),
        ({"text": "a"}, "prompt, chosen, rejected are missing"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, row, reason):
    """A row that has no prompt and responses is set aside with its line and its reason; the others are converted."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, (STANDARD, row, STANDARD))))
    rows, (fault,) = convert(path)
    assert rows == [STANDARD] * 2 and fault.line == 2
    assert reason in fault.reason


@pytest.mark.parametrize("array", [False, True])
def test_the_command_writes_lines_that_the_others_read(tmp_path, capsys, array):
    """`minidpo data convert` reads JSON Lines and JSON arrays, and `dpo` takes every row of what it writes."""
    rows = [{"chosen": ASKED + W, "rejected": ASKED + L}, 3, {"prompt": "\u00e9\n", "chosen": "b", "rejected": "c"}]
    path, out = tmp_path / "rows.json", tmp_path / "new.jsonl"
    path.write_text(json.dumps(rows, indent=1) if array else "".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["data", "convert", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: 2 rows, 1 set aside\n" and "line 2: set aside, is not a JSON object" in printed.err
    read, faults = preferences.read(out)
    assert [(row.prompt, *row.responses) for row in read] == [tuple(TEXTS.values()), ("\u00e9\n", "b", "c")]
    assert not faults
    assert (
        cli.main(["data", "convert", str(path), "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('[{"a": 1},', "is a JSON array that cannot be read"),
        ('[{"a": 1, "a": 2}]', "is a JSON array that cannot be read"),
        ("[{" + '"a":[' * 10_000, "is a JSON array that cannot be read"),
        ('[{"a": 1}]', "no row can be converted"),
        ("a,b\nc,d\n", "is CSV, another table or plain text: pandas.read_csv('"),
    ],
)
def test_a_file_without_rows_is_refused(tmp_path, capsys, content, sentence):
    """One sentence, and no file is written."""
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert cli.main(["data", "convert", str(path), "--out", str(tmp_path / "new")]) == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_an_array_is_bounded(tmp_path, monkeypatch):
    """A huge array is refused before it is parsed."""
    monkeypatch.setattr(preferences, "MOST_BYTES", 10)
    (tmp_path / "rows.json").write_text(json.dumps([STANDARD]))
    with pytest.raises(ValueError, match="longer than 10 bytes: jq"):
        convert(tmp_path / "rows.json")


@pytest.mark.parametrize("words", [["convert"], ["example", "x", "--out=y"], ["convert", "x"], ["example", "--out=y"]])
def test_the_two_uses_of_data_are_not_mixed(words, capsys):
    """`data example` takes no file, `data convert` one to read and one to write."""
    assert cli.main(["data", *words]) == 2 and "it is `data example`, or `data convert FILE" in capsys.readouterr().err
