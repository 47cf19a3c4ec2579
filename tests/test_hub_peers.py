"""The bridge, with Hugging Face and TRL at its other end: what either side reads is the same model."""

import inspect
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidpo import checkpoint, cli, losses, model, optim, scoring, training
from minidpo.generation import generate
from minidpo.model import Config
from minidpo.tensor import Tensor
from minidpo.tokenizer import REPLACEMENT, Tokenizer, UnknownCharacterError

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?'\n\t\r\u00e9\u4e2d\U0001f600"
TOKENIZER = Tokenizer(LETTERS)
CONFIG = Config(TOKENIZER.vocab_size, n_positions=48, n_embd=32, n_layer=2, n_head=4)
texts = st.text(st.sampled_from(LETTERS), max_size=40)


def random_model(config=CONFIG):
    """Parameters in float32, far from their initial values; texts differ, and a few of them end."""
    rng = np.random.default_rng(0)
    params = model.init(config, rng, dtype="float64")
    scales = {name: 0.1 if name.startswith("w") else 0.3 for name in params}  # embeddings, and what layers compute
    params = {name: (p.data + scales[name] * rng.normal(size=p.shape)).astype("f4") for name, p in params.items()}
    params["wte.weight"][0] *= 2
    return {name: Tensor(x) for name, x in params.items()}


PARAMS = random_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "ours"
    checkpoint.save(path, PARAMS, CONFIG, TOKENIZER)
    return path


@pytest.fixture(scope="module")
def auto(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


# ---- our folder is theirs -----------------------------------------------------------------------------------


@given(text=texts)
def test_auto_tokenizer_gives_the_same_ids(auto, text):
    """AutoTokenizer puts end-of-text in front and then gives our ids; decoding gives the text back, every space too."""
    ids = TOKENIZER.encode(text)
    assert auto(text).input_ids == [0, *ids] and auto(text, add_special_tokens=False).input_ids == ids
    assert auto.decode(auto(text).input_ids, skip_special_tokens=True) == text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["a  b", "\n\n", " \n a", "", " ", "  ", "a\r\n", "i'm . , ' n't", "<|endoftext"])
def test_no_space_or_newline_is_lost(auto, text):
    """Double spaces, newlines, spaces before marks and the beginning of a marker are texts like others."""
    text = "".join(c for c in text if c in LETTERS)
    assert auto.decode(auto(text).input_ids, skip_special_tokens=True) == text


def test_a_batch_is_padded_on_the_left_with_end_of_text(auto):
    """Pads come before a prompt, so that it can be continued, and are masked."""
    batch = auto(["abc", "a"], padding=True)
    assert batch.input_ids == [[0, 1, 2, 3], [0, 0, 0, 1]] and batch.attention_mask == [[1] * 4, [0, 0, 1, 1]]
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 0, 0)
    assert auto.model_max_length == CONFIG.n_positions


@pytest.mark.parametrize("replacement", [False, True])
def test_unknown_characters_are_what_they_are_here(tmp_path, replacement):
    """A character outside the vocabulary raises in both, or is U+FFFD in both; U+FFFD survives decoding."""
    tokenizer = Tokenizer.from_text("ab\ufffd", replacement)
    config = Config(tokenizer.vocab_size, 8, 8, 1, 1)
    checkpoint.save(tmp_path / "ours", random_model(config=config), config, tokenizer)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert auto.decode(auto("a\ufffd").input_ids, skip_special_tokens=True) == "a\ufffd"
    if replacement:
        ids = auto("axb", add_special_tokens=False).input_ids
        assert ids == tokenizer.encode("axb") and auto.decode(ids, skip_special_tokens=True) == f"a{REPLACEMENT}b"
    else:
        with pytest.raises(Exception, match="UNK"):
            auto("axb")
        with pytest.raises(UnknownCharacterError):
            tokenizer.encode("axb")


def test_a_spelt_end_of_text_is_a_token_there_alone(tmp_path):
    """The one text that the two read differently: <|endoftext|> is the token there, thirteen characters here."""
    tokenizer = Tokenizer.from_text("a<|endoftext|>")
    config = Config(tokenizer.vocab_size, 16, 8, 1, 1)
    checkpoint.save(tmp_path / "ours", random_model(config=config), config, tokenizer)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert auto("<|endoftext|>").input_ids == [0, 0] and len(tokenizer.encode("<|endoftext|>")) == 13


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), rng.integers(1, 12))) + "\n" for _ in range(count)]


@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_pipeline_writes_our_texts(folder, batch_size):
    """The greedy text of a hundred prompts is ours, one at a time and in batches that are padded on the left."""
    pipeline = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    starts = prompts(100)
    theirs = pipeline(
        starts, do_sample=False, max_new_tokens=12, return_full_text=False, batch_size=batch_size, use_cache=True
    )
    ids = [[0, *TOKENIZER.encode(x)] for x in starts]
    ours = generate(PARAMS, CONFIG, ids, np.random.default_rng(0), 12, temperature=0).responses
    assert [each[0]["generated_text"] for each in theirs] == [TOKENIZER.decode(y) for y in ours]
    assert len(set(map(tuple, ours))) > 50 and any(y[-1] == 0 for y in ours)  # they differ, and some end


def test_the_logits_are_equal(folder):
    """AutoModelForCausalLM gives our logits to 1e-5 of the largest."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, CONFIG.n_positions))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens)).logits.numpy()
    ours = model.forward(PARAMS, CONFIG, tokens).data
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * abs(logits).max())


# ---- their folder is ours -----------------------------------------------------------------------------------


def test_what_they_save_comes_back(folder, auto, tmp_path):
    """Model and tokenizer saved by transformers load here with the same weights, characters and ends."""
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    auto.save_pretrained(tmp_path)
    params, config, tokenizer, verified = checkpoint.load(tmp_path)
    assert config == CONFIG and tokenizer.characters == LETTERS and not tokenizer.replacement and not verified
    assert all((params[name].data == p.data).all() for name, p in PARAMS.items())


def gpt2(**changes):
    """A random GPT-2 of theirs, whose ids are not ours."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3}
    config = transformers.GPT2Config(**{**sizes, "bos_token_id": 98, "eos_token_id": 98, **changes})
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p += 0.1 * torch.randn_like(p)
    return theirs


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpt2_of_theirs_is_our_model(tmp_path, name, dtype):
    """A GPT-2 in several files, in full or half precision and by any name of its GELU has their logits here."""
    theirs = gpt2(activation_function=name).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        params, config, tokenizer, _ = checkpoint.load(tmp_path)
    assert [f"{dtype} weights" in str(each.message) for each in said] == [True] * (dtype != "float32")
    assert tokenizer is None and config.eos_token_id == 98
    tokens = np.random.default_rng(0).integers(0, 99, (3, 32))
    with torch.no_grad():
        logits = theirs.float()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(
        model.forward(params, config, tokens).data, logits, rtol=0, atol=1e-5 * abs(logits).max()
    )
    start = tokens[:, :5].tolist()
    ours = generate(params, config, start, np.random.default_rng(0), 20, temperature=0).responses
    for x, y in zip(start, ours):
        out = theirs.generate(torch.tensor([x]), do_sample=False, max_new_tokens=20, pad_token_id=98)
        assert out[0, 5:].tolist() == y


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"n_inner": 50}, "n_inner is 50"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"bos_token_id": 1}, "bos_token_id is 1, here it can only be eos_token_id, 98"),
        ({"eos_token_id": None}, "eos_token_id must be an id, not None"),
        ({"eos_token_id": 50256, "bos_token_id": 50256}, "eos_token_id = 50256 is outside the vocabulary of 99 ids"),
    ],
)
def test_another_model_is_refused_by_field_and_value(tmp_path, changes, sentence):
    """What transformers computes otherwise than our model is refused, and so is a text without our end."""
    gpt2(**changes).save_pretrained(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=sentence):
        checkpoint.load(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    """A Llama is named as what it is."""
    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="model_type is 'llama', here it can only be 'gpt2'"):
        checkpoint.load(tmp_path)


def test_a_byte_level_tokenizer_is_left_out(tmp_path):
    """GPT-2's kind of tokenizer, trained on the spot, is not of characters: the model loads for lists of ids."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    byte_level = tokenizers.ByteLevelBPETokenizer()
    byte_level.train_from_iterator(["hello there, my parcel is late"] * 9, 280, special_tokens=["<|endoftext|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    gpt2(vocab_size=len(fast), bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="its model is 'BPE', not of characters .*: loaded without a tokenizer"):
        assert checkpoint.load(tmp_path).tokenizer is None


# ---- a run continues in TRL ---------------------------------------------------------------------------------

STEPS, BATCH, RATE = 20, 8, 2e-3
PROMPTS = prompts(60, seed=3)
ROWS = [
    {"prompt": x, "chosen": w.strip() + "!", "rejected": l.strip() + "?"}
    for x, w, l in zip(PROMPTS, PROMPTS[20:] + PROMPTS[:20], PROMPTS[40:] + PROMPTS[:40])
]
PAIRS = [
    (
        [0, *TOKENIZER.encode(row["prompt"])],
        *([*TOKENIZER.encode(row[y]), 0] for y in ("chosen", "rejected")),
    )
    for row in ROWS
]
ORDER = [training.batch_indices(len(PAIRS), BATCH, step, 0) for step in range(STEPS)]


def rate(step):
    """Our schedule, as a share of its peak."""
    return optim.warmup_cosine(step, STEPS, 1.0, 4)


def trl_run(model, out, rows=None, schedule=rate, **changes):
    """A run of DPOTrainer from a path alone, with our order, schedule and optimizer; the trainer and its log."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    settings = {
        "beta": 0.1, "learning_rate": RATE, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.0,
        "max_grad_norm": 1e9, "per_device_train_batch_size": BATCH, "max_steps": STEPS, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "bf16": False, "use_cpu": True, "activation_checkpointing": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
    }  # fmt: skip
    rows = rows or [ROWS[i] for batch in ORDER for i in batch]
    args = trl.DPOConfig(output_dir=str(out), **{**settings, **changes})
    trainer = trl.DPOTrainer(str(model), args=args, train_dataset=datasets.Dataset.from_list(rows))
    if schedule:
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, schedule)
    trainer.train()
    return trainer, [row for row in trainer.state.log_history if "loss" in row]


def our_run(nll_weight=0.0, beta=0.1, loss=losses.dpo_loss):
    """The same run here; the policy and its metrics."""
    policy = {name: Tensor(p.data, requires_grad=True) for name, p in PARAMS.items()}
    optimizer = optim.AdamW(policy, RATE, betas=(0.9, 0.99), weight_decay=0.0)
    log = []
    for step, batch in enumerate(ORDER):
        optimizer.learning_rate = RATE * rate(step)
        pairs = scoring.collate([PAIRS[i] for i in batch])
        log.append(training.dpo_training_step(policy, PARAMS, CONFIG, optimizer, pairs, beta, loss, nll_weight))
    return policy, log


@pytest.fixture(scope="module", params=[0.0, 0.7])
def both(request, folder, tmp_path_factory):
    """Twenty steps there and here, without and with a likelihood term; and the folder that TRL saved."""
    weights = {} if request.param == 0 else {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, request.param]}
    out = tmp_path_factory.mktemp("trl")
    trainer, theirs = trl_run(folder, out, **weights)
    trainer.save_model(str(out / "model"))
    return theirs, *our_run(request.param), out / "model"


def test_twenty_steps_of_trl_are_ours(both):
    """Losses agree to 1e-6, gradient norms to 1e-5, and TRL's other metrics by their names, at each of twenty steps."""
    theirs, _, ours, _ = both
    assert len(theirs) == len(ours) == STEPS
    for their, our in zip(theirs, ours):
        assert abs(float(their["loss"]) - our["loss"]) < 1e-6
        assert float(their["grad_norm"]) == pytest.approx(our["grad_norm"], rel=1e-5)
        assert float(their["learning_rate"]) == pytest.approx(our["learning_rate"])
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert abs(float(their[name]) - our[name]) < 1e-5, name
        for name in ("logps/chosen", "logps/rejected"):
            assert float(their[name]) == pytest.approx(our[name], rel=1e-5)
    assert ours[0]["rewards/ties"] == 1 and ours[-1]["loss"] < ours[0]["loss"] - 0.1
    for their, our in list(zip(theirs, ours))[1:]:
        assert float(their["rewards/accuracies"]) == pytest.approx(our["rewards/accuracies"])


def test_what_trl_saved_scores_the_same_here(both):
    """The folder that TRL saved loads, with its tokenizer, and gives the log-probabilities of our own run."""
    _, policy, _, saved = both
    params, config, tokenizer, _ = checkpoint.load(saved)
    assert config == CONFIG and tokenizer.characters == LETTERS
    for w, o in zip(scoring.shared_logprobs(params, CONFIG, PAIRS), scoring.shared_logprobs(policy, CONFIG, PAIRS)):
        np.testing.assert_allclose(w.data, o.data, atol=1e-3)
    for name, p in policy.items():  # key biases move by noise alone: their gradient is 0
        C, real = CONFIG.n_embd, np.ones(p.shape, bool)
        real[C : 2 * C] = not name.endswith("c_attn.bias")
        np.testing.assert_allclose(params[name].data[real], p.data[real], atol=2e-4)


def test_the_ten_lines_continue_a_run(tmp_path, monkeypatch):
    """The page's lines run as they are, but for the number of steps; what they save is imported and scored."""
    pytest.importorskip("datasets")
    page = (Path(cli.__file__).parents[1] / "run" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    before = re.findall(r"After `(.*?)` and `(.*?)`", page)[0]
    monkeypatch.chdir(tmp_path)
    for command in before:
        assert cli.main([*shlex.split(command)[1:], *(["--steps", "2"] if " sft " in command else [])]) == 0
    assert code.count('"max_steps": 100') == 1 and len(code.splitlines()) <= 10
    exec(compile(code.replace('"max_steps": 100', '"max_steps": 2'), "page", "exec"), {})
    for command in commands.splitlines():
        assert cli.main(shlex.split(command)[1:]) == 0
    moved = checkpoint.load("back").params["wte.weight"].data - checkpoint.load("sft").params["wte.weight"].data
    assert 0 < abs(moved).max() < 1e-3


def test_the_metrics_have_the_names_that_the_page_says(both):
    """Each name that is the same is in both logs; each that one lacks is in the other's alone."""
    page = (Path(cli.__file__).parents[1] / "run" / "README.md").read_text()
    theirs, _, ours, _ = both
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    same = [name for left, right in rows if right == "the same" for name in re.findall(r"`(.*?)`", left)]
    assert len(same) >= 10
    for name in same:
        assert name == "eval_..." or (name in theirs[0] and name in ours[0]), name
    (alone,) = [right for left, right in rows if left == "not here"]
    assert all(name in theirs[0] and name not in ours[0] for name in re.findall(r"`(.*?)`", alone))
    (own,) = [left for left, right in rows if right == "not there"]
    assert not any(name in theirs[0] for name in re.findall(r"`(.*?)`", own))
    options = [name for left, _ in rows for name in re.findall(r"`--([\w-]+)", left)]
    assert len(options) > 9 and all(name.replace("-", "_") in inspect.signature(cli.dpo).parameters for name in options)
    trl = pytest.importorskip("trl")
    fields = {name for _, right in rows for name in re.findall(r"`(\w+)(?:=.*)?`", right)} - {"ref_model"}
    fields -= {name for name in fields if name in theirs[0] or "/" in name}
    assert {"beta", "max_steps", "truncation_mode"} <= fields <= set(trl.DPOConfig.__dataclass_fields__)
