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
