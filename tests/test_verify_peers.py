"""Functions of well-known libraries, verified where those are installed."""

import warnings

import pytest

from minidpo import verify

torch = pytest.importorskip("torch", reason="torch is not installed")


def test_trl_s_log_probabilities_are_right():
    """TRL's log-probabilities of tokens, masked and added up as its trainers do, are log pi(y|x)."""
    pytest.importorskip("trl", reason="trl is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer.utils import selective_log_softmax

    def scores(logits, ids, mask):
        return (selective_log_softmax(logits[:, :-1], ids[:, 1:]) * mask[:, 1:]).sum(-1)

    report = verify.logprobs(scores, layout="mask", framework="torch")
    report.assert_right()
    assert "nan_where_a_pad_is_minus_infinity" in {remark.code for remark in report.remarks}


def test_torch_s_own_functions_are_right():
    """Binary and plain cross entropy of PyTorch, used as a DPO loss and as a score, are right."""
    F = torch.nn.functional

    def loss(w, l, rw, rl, beta):
        z = beta * ((w - rw) - (l - rl))
        return F.binary_cross_entropy_with_logits(z, torch.ones_like(z))

    def scores(logits, labels):
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
        return -nll.sum(-1)

    verify.loss(loss, framework="torch").assert_right()
    verify.logprobs(scores, framework="torch").assert_right()


def test_a_model_s_own_loss_is_a_score():
    """Minus the mean loss of a model of Hugging Face's, times the count of its labels, is log pi(y|x)."""

    def score(model, prompt_ids, response_ids):
        ids = torch.cat([prompt_ids, response_ids], dim=1)
        labels = ids.clone()
        labels[:, : prompt_ids.shape[1]] = -100
        return -model(input_ids=ids, labels=labels).loss * response_ids.shape[1]

    verify.logprobs(score, layout="model", framework="torch").assert_right()
    short = verify.logprobs(lambda *x: score(*x) / x[2].shape[1], layout="model", framework="torch")
    assert [finding.code for finding in short.findings] == ["mean_for_sum"]


def of_pair(policy, reference, batch, beta, sign=1.0):
    """A step with models that return (logits, loss), as nanoGPT's do."""

    def score(model, side):
        logits, _ = model(batch[f"{side}_ids"], batch[f"{side}_ids"])
        logp = torch.log_softmax(logits[:, :-1], dim=-1).gather(2, batch[f"{side}_ids"][:, 1:, None])[..., 0]
        return (logp * batch[f"{side}_mask"][:, 1:]).sum(-1)

    with torch.no_grad():
        ref = score(reference, "chosen") - score(reference, "rejected")
    margin = score(policy, "chosen") - score(policy, "rejected") - ref
    return -torch.nn.functional.logsigmoid(sign * beta * margin).mean()


def test_a_step_may_unpack_its_models_and_run_backward():
    """A step of models that return a pair is read; if it runs backward itself, its gradient is found there."""

    def trains(*arguments, sign=1.0):
        loss = of_pair(*arguments, sign=sign)
        loss.backward()
        return {"loss": loss.item()}

    verify.step(of_pair, framework="torch").assert_right()
    verify.step(trains, framework="torch").assert_right()
    for step in (of_pair, trains):
        report = verify.step(lambda *x, step=step: step(*x, sign=-1.0), framework="torch")
        assert [finding.code for finding in report.findings] == ["pair_swapped"], report
