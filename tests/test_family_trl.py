"""Every loss that the installed TRL has, run through TRL's own code: value and gradient are ours to 1e-6.

The lists of names are read from TRL's code, so a loss that a new version adds fails here by name. TRL's trainers get a
model that answers with given log-probabilities of tokens. Where TRL's form is not the paper's, the line of OURS that
converts is the statement of how.
"""

import collections
import inspect
import re
import types
import warnings

import numpy as np
import pytest

from minidpo import Tensor
from minidpo.family import kto_loss, kto_reference_point
from minidpo.losses import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("trl", reason="trl is not installed")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

B, T, BETA = 5, 9, 0.3
RNG = np.random.default_rng(0)
LENGTH_W, LENGTH_L = np.array([3, 8, 2, 5, 4]), np.array([6, 1, 7, 5, 2])
LENGTHS = np.concatenate([LENGTH_W, LENGTH_L])
MASK = np.arange(T - 1) < LENGTHS[:, None]  # (2B, T - 1): the tokens that are scored
TOKENS = np.where(MASK, RNG.uniform(-1.5, -0.01, (2 * B, T - 1)), 0.0)
REFS = np.split(TOKENS.sum(axis=1) + RNG.normal(size=2 * B), 2)
W, L = np.split(TOKENS.sum(axis=1), 2)
FOUR = dict(zip(("logp_w", "logp_l", "ref_logp_w", "ref_logp_l"), (W, L, *REFS)))
SIZES = {"length_w": LENGTH_W, "length_l": LENGTH_L}
CONSTANT = {"ref_logp_w": np.zeros(B), "ref_logp_l": np.zeros(B)}  # a uniform reference


def ours(name, **changes):
    """A loss of ours and its gradients in logp_w and logp_l, at the log-probabilities above unless they are given."""
    x = {**FOUR, **SIZES, "beta": BETA, **changes}
    x = {each: x[each] for each in inspect.signature(LOSSES[name]).parameters if each in x}
    leaves = {each: Tensor(x[each], requires_grad=True) for each in ("logp_w", "logp_l")}
    out = LOSSES[name](**{**x, **leaves}).loss
    out.backward()
    return out.item(), *(0 * leaf.data if leaf.grad is None else leaf.grad for leaf in leaves.values())


def check_rewards(name, metrics, **changes):
    """The mean rewards that TRL logs are ours."""
    out = LOSSES[name](**{each: x for each, x in {**FOUR, **SIZES, "beta": BETA, **changes}.items()
                          if each in inspect.signature(LOSSES[name]).parameters})  # fmt: skip
    for each, reward in (("chosen", out.reward_w), ("rejected", out.reward_l)):
        np.testing.assert_allclose(float(metrics[f"rewards/{each}"]), reward.data.mean(), rtol=1e-6)


def per_token(name, **changes):
    """A loss of ours on means over tokens: dL/dlogp is dL/dmean divided by the length."""
    means = {each: x / SIZES[f"length_{each[-1]}"] for each, x in {**FOUR, **changes}.items()}
    value, w, l = ours(name, **means)
    return value, w / LENGTH_W, l / LENGTH_L


def shifted(constant, name, **changes):
    value, w, l = ours(name, **changes)
    return value + constant, w, l


def added(*parts):
    return tuple(map(sum, zip(*parts)))


def token_nll(weight=1.0):
    """TRL's likelihood term: a mean over the tokens of the batch, not over its responses as in `sft`."""
    value, w, l = ours("sft")
    return tuple(weight * B / LENGTH_W.sum() * part for part in (value, w, l))


OURS = {  # of TRL's DPOTrainer
    "sigmoid": lambda: ours("dpo"),
    "hinge": lambda: ours("hinge"),
    "ipo": lambda: per_token("ipo"),  # the paper's has sums
    "exo_pair": lambda: ours("exo_pair", label_smoothing=0.1),
    "nca_pair": lambda: ours("nca_pair"),
    "robust": lambda: ours("robust", label_smoothing=0.1),
    "bco_pair": lambda: ours("bco_pair"),  # delta is 0
    "sppo_hard": lambda: ours("sppo_hard"),
    "aot": lambda: ours("aot", label_smoothing=0.1),
    "aot_unpaired": lambda: ours("aot_unpaired", label_smoothing=0.1),
    "apo_zero": lambda: shifted(1, "apo_zero"),
    "apo_down": lambda: shifted(1, "apo_down"),
    "discopop": lambda: ours("discopop"),
    "sft": token_nll,
    "sigmoid_norm": lambda: ours("sigmoid_norm"),
}
DIVERGENCES = {
    "reverse_kl": lambda: ours("dpo"),
    "forward_kl": lambda: ours("alpha_divergence", alpha=1.0),
    "js_divergence": lambda: ours("js_divergence"),
    "alpha_divergence": lambda: ours("alpha_divergence", alpha=1 - 0.3),  # TRL's coefficient is 1 - alpha
}
CPO = {  # of TRL's CPOTrainer, whose nll_weight is cpo_alpha
    "sigmoid": lambda: added(ours("cpo", nll_weight=0.0), token_nll(0.7)),
    "hinge": lambda: added(ours("hinge", **CONSTANT), token_nll(0.7)),
    "ipo": lambda: added(per_token("ipo", **CONSTANT), token_nll(0.7)),
    "simpo": lambda: added(ours("simpo", gamma=0.5), token_nll(0.7)),
    "alphapo": lambda: ours("alphapo", gamma=0.5, alpha=0.25),
}
KTO = {  # of TRL's KTOTrainer: options of kto_loss
    "kto": {"weight_desirable": 1.2, "weight_undesirable": 0.8},
    "apo_zero_unpaired": {"weight_desirable": 1.2, "weight_undesirable": 0.8, "reference_point": 0.0},
}


def named(names, known, where):
    """Parametrise over TRL's names; one that we do not know fails."""
    assert names, f"TRL's {where} names no loss where it used to"
    return pytest.mark.parametrize("name", sorted(set(names) | set(known)))


def names_in(function, variable):
    return re.findall(rf'{variable} == "(\w+)"', inspect.getsource(function))


def check(mine, value, gradients):
    """Equal to 1e-6."""
    np.testing.assert_allclose(mine[0], value.item(), rtol=1e-6, atol=1e-6)
    for own, theirs in zip(mine[1:], gradients, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-6, atol=1e-6)


ACCELERATOR = types.SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)


def outputs(tokens):
    """What TRL reads of a model's answer: log-probabilities, and figures for its metrics."""
    zeros = torch.zeros_like(tokens)
    return types.SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def batch_of(lengths, **more):
    """A batch of prompts of one token; the model ignores the ids."""
    mask = torch.tensor(np.concatenate([np.zeros((len(lengths), 1), int), np.arange(T - 1) < lengths[:, None]], axis=1))
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, **more}


def trl_dpo(loss_type, divergence="reverse_kl", dtype=torch.float64):
    """Value and gradients, in logp_w and logp_l, of TRL's DPOTrainer."""
    config = DPOConfig(output_dir="unused", report_to="none", loss_type=loss_type, beta=BETA, use_cpu=True, bf16=False)
    tokens = torch.tensor(TOKENS, dtype=dtype, requires_grad=True)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type=divergence, f_alpha_divergence_coef=0.3, beta=BETA, args=config,
        loss_types=config.loss_type, loss_weights=[1.0], label_smoothing=0.1, use_weighting=False,
        _metrics={"train": collections.defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    refs = [torch.tensor(ref, dtype=dtype) for ref in REFS]
    batch = batch_of(LENGTHS, ref_chosen_logps=refs[0], ref_rejected_logps=refs[1])
    loss = DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs(tokens), batch, False)
    loss.backward()
    first = tokens.grad[:, 0].numpy()  # each token of a response has the gradient of the sum
    return loss, np.split(first, 2)


@named(names_in(DPOTrainer._compute_loss, "loss_type"), OURS, "DPOTrainer")
def test_dpo_trainer(name):
    """Every loss_type of TRL's DPOTrainer is a member of the family."""
    assert name in OURS, f"TRL has a loss {name!r} that the family lacks"
    check(OURS[name](), *trl_dpo(name))


@named(names_in(DPOTrainer._compute_loss, "self.f_divergence_type"), DIVERGENCES, "f_divergence_type")
def test_f_divergences(name):
    """Every f_divergence_type is a loss of its own here; TRL computes one of them in float32 alone."""
    assert name in DIVERGENCES, f"TRL has a divergence {name!r} that the family lacks"
    check(DIVERGENCES[name](), *trl_dpo("sigmoid", name, torch.float32))


def choices(config):
    return next(f for f in config.__dataclass_fields__.values() if f.name == "loss_type").metadata["choices"]


@named(choices(CPOConfig), CPO, "CPOConfig")
def test_cpo_trainer(name):
    """Every loss_type of TRL's CPOTrainer, SimPO and AlphaPO among them, with its likelihood term."""
    assert name in CPO, f"TRL has a loss {name!r} that the family lacks"
    alpha = 0.25 if name == "alphapo" else 0.0
    config = CPOConfig(output_dir="unused", report_to="none", loss_type=name, cpo_alpha=0.7, use_cpu=True, bf16=False)
    w, l = (torch.tensor(x, requires_grad=True) for x in (W, L))
    means = config.loss_type in ("ipo", "simpo")  # as its concatenated_forward has it
    nll = -w.sum() / LENGTH_W.sum()
    scores = (w / torch.tensor(LENGTH_W), l / torch.tensor(LENGTH_L)) if means else (w, l)
    trainer = types.SimpleNamespace(
        alpha=alpha, loss_type=config.loss_type, simpo_gamma=config.simpo_gamma, beta=BETA, label_smoothing=0.0,
        cpo_alpha=config.cpo_alpha, accelerator=ACCELERATOR, aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: (*scores, w, l, nll),
    )  # fmt: skip
    trainer.cpo_loss = types.MethodType(CPOTrainer.cpo_loss, trainer)
    assert 'average_log_prob=self.loss_type in ["ipo", "simpo"]' in inspect.getsource(CPOTrainer.concatenated_forward)
    loss, metrics = CPOTrainer.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    if name in ("simpo", "alphapo"):
        check_rewards(name, metrics)
    check(CPO[name](), loss, (w.grad.numpy(), l.grad.numpy()))


def test_orpo_trainer(monkeypatch):
    """TRL's ORPOTrainer has the paper's odds ratio; its likelihood term is a mean over the batch's tokens."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # it narrows to float32
    w, l = (torch.tensor(x, requires_grad=True) for x in (W, L))
    nll = -w.sum() / LENGTH_W.sum()
    trainer = types.SimpleNamespace(
        beta=BETA, accelerator=ACCELERATOR, aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: (
            w / torch.tensor(LENGTH_W), l / torch.tensor(LENGTH_L), w, l, nll,
        ),
    )  # fmt: skip
    trainer.odds_ratio_loss = types.MethodType(ORPOTrainer.odds_ratio_loss, trainer)
    loss, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    check_rewards("orpo", metrics)
    own = ours("orpo")
    likelihood = -(W / LENGTH_W).mean(), -1 / LENGTH_W / B, 0 * L  # the paper's
    mine = tuple(a - b + c for a, b, c in zip(own, likelihood, token_nll()))
    check(mine, loss, (w.grad.numpy(), l.grad.numpy()))


@named(choices(KTOConfig), KTO, "KTOConfig")
def test_kto_trainer(name):
    """Every loss_type of TRL's KTOTrainer is `kto`, with its reference point from mismatched pairs or with 0."""
    assert name in KTO, f"TRL has a loss {name!r} that the family lacks"
    desirable = np.arange(2 * B) < B
    ref = np.concatenate(REFS)
    mismatched, ref_mismatched = RNG.uniform(-9, -3, 2 * B), RNG.uniform(-12, -6, 2 * B)
    tokens = torch.tensor(TOKENS, requires_grad=True)
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=ACCELERATOR, aux_loss_enabled=False, loss_type=name,
        precompute_ref_logps=True, calculate_KL=name == "kto", beta=BETA, desirable_weight=1.2, undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: torch.tensor(mismatched), _total_train_tokens=0, _tp_size=1,
        _metrics={"train": collections.defaultdict(list)},
    )  # fmt: skip
    batch = batch_of(
        LENGTHS, label=torch.tensor(desirable), ref_logps=torch.tensor(ref), ref_KL_logps=torch.tensor(ref_mismatched)
    )
    loss = KTOTrainer._compute_loss(trainer, lambda **kwargs: outputs(tokens), batch, False)
    loss.backward()
    leaf = Tensor(TOKENS.sum(axis=1), requires_grad=True)
    options = {"reference_point": kto_reference_point(mismatched, ref_mismatched), **KTO[name]}
    out = kto_loss(leaf, ref, desirable, beta=BETA, **options).loss
    out.backward()
    check((out.item(), leaf.grad), loss, (tokens.grad[:, 0].numpy(),))
