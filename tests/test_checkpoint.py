"""A checkpoint gives back the same model, or one sentence about its fault."""

import json
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidpo import checkpoint, model
from minidpo.run import files, safetensors
from minidpo.run.checkpoint import CheckpointError
from minidpo.run.hub import tokenizer_document
from minidpo.run.reference import cached_reference_logprobs
from minidpo.tokenizer import Tokenizer
from models import CONFIG, small

TOKENIZER = Tokenizer("abcd")
FILES = ["config.json", "generation_config.json", "model.safetensors", "state.safetensors", "tokenizer.json"]
FILES += ["tokenizer_config.json"]


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "run" / "step-7"
    state = {"step": 7, "rng": np.random.default_rng(3).bit_generator.state, "best": None}
    checkpoint.save(folder, small(), CONFIG, TOKENIZER, {"m.wte.weight": np.arange(3.0)}, state)
    return folder


def test_everything_comes_back(saved):
    """The model, the arrays and the state load as they were saved."""
    loaded = checkpoint.load(saved)
    assert loaded.config == CONFIG and loaded.tokenizer.characters == "abcd" and loaded.verified
    for name, p in small().items():
        assert loaded.params[name].dtype == p.dtype and (loaded.params[name].data == p.data).all()
        assert not loaded.params[name].requires_grad and loaded.params[name].data.flags.writeable
    assert all(p.requires_grad for p in checkpoint.load(saved, requires_grad=True).params.values())
    arrays, state = checkpoint.load_state(saved)
    assert arrays["m.wte.weight"].tolist() == [0, 1, 2] and state["step"] == 7
    rng = np.random.default_rng()
    rng.bit_generator.state = state["rng"]
    assert rng.random() == np.random.default_rng(3).random()
    assert sorted(path.name for path in saved.iterdir()) == FILES


def test_the_same_model_gives_the_same_bytes(saved, tmp_path):
    """Saved again, a checkpoint has the same bytes: equal runs are equal files."""
    checkpoint.save(tmp_path / "again", *checkpoint.load(saved)[:3], *checkpoint.load_state(saved))
    for name in FILES:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@given(
    arrays=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.sampled_from(["<f2", "<f4", "<f8", "<i4", "<i8", "|u1", "|b1", ">f4"]).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=3))
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.sampled_from(["format", "state", "\u00e9"]), st.text()),
)
def test_any_arrays_round_trip(tmp_path_factory, arrays, metadata):
    """Shape, dtype, byte order and metadata survive the format."""
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(safetensors.to_bytes(arrays, metadata))
    loaded, strings, verified = safetensors.read(path)
    assert verified and {key: strings[key] for key in metadata} == metadata and loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].shape == array.shape and loaded[name].dtype == array.dtype.newbyteorder("<")
        assert loaded[name].tobytes() == array.astype(array.dtype.newbyteorder("<")).tobytes()


@pytest.mark.parametrize("metadata", [{"k": 1}, {1: "k"}, {"sha256": "mine"}, {"header_sha256": "mine"}, {"k": None}])
def test_metadata_that_could_not_be_read_is_not_written(metadata):
    """Metadata is texts under names that the checksums do not use; the rest is refused by the writer."""
    with pytest.raises(CheckpointError, match="cannot be written"):
        safetensors.to_bytes({}, metadata)


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(tmp_path_factory, cut):
    """A file cut at any length is refused: a full disk leaves no model that is half zeros."""
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    content = safetensors.to_bytes({"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2, "f4")}, {})
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        safetensors.read(path)


@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_corrupted_file_is_refused_or_harmless(tmp_path_factory, place, flip):
    """One changed byte never gives another number; it may pass in the padding or in a name."""
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.ones(2, "f4")}
    content = bytearray(safetensors.to_bytes(arrays, {}))
    content[int(place * len(content))] ^= flip
    path.write_bytes(content)
    try:
        loaded, _, verified = safetensors.read(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert [repr(x) for x in loaded.values()] == [repr(x) for x in arrays.values()] or not verified


def with_header(path, header, data=b"", length=None):
    document = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(document) if length is None else length) + document + data)


F4 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length", "sentence"),
    [
        ({}, b"", 2**63, "a header of 9223372036854775808 bytes cannot be"),
        (b"{", b"", None, "the header is not JSON"),
        (b"\xff\xfe", b"", None, "the header is not JSON"),
        (b"[" * 100_000, b"", None, "the header is not JSON"),
        ([1], b"", None, "not a JSON object"),
        ({"__metadata__": {"a": 1}}, b"", None, "not an object of strings"),
        ({"a": 3}, b"", None, "has dtype None, known are BF16, F16"),
        ({"a": {**F4, "dtype": "F8_E4M3"}}, b"0" * 8, None, "has dtype 'F8_E4M3', known are BF16, F16"),
        (b'{"a": {}, "b": {}, "a": {}}', b"", None, "the header: 'a' occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", None, "the header: 'dtype' occurs twice"),
        (b'{"a": NaN}', b"", None, "the header has a number that is infinite"),
        ({"a": {**F4, "dtype": ["F32"]}}, b"0" * 8, None, "has dtype"),
        ({"a": {**F4, "shape": [-2]}}, b"0" * 8, None, "lacks a shape or a place"),
        ({"a": {**F4, "shape": [2.0]}}, b"0" * 8, None, "lacks a shape or a place"),
        ({"a": {**F4, "shape": [True, 2]}}, b"0" * 8, None, "lacks a shape or a place"),
        ({"a": {**F4, "data_offsets": [0]}}, b"0" * 8, None, "lacks a shape or a place"),
        ({"a": {**F4, "shape": [2**40, 2**40]}}, b"0" * 8, None, "does not fit bytes 0 to 8 of 8"),
        ({"a": {**F4, "data_offsets": [8, 0]}}, b"0" * 8, None, "does not fit bytes 8 to 0"),
        ({"a": {**F4, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b"", None, "cannot have shape"),
        ({"a": {**F4, "shape": [2] * 65}}, b"0" * 8, None, "lacks a shape or a place"),
        (b'{"a": ' + b"1" * 9_999 + b"}", b"", None, "the header is not JSON"),
        ({"a": F4}, b"0" * 4, None, "does not fit bytes 0 to 8 of 4"),
        ({"a": F4}, b"0" * 9, None, "do not fill the data"),
        ({"a": F4, "b": F4}, b"0" * 8, None, "overlap"),
        ({"a": {**F4, "data_offsets": [4, 12]}}, b"0" * 12, None, "do not fill the data"),
        ({"__metadata__": {"sha256": "0" * 64}, "a": F4}, b"0" * 8, None, "does not match its SHA-256"),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, header, data, length, sentence):
    """A stranger's header neither allocates a terabyte, nor reads another array's bytes."""
    path = tmp_path / "x.safetensors"
    with_header(path, header, data, length)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        safetensors.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_foreign_file_without_a_checksum_is_taken_and_said_so(saved):
    """Weights from elsewhere load, and do not pass for verified."""
    arrays, _, _ = safetensors.read(saved / "model.safetensors")
    renamed = {f"transformer.{name}": x for name, x in arrays.items()}
    renamed["lm_head.weight"] = arrays["wte.weight"]
    renamed["transformer.h.0.attn.bias"] = np.ones((1, 1, 8, 8), bool)
    content = safetensors.to_bytes(renamed, {})
    (saved / "model.safetensors").write_bytes(content.replace(b'sha256"', b'sha999"'))
    loaded = checkpoint.load(saved)
    assert not loaded.verified
    assert all((loaded.params[name].data == x).all() for name, x in arrays.items())


@pytest.mark.parametrize("depth", [900, 985, 991, 995, 2000])
def test_a_deep_document_is_refused_at_any_depth(saved, depth):
    """JSON of 64 levels or less is read; deeper is one sentence, whatever Python's recursion limit."""
    nested = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
    with_header(saved / "model.safetensors", nested)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header is (deeper than 64 levels|not JSON)"):
        checkpoint.load(saved)
    (saved / "config.json").write_bytes(nested)
    with pytest.raises(CheckpointError, match=r"config\.json: is (deeper than 64 levels|not JSON)"):
        checkpoint.load(saved)


def test_a_message_is_short_whatever_the_file_holds(saved):
    """A string of ten megabytes in a file gives a message of two kilobytes, which begins with the path."""
    rewritten(saved / "config.json", n_embd="x" * 10**7)
    with pytest.raises(CheckpointError, match="n_embd") as caught:
        checkpoint.load(saved)
    assert len(str(caught.value)) < 2100 and str(caught.value).startswith(str(saved))


def rewritten(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def twice(path, name):
    """The file, with another value of one of its names before the one that it has."""
    path.write_text(path.read_text().replace(f'"{name}":', f'"{name}": 4, "{name}":', 1))


def instead(folder, name):
    (folder / "model.safetensors").rename(folder / name)


def untied(folder):
    arrays, _, _ = safetensors.read(folder / "model.safetensors")
    arrays["lm_head.weight"] = arrays["wte.weight"] + 1
    (folder / "model.safetensors").write_bytes(safetensors.to_bytes(arrays, {}))


def changed(folder, **changes):
    arrays, _, _ = safetensors.read(folder / "model.safetensors")
    arrays = {name: x for name, x in {**arrays, **changes}.items() if x is not None}
    (folder / "model.safetensors").write_bytes(safetensors.to_bytes(arrays, {}))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: is not a JSON object"),
        (
            lambda f: rewritten(f / "config.json", n_embd=...),
            "n_embd must be a positive integer, not None",
        ),
        (lambda f: rewritten(f / "config.json", n_head=3), "config.json: n_embd = 8 must be a multiple"),
        (lambda f: rewritten(f / "config.json", n_layer=10**12), "too few for n_layer"),
        (lambda f: rewritten(f / "config.json", n_layer=1), "'h.1.attn.c_attn.bias' is not a parameter"),
        (
            lambda f: rewritten(f / "config.json", n_positions=9),
            r"wpe.weight is float64 \(8, 8\); the config wants \(9, 8\)",
        ),
        (lambda f: rewritten(f / "config.json", activation_function="relu"), "activation_function is 'relu', here"),
        (lambda f: rewritten(f / "config.json", model_type="llama"), "model_type is 'llama', here"),
        (
            lambda f: rewritten(f / "config.json", eos_token_id=2, bos_token_id=2),
            "tokenizer.json: end-of-text is 0, but config.json has 2",
        ),
        (lambda f: rewritten(f / "config.json", bos_token_id=None), "bos_token_id is None, here it can only be eos"),
        (
            lambda f: rewritten(f / "config.json", bos_token_id=2),
            "bos_token_id is 2, here it can only be eos_token_id, 0",
        ),
        (lambda f: rewritten(f / "config.json", eos_token_id=...), "eos_token_id must be an id, not None"),
        (lambda f: rewritten(f / "config.json", eos_token_id=-1), "eos_token_id must be an id, not -1"),
        (lambda f: rewritten(f / "config.json", eos_token_id=[0]), r"eos_token_id must be an id, not \[0\]"),
        (lambda f: rewritten(f / "config.json", eos_token_id=5), "eos_token_id = 5 is outside the vocabulary of 5 ids"),
        (lambda f: twice(f / "config.json", "n_head"), "config.json: 'n_head' occurs twice"),
        (lambda f: twice(f / "tokenizer.json", "vocab"), "tokenizer.json: 'vocab' occurs twice"),
        (lambda f: instead(f, "model.safetensors.index.json"), "index.json: is not JSON|not text in UTF-8"),
        (lambda f: instead(f, "model-00001-of-00002.safetensors"), "index.json is missing too. Save it again from Pyt"),
        (lambda f: instead(f, "adapter_model.safetensors"), "an adapter: merge it with .* Save it again from Python"),
        (lambda f: instead(f, "pytorch_model.bin"), "a pickle, .* never opened. Save it again from Python"),
        (lambda f: rewritten(f / "config.json", n_inner=7), "n_inner is 7"),
        (lambda f: rewritten(f / "config.json", n_embd={}), "n_embd must be a positive integer, not {}"),
        (lambda f: rewritten(f / "config.json", layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06, here"),
        (lambda f: rewritten(f / "config.json", tie_word_embeddings=False), "tie_word_embeddings is False, here"),
        (lambda f: rewritten(f / "config.json", scale_attn_weights=False), "scale_attn_weights is False, here"),
        (
            lambda f: rewritten(f / "config.json", scale_attn_by_inverse_layer_idx=True),
            "layer_idx is True, here",
        ),
        (lambda f: rewritten(f / "config.json", add_cross_attention=True), "add_cross_attention is True, here"),
        (lambda f: (f / "config.json").write_text("[" * 99_999), "config.json: is not JSON"),
        (lambda f: (f / "config.json").write_text("1" * 9_999), "config.json: is not JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: is not JSON"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json: is not text in UTF-8"),
        (
            lambda f: (f / "tokenizer.json").write_text(tokenizer_document(Tokenizer("ab"))),
            "3 ids, but config.json says 5",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: cannot be read"),
        (lambda f: untied(f), "here the head is tied"),
        (lambda f: changed(f, **{"wpe.weight": None}), "'wpe.weight' is missing"),
        (lambda f: changed(f, **{"wpe.weight": np.ones((8, 8), int)}), "wpe.weight is int64"),
        (lambda f: changed(f, extra=np.ones(1)), "'extra' is not a parameter"),
        (lambda f: changed(f, **{"x.attn.bias": np.ones(1)}), "'x.attn.bias' is not a parameter"),
        (lambda f: changed(f, **{"wpe.weight": np.ones((8, 8), "f4")}), "all float32 or all float64"),
        (lambda f: changed(f, **{"transformer.wpe.weight": np.ones((8, 8))}), "occurs twice"),
    ],
)
def test_a_folder_that_does_not_belong_together_is_refused(saved, spoil, sentence):
    """Files of different models are refused together: nobody saved that model."""
    changed(saved)  # now without checksums of the other files
    spoil(saved)
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(saved)


@pytest.mark.parametrize("state", [{}, {"state": "[1]"}, {"state": "1" * 9_999}])
def test_a_file_without_a_state_is_refused(saved, state):
    """A resumed run needs its state: it never starts from nothing without a word."""
    (saved / "state.safetensors").write_bytes(safetensors.to_bytes({}, state))
    with pytest.raises(CheckpointError, match=r"its training state is not"):
        checkpoint.load_state(saved)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("state.safetensors", b'\\"step\\": 7', b'\\"step\\": 9'),
        ("state.safetensors", b'"F64"', b'"I64"'),
        ("model.safetensors", b'"F64"', b'"I64"'),
        ("tokenizer.json", b'"d": 4', b'"e": 4'),
        ("config.json", b'"n_head": 2', b'"n_head": 4'),
    ],
)
def test_a_change_that_still_makes_sense_is_refused(saved, name, old, new):
    """A changed step, dtype, character or size is found by its checksum, though the file still parses."""
    content = (saved / name).read_bytes()
    assert old in content
    (saved / name).write_bytes(content.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=f"{name}.* does not match (its|the) SHA-256"):
        checkpoint.load(saved)
        checkpoint.load_state(saved)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"arrays": {"__metadata__": np.ones(1)}}, "'__metadata__' of float64 cannot be written"),
        ({"arrays": {"a": np.ones(1, complex)}}, "'a' of complex128 cannot be written"),
        ({"state": {"step": np.int64(3)}}, "the state is not JSON"),
        ({"state": {"step": json.loads("[" * 70 + "]" * 70)}}, "the state is deeper than 64 levels"),
        ({"state": {"loss": float("nan")}}, "the state is not JSON"),
        ({"params": {"wte.weight": small()["wte.weight"]}}, "1 arrays are too few|is missing"),
        ({"params": {**small(), "extra": small()["ln_f.bias"]}}, "'extra' is not a parameter"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, arguments, sentence):
    """A mistake is found at the save, not when the run is over."""
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.save(tmp_path / "x", **{"params": small(), "config": CONFIG, "tokenizer": TOKENIZER, **arguments})
    assert not list(tmp_path.iterdir())


def test_each_file_is_whole_before_it_is_synced(tmp_path, monkeypatch):
    """Each file is synced at its full length, and so are the folders that hold new names."""
    sizes = {}
    monkeypatch.setattr(
        os, "fsync", lambda fd: sizes.update({os.readlink(f"/proc/self/fd/{fd}"): os.fstat(fd).st_size})
    )
    checkpoint.save(tmp_path / "new" / "run" / "step-1", small(), CONFIG, TOKENIZER)
    written = {path.rpartition("/")[2]: size for path, size in sizes.items()}
    for name in FILES:
        assert written[name] == (tmp_path / "new" / "run" / "step-1" / name).stat().st_size
    assert {"new", "run", tmp_path.name} <= set(written)
    assert any(name.startswith(".step-1.") for name in written)  # the checkpoint's own folder, before its renaming


def test_a_pointer_is_written_whole_or_not_at_all(saved, monkeypatch):
    """A full disk leaves neither odd files, nor a pointer to nothing."""
    with pytest.raises(CheckpointError, match="nothing to point to"):
        checkpoint.point_to_latest(saved.with_name("nope"))

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.point_to_latest(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_errors_name_the_path_of_the_user(saved, tmp_path):
    """A message never speaks of the temporary name beside the path, and nothing is left under that name."""
    (tmp_path / "file").write_text("")
    for write, path in [
        (lambda path: files.write_whole(path, b"x"), tmp_path / "missing" / "page.html"),
        (lambda path: files.write_whole(path, b"x"), tmp_path / "file" / "page.html"),
        (lambda path: files.write_whole(path, b"x"), saved),
        (lambda path: files.write_folder(path, {"a": b"x"}), saved),
        (lambda path: files.write_folder(path, {"no/such/name": b"x"}), tmp_path / "new"),
    ]:
        with pytest.raises(OSError) as caught:
            write(path)
        assert caught.value.filename == str(path) and caught.value.strerror and caught.value.filename2 is None
        assert not list(tmp_path.rglob(".*")) and sorted(x.name for x in saved.iterdir()) == FILES


def test_nothing_is_overwritten(saved):
    """A save into an existing folder is refused, and so is a tokenizer of another model."""
    with pytest.raises(CheckpointError, match="exists already"):
        checkpoint.save(saved, small(), CONFIG, TOKENIZER)
    with pytest.raises(CheckpointError, match="a vocabulary of 3 does not fit a model of 5"):
        checkpoint.save(saved.with_name("other"), small(), CONFIG, Tokenizer("ab"))


@pytest.mark.parametrize("fails_at", range(11))
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, fails_at):
    """Whichever disk write fails, the folder is whole or does not exist."""
    calls = iter(range(100))
    fsync = os.fsync

    def failing(descriptor):
        if next(calls) == fails_at:
            raise OSError("disk full")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    folder = tmp_path / "run" / "step-1"
    try:
        checkpoint.save(folder, small(), CONFIG, TOKENIZER)
        checkpoint.point_to_latest(folder)
    except OSError:
        monkeypatch.undo()
        assert not folder.exists() or checkpoint.load(folder).verified
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".step")] == []
    else:
        assert fails_at > 9


def test_the_latest_is_followed(saved):
    """A folder of checkpoints means the latest of them."""
    checkpoint.point_to_latest(saved)
    assert checkpoint.latest(saved.parent) == saved == checkpoint.latest(saved)
    second = saved.with_name("step-8")
    checkpoint.save(second, model.init(CONFIG, np.random.default_rng(0)), CONFIG, TOKENIZER)
    assert checkpoint.load(saved.parent).params["wte.weight"].dtype == "float64"  # the pointer comes last
    checkpoint.point_to_latest(second)
    assert checkpoint.load(saved.parent).params["wte.weight"].dtype == "float32"


@pytest.mark.parametrize("name", ["../elsewhere", "missing", "/etc", "", "..", "x" * 300])
def test_a_pointer_elsewhere_is_refused(saved, name):
    """A pointer names a checkpoint beside it: a stranger's run does not read other folders of the machine."""
    (saved.parent / "latest").write_text(name)
    with pytest.raises(CheckpointError, match="latest: "):
        checkpoint.load(saved.parent)


def test_hugging_face_finds_the_same_logits(saved, tmp_path):
    """Our weights are GPT-2 weights, there and back."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    params = {name: type(p)(p.data.astype("float32")) for name, p in small().items()}
    checkpoint.save(tmp_path / "ours", params, CONFIG, TOKENIZER)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
    tokens = np.random.default_rng(0).integers(0, 5, (3, 8))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    ours = model.forward(params, CONFIG, tokens).data
    np.testing.assert_allclose(ours, logits, atol=1e-5 * abs(logits).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back = checkpoint.load(tmp_path / "theirs")
    assert not back.verified and all((back.params[name].data == p.data).all() for name, p in params.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w, l: (l, w), "its scores of pair . are not those of the reference"),
        (lambda w, l: (w + 1, l), "its scores of pair . are not those of the reference"),
        (lambda w, l: (w * np.nan, l), "its scores of pair . are not those of the reference"),
        (lambda w, l: (w.astype(int), l.astype(int)), "another shape or type"),
        (lambda w, l: (w.astype("f4"), l), "another shape or type"),
        (lambda w, l: (w[0], l[0]), "another shape or type"),
        (lambda w, l: (w[:-1], l[:-1]), "another shape or type"),
        (lambda w, l: (w, l), None),
    ],
)
def test_reference_scores_are_those_of_the_reference(tmp_path, change, sentence):
    """A file with the correct key and correct checksums still holds the reference's scores, a number for each pair."""
    path, alike = tmp_path / "reference.safetensors", ([0, 1], [2, 0], [2, 0])  # an exchange would not show in these
    pairs = [alike, alike, ([0], [1, 2, 3, 0], [1, 2, 0]), alike]
    w, l = cached_reference_logprobs(path, small(), CONFIG, TOKENIZER, pairs)
    _, metadata, _ = safetensors.read(path)
    arrays = dict(zip(("ref_logp_w", "ref_logp_l"), map(np.asarray, change(w, l))))
    path.write_bytes(safetensors.to_bytes(arrays, metadata))
    if sentence:
        with pytest.raises(CheckpointError, match=f"reference.safetensors: .*{sentence}.*; delete it"):
            cached_reference_logprobs(path, small(), CONFIG, TOKENIZER, pairs)
        return
    assert (cached_reference_logprobs(path, small(), CONFIG, TOKENIZER, pairs)[0] == w).all()
    path.write_bytes(path.read_bytes().replace(b'sha256"', b'sha999"'))
    with pytest.raises(CheckpointError, match="has lost its checksums; delete it"):
        cached_reference_logprobs(path, small(), CONFIG, TOKENIZER, pairs)
