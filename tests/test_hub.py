"""Hugging Face's files: ours have their format, theirs are read as our model, and what is not is refused."""

import json
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import checkpoint, cli, model, scoring
from minidpo.cli import parser
from minidpo.generation import generate
from minidpo.model import Config
from minidpo.run import hub, safetensors
from minidpo.run.checkpoint import CheckpointError
from minidpo.run.reference import reference_key
from minidpo.tokenizer import Tokenizer
from models import CONFIG, small

TOKENIZER = Tokenizer("abcd")
texts = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates and controls too


@pytest.fixture
def saved(tmp_path):
    checkpoint.save(tmp_path / "saved", small(), CONFIG, TOKENIZER)
    return tmp_path / "saved"


def rewritten(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def foreign(folder):
    """Rewrite the weights without checksums, as others do; returns the arrays."""
    arrays, _, _ = safetensors.read(folder / "model.safetensors")
    write(folder / "model.safetensors", arrays)
    return arrays


def write(path, arrays):
    path.write_bytes(safetensors.to_bytes(arrays, {}).replace(b'sha256"', b'sha999"'))


# ---- tokenizers ---------------------------------------------------------------------------------------------


@given(text=texts, replacement=st.booleans())
def test_a_vocabulary_comes_back(text, replacement):
    """A vocabulary that is written and read again is the same, so a checkpoint's ids keep their meaning."""
    tokenizer = Tokenizer.from_text(text, replacement)
    document = hub.tokenizer_document(tokenizer)
    again, ids = hub.read_tokenizer(document, "x")
    assert document.isascii() and ids == list(range(tokenizer.vocab_size))
    assert (again.characters, again.replacement) == (tokenizer.characters, replacement)


def test_no_character_is_special():
    """End-of-text alone is a special token: U+FFFD as one would vanish on decoding."""
    content = json.loads(hub.tokenizer_document(Tokenizer.from_text("a b\n", replacement=True)))
    assert [(token["id"], token["content"]) for token in content["added_tokens"]] == [(0, "<|endoftext|>")]
    assert content["model"]["unk_token"] == "\ufffd" in content["model"]["vocab"]
    content = json.loads(hub.tokenizer_document(Tokenizer("a\ufffd")))
    assert content["model"]["unk_token"] not in content["model"]["vocab"]  # so that unknown characters are refused


@pytest.mark.parametrize(
    ("document", "characters", "replacement"),
    [
        ('{"type": "characters", "characters": "ba"}', "ba", False),
        ('{"type": "characters", "characters": "ab\\ufffd"}', "ab\ufffd", True),  # as it was at first
        ('{"type": "characters", "characters": "ab\\ufffd", "replacement": false}', "ab\ufffd", False),
        ('{"type": "characters", "characters": "ab\\ufffd", "replacement": true}', "ab\ufffd", True),
    ],
)
def test_version_0_1_is_read(document, characters, replacement):
    """The vocabularies of version 0.1, which had a format of their own, keep their ids."""
    tokenizer, ids = hub.read_tokenizer(document, "x")
    assert (tokenizer.characters, tokenizer.replacement) == (characters, replacement)
    assert ids == list(range(tokenizer.vocab_size))


def test_a_folder_of_version_0_1_is_read(saved):
    """A whole folder as version 0.1 left it loads, and the key of its reference's scores is still the same."""
    for name in ("tokenizer_config.json", "generation_config.json"):
        (saved / name).unlink()
    (saved / "tokenizer.json").write_text('{"type": "characters", "characters": "abcd"}')
    foreign(saved)
    loaded = checkpoint.load(saved)
    assert loaded.tokenizer.characters == "abcd" and loaded.config == CONFIG
    pairs = [([0, 1], [2, 0], [3, 3, 0])]
    for tokenizer, key in ((loaded.tokenizer, "1022e204"), (Tokenizer("abcd\ufffd", True), "04f460ff")):
        assert reference_key(loaded.params, CONFIG, tokenizer, pairs).startswith(key)  # as version 0.1 computed it


def theirs(vocab, end, **changes):
    """A tokenizer.json of characters, in another order and with other words than ours."""
    content = json.loads(hub.tokenizer_document(TOKENIZER))
    content["model"]["vocab"] = vocab
    content["added_tokens"][0] |= {"id": vocab[end], "content": end}
    content["post_processor"] = {"single": [{"SpecialToken": {"id": end}}, {"Sequence": {"id": "A"}}]}
    for name, value in changes.items():
        (content["model"] if name in content["model"] else content)[name] = value
    return json.dumps({name: value for name, value in content.items() if value is not ...})


VOCAB = {"c": 0, "a": 1, "<eos>": 2, "d": 3, "b": 4}


def test_an_end_of_text_elsewhere_becomes_ours(saved):
    """A model whose end of text is not id 0 gives every text the same log-probabilities after its ids have moved."""
    before = checkpoint.load(saved)
    foreign(saved)
    (saved / "tokenizer.json").write_text(theirs(VOCAB, "<eos>"))
    rewritten(saved / "config.json", eos_token_id=2, bos_token_id=2)
    loaded = checkpoint.load(saved)
    assert loaded.config == CONFIG and loaded.tokenizer.characters == "cadb"
    ids = [2, 0, 1, 4, 3]  # in their order: end-of-text, c, a, b, d
    ours = [0, *loaded.tokenizer.encode("cabd")]
    logits = model.forward(before.params, CONFIG, [ids]).data
    again = model.forward(loaded.params, CONFIG, [ours]).data
    np.testing.assert_allclose(again[..., ours], logits[..., ids], rtol=1e-12)
    rewritten(saved / "config.json", eos_token_id=1, bos_token_id=1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: end-of-text is 2, but config\.json has 1"):
        checkpoint.load(saved)


@pytest.mark.parametrize("pattern", [{"String": ""}, {"Regex": "(?m)."}, {"Regex": r"[\s\S]"}])
def test_other_words_for_each_character_are_read(pattern):
    """The patterns that take each character alone, newlines too, are known."""
    document = theirs(VOCAB, "<eos>", pre_tokenizer={**hub.SPLIT, "pattern": pattern})
    assert hub.read_tokenizer(document, "x")[0].characters == "cadb"


TWO = {**VOCAB, "<pad>": 5}


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (theirs(VOCAB, "<eos>", type="BPE"), "its model is 'BPE', not of characters"),
        (theirs(VOCAB, "<eos>", pre_tokenizer=None), "its pre_tokenizer does not take each character alone"),
        (theirs(VOCAB, "<eos>", pre_tokenizer={**hub.SPLIT, "pattern": {"Regex": "."}}), "its pre_tokenizer does"),
        (theirs(VOCAB, "<eos>", pre_tokenizer={**hub.SPLIT, "behavior": "Removed"}), "its pre_tokenizer does not"),
        (theirs(VOCAB, "<eos>", normalizer={"type": "Lowercase"}), "its normalizer changes texts"),
        (theirs(TWO, "<eos>"), r"not all of its tokens but one are single characters \(\['<eos>', '<pad>'\]\)"),
        (theirs({"a": 0, "b": 1}, "a"), r"not all of its tokens but one are single characters \(\['a', 'b'\]\)"),
        (theirs(VOCAB, "<eos>", post_processor=...), "its post_processor does not put '<eos>' in front"),
        (theirs(VOCAB, "<eos>", post_processor={"single": [{"Sequence": {"id": "A"}}]}), "its post_processor does"),
        (theirs(VOCAB, "<eos>", post_processor={"single": [3, {"Sequence": 3}]}), "its post_processor does not"),
        (theirs(VOCAB, "<eos>", unk_token="a"), r"it reads unknown characters as 'a', not as U\+FFFD"),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_out(saved, document, reason):
    """A model whose tokenizer is not ours loads without one, and the warning says what is different."""
    with pytest.raises(hub.Unreadable, match=reason):
        hub.read_tokenizer(document, "x")
    foreign(saved)
    (saved / "tokenizer.json").write_text(document)
    with pytest.warns(UserWarning, match=rf"tokenizer\.json: {reason}.*: loaded without a tokenizer"):
        assert checkpoint.load(saved).tokenizer is None


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ("{", "x: is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"type": "BPE"}', "is not a tokenizer of the library"),
        ('{"model": {"type": "WordLevel"}, "added_tokens": [3]}', "is not a tokenizer of the library"),
        (theirs(VOCAB, "<eos>").replace(json.dumps(VOCAB), "3"), "its vocabulary is not an object"),
        (theirs({**VOCAB, "e": "5"}, "<eos>"), "does not give an id to each token"),
        (theirs({**VOCAB, "e": True}, "<eos>"), "does not give an id to each token"),
        (theirs({**VOCAB, "e": 6}, "<eos>"), "its ids are not 0 to 5, each once"),
        (theirs({**VOCAB, "e": 4}, "<eos>"), "its ids are not 0 to 5, each once"),
        ('{"type": "characters", "characters": 3}', "must be a string"),
        ('{"type": "characters", "characters": "a\ufffd", "replacement": 1}', "true or false"),
        ('{"type": "characters", "characters": "a", "replacement": true}', "needs U"),
        ('{"type": "characters", "characters": "aba"}', "'a' occurs more than once"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_tokenizer_is_refused(document, sentence):
    """What is no tokenizer at all is one sentence that names the file."""
    with pytest.raises(CheckpointError, match=sentence) as caught:
        hub.read_tokenizer(document, "x")
    assert str(caught.value).startswith("x")


# ---- weights ------------------------------------------------------------------------------------------------


def sharded(folder):
    """Rewrite the weights as transformers does with a small max_shard_size."""
    arrays = foreign(folder)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {f"transformer.{name}": names[i % 3] for i, name in enumerate(arrays)}
    for each in names:
        write(folder / each, {name: arrays[name[12:]] for name, place in places.items() if place == each})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return arrays


def test_weights_in_several_files_are_read_by_their_index(saved):
    """A model in three files is the model in one, and does not pass for verified."""
    arrays = sharded(saved)
    loaded = checkpoint.load(saved)
    assert not loaded.verified and loaded.params.keys() == arrays.keys()
    assert all((loaded.params[name].data == x).all() for name, x in arrays.items())


def remap(folder, change):
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    rewritten(path, weight_map=change(places))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: remap(f, lambda places: 3), "weight_map is not an object of file names"),
        (lambda f: remap(f, lambda places: {"a": 3}), "weight_map is not an object of file names"),
        (
            lambda f: remap(f, lambda places: dict.fromkeys(places, "../x.safetensors")),
            "names '../x.safetensors', which",
        ),
        (
            lambda f: remap(f, lambda places: dict.fromkeys(places, "pytorch_model.bin")),
            "names 'pytorch_model.bin', wh",
        ),
        (lambda f: remap(f, lambda places: {f"p{i}": f"{i}.safetensors" for i in range(1001)}), "names 1001 files"),
        (lambda f: remap(f, lambda places: places | {"more": "model-00001-of-00003.safetensors"}), "does not hold the"),
        (lambda f: remap(f, lambda places: dict(list(places.items())[1:])), "does not hold the parameters that model"),
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003.safetensors: cannot be read"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "is missing, and .* is one of several files, whose"),
    ],
)
def test_a_wrong_index_is_refused(saved, spoil, sentence):
    """An index names files beside it, and each holds the parameters that it says."""
    sharded(saved)
    spoil(saved)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(saved)


def bfloat16(x):
    """The upper two bytes of each float32, by Python's struct."""
    upper = [struct.unpack("<HH", struct.pack("<f", value))[1] for value in x.ravel()]
    return np.array(upper, "<u2").view(safetensors.BFLOAT16).reshape(x.shape)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "both"])
def test_half_precision_is_widened_and_said(saved, kind):
    """Weights of 16 bits become the float32 of the same value, and a warning says so."""
    arrays = foreign(saved)
    halves = {"float16": lambda x: x.astype("f2"), "bfloat16": lambda x: bfloat16(x.astype("f4"))}
    chosen = {
        name: halves[kind if kind != "both" else ["float16", "bfloat16"][i % 2]](x)
        for i, (name, x) in enumerate(arrays.items())
    }
    write(saved / "model.safetensors", chosen)
    said = "bfloat16 and float16" if kind == "both" else kind
    with pytest.warns(UserWarning, match=rf"model\.safetensors: {said} weights are used as float32"):
        loaded = checkpoint.load(saved)
    for name, x in chosen.items():
        p = loaded.params[name]
        assert p.dtype == "float32" and p.shape == arrays[name].shape and p.data.flags.writeable
        error = np.abs(p.data - arrays[name]) / np.abs(arrays[name])
        assert error.max() < (2**-10 if x.dtype == "float16" else 2**-7) and error.max() > 2**-14
        if x.dtype == "float16":
            assert (p.data == x).all()
        else:  # its bytes are those of a float32 whose lower half is 0
            upper = p.data.tobytes()
            assert upper[2::4] + upper[3::4] == x.tobytes()[0::2] + x.tobytes()[1::2] and not any(upper[0::4])


def test_a_mixture_with_float64_is_refused(saved):
    """Half precision beside float64 is not one model."""
    arrays = foreign(saved)
    write(saved / "model.safetensors", {**arrays, "wpe.weight": arrays["wpe.weight"].astype("f2")})
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="all float32 or all float64"):
        warnings.simplefilter("ignore")
        checkpoint.load(saved)


# ---- the command line ---------------------------------------------------------------------------------------


def ids_model(folder):
    """A model of theirs without a tokenizer of characters."""
    checkpoint.save(folder, small(), Config(**{**vars(CONFIG), "eos_token_id": 3}), None)
    arrays = foreign(folder)
    write(folder / "model.safetensors", {name: x.astype("f2") for name, x in arrays.items()})
    (folder / "tokenizer.json").write_text(theirs(VOCAB, "<eos>", type="BPE"))
    return folder


def rows(path, *pairs):
    path.write_text("".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), pair))) + "\n" for pair in pairs))
    return str(path)


def test_a_model_of_theirs_is_imported(tmp_path, capsys):
    """`minidpo import` writes a checkpoint with checksums, says what became of the weights and what it takes."""
    source, out = ids_model(tmp_path / "theirs"), tmp_path / "ours"
    assert cli.main(["import", str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "float16 weights are used as float32" in printed.err and "carry no checksum" in printed.err
    assert "its model is 'BPE', not of characters (WordLevel): loaded without a tokenizer" in printed.err
    assert "5 ids; it takes lists of ids, no texts" in printed.out and "Warning" not in printed.err
    loaded = checkpoint.load(out)
    assert loaded.verified and loaded.tokenizer is None and loaded.config.eos_token_id == 3
    assert cli.main(["import", str(source), "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    rewritten(source / "config.json", n_inner=7)
    assert cli.main(["import", str(source), "--out", str(tmp_path / "no")]) == 2
    assert "n_inner is 7" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_an_imported_model_of_characters_takes_texts(saved, tmp_path, capsys):
    """A folder of version 0.1 becomes one that Hugging Face opens, and the texts that it samples are the same."""
    (saved / "tokenizer.json").write_text('{"type": "characters", "characters": "abcd"}')
    foreign(saved)
    assert cli.import_(folder=saved, out=tmp_path / "new") == tmp_path / "new"
    assert "it takes texts" in capsys.readouterr().out
    assert cli.sample(checkpoint=tmp_path / "new", prompt="ab") == cli.sample(checkpoint=saved, prompt="ab")
    assert json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"


def test_a_model_of_ids_scores_ids_and_refuses_texts(tmp_path, capsys):
    """`score --ids` gives log pi of the ids as they are; a command that needs texts says so in one sentence."""
    source = str(ids_model(tmp_path / "theirs"))
    data = rows(tmp_path / "ids.jsonl", ([1, 2], [4, 3], [0]), ([0], [4, 4, 4], [1, 3]))
    table = cli.score(checkpoint=source, data=data, ids=True, reference=source, beta=0.1)
    params, config, *_ = quiet_load(source)
    for each, (x, w, l) in zip(table, (([1, 2], [4, 3], [0]), ([0], [4, 4, 4], [1, 3])), strict=True):
        for side, y in (("chosen", w), ("rejected", l)):
            logp = scoring.sequence_logprob(params, config, [x], [y]).item()
            assert each[f"logps/{side}"] == pytest.approx(logp, rel=1e-5) and each[f"rewards/{side}"] == 0
    capsys.readouterr()
    for command in (["score", "--data", data], ["sample"], ["explain", "--chosen=a", "--rejected=b"]):
        assert cli.main([*command, "--checkpoint", source]) == 2
        printed = capsys.readouterr()
        assert printed.err.splitlines()[-1] == (
            f"minidpo {command[0]}: {source}: has no tokenizer of characters, so it takes lists of ids, but no texts"
        )


def quiet_load(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return checkpoint.load(folder)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("a", [1], [2]), "needs lists of ids from 0 to 4, none empty"),
        (([1], [5], [2]), "needs lists of ids from 0 to 4"),
        (([1], [-1], [2]), "needs lists of ids from 0 to 4"),
        (([1], [True], [2]), "needs lists of ids from 0 to 4"),
        (([1], [1.0], [2]), "needs lists of ids from 0 to 4"),
        (([1], [], [2]), "needs lists of ids from 0 to 4"),
        (([1], [1]), "needs lists of ids from 0 to 4"),
        (([1] * 4, [2] * 6, [2]), "has 10 ids, but only 9 fit the context"),
        (([1], [2], [2]), "chosen equals rejected"),
        (([0], [4], [1]), "repeats line 1"),
    ],
)
def test_ids_that_cannot_be_scored_are_set_aside(tmp_path, capsys, pair, reason):
    """A row of ids that the model does not have, or has no room for, is named with its line and never scored."""
    source = str(ids_model(tmp_path / "theirs"))
    data = rows(tmp_path / "ids.jsonl", ([0], [4], [1]), pair)
    assert [each["line"] for each in cli.score(checkpoint=source, data=data, ids=True)] == [1]
    assert f"line 2: set aside, {reason}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--ids takes rows as they are"):
        cli.score(checkpoint=source, data=data, ids=True, truncation="prompt")
    with pytest.raises(ValueError, match=f"line 2: {re.escape(reason)}"):
        cli.score(checkpoint=source, data=data, ids=True, strict=True)


def test_a_reference_of_other_ids_is_refused(saved, tmp_path):
    """Policy and reference share their ids."""
    config = Config(6, 8, 8, 2, 2)
    checkpoint.save(tmp_path / "six", small(0, config), config, None)
    data = rows(tmp_path / "ids.jsonl", ([0], [4], [1]))
    with pytest.raises(CheckpointError, match="vocabularies of 5 and 6 ids that differ"):
        cli.score(checkpoint=saved, reference=tmp_path / "six", beta=0.1, data=data, ids=True)


# ---- config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_names_of_our_gelu_are_known(saved, name):
    """Three names of transformers mean the tanh form; the exact form is another function and is refused."""
    foreign(saved)
    rewritten(saved / "config.json", activation_function=name)
    assert checkpoint.load(saved).config == CONFIG
    rewritten(saved / "config.json", activation_function="gelu")
    with pytest.raises(CheckpointError, match="activation_function is 'gelu', here it can only be 'gelu_new'"):
        checkpoint.load(saved)


def test_a_model_without_a_tokenizer_ends_its_texts_with_its_own_id(saved, tmp_path):
    """With lists of ids the end of a text is eos_token_id of config.json: drawing stops there, and at no other id."""
    foreign(saved)
    (saved / "tokenizer.json").unlink()
    rewritten(saved / "config.json", eos_token_id=3, bos_token_id=3)
    params, config, tokenizer, _ = checkpoint.load(saved)
    assert tokenizer is None and config == Config(**{**vars(CONFIG), "eos_token_id": 3}) != CONFIG
    for seed in range(20):
        (response,) = generate(params, config, [[1, 2]], np.random.default_rng(seed), 6).responses
        assert 3 not in response[:-1] and (response[-1] == 3 or len(response) == 6)
    responses = generate(params, config, [[1, 2]] * 50, np.random.default_rng(0), 6).responses
    assert any(0 in response[:-1] for response in responses) and any(response[-1] == 3 for response in responses)
    checkpoint.save(tmp_path / "again", params, config, None)
    again = checkpoint.load(tmp_path / "again")
    assert again.verified and again.tokenizer is None and again.config == config
    assert not list((tmp_path / "again").glob("tokenizer*"))


def test_a_lost_tokenizer_is_missed(saved):
    """A folder of ours that has lost its tokenizer.json is damaged, not a model of ids."""
    (saved / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        checkpoint.load(saved)


def test_an_id_of_another_model_is_refused():
    """eos_token_id is an id of the vocabulary."""
    for eos, sentence in ((7, "outside the vocabulary of 5"), (-1, "must be an id"), (True, "must be an id")):
        with pytest.raises(ValueError, match=re.escape(f"eos_token_id {'= 7 is ' if eos == 7 else ''}{sentence}")):
            Config(5, 8, 8, 2, 2, eos)
    assert "eos" not in repr(Config(5, 8, 8, 2, 2, 4))  # no score depends on it


# ---- the page -----------------------------------------------------------------------------------------------


def test_the_habits_are_those_that_were_measured():
    """The page's table is of the committed run of `python -m benchmarks.trl --habits`, every row of it."""
    page = (Path(hub.__file__).parent / "README.md").read_text()
    results = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "trl_habits.json").read_text())
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in rows] == list(results)
    for name, *cells in rows:
        sides = [results[name][side] for side in ("TRL", "minidpo")]
        assert all(len(side) == 20 for side in sides)
        losses, norms = [side[-1]["loss"] for side in sides], [side[0]["grad_norm"] for side in sides]
        assert cells == [f"{x:.4f}" if abs(x) < 10 else f"{x:.2f}" for x in losses] + [f"{x:.4g}" for x in norms]
    steps = zip(*results["none"].values(), strict=True)
    assert all(abs(a["loss"] - b["loss"]) < 1e-6 for a, b in steps)


def test_the_page_names_commands_that_exist():
    """A command on the page is one of ours."""
    page = (Path(hub.__file__).parent / "README.md").read_text()
    names = re.findall(r"(?:`|^)minidpo (\w+)", page, re.MULTILINE)
    assert {"import", "score", "data", "sft"} <= set(names) <= set(parser.COMMANDS)
