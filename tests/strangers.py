"""Parts of DPO as many different people might write them: some right, many wrong."""
from collections import namedtuple, OrderedDict
from dataclasses import dataclass
import math

import numpy as np

try:
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
except ImportError:
    torch = nn = F = None

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    jax = jnp = None


# --------------------------------------------------------------------------
# losses, right
# --------------------------------------------------------------------------

def np_logaddexp(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Mean DPO loss through logaddexp."""
    gap = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
    return np.logaddexp(0.0, -beta * gap).mean()


def np_two_branch(pi_yes, pi_no, ref_yes, ref_no, beta=0.1):
    """Per-pair loss, with one formula for each sign of the margin."""
    z = beta * (np.asarray(pi_yes) - pi_no - ref_yes + ref_no)
    out = np.empty_like(z)
    pos = z >= 0
    out[pos] = np.log1p(np.exp(-z[pos]))
    out[~pos] = -z[~pos] + np.log1p(np.exp(z[~pos]))
    return out


def np_abs_trick(a, b, c, d, beta):
    """-log sigmoid as max(-z, 0) + log(1 + exp(-|z|)), averaged."""
    z = beta * ((a - b) - (c - d))
    return float(np.mean(np.maximum(-z, 0) + np.log1p(np.exp(-np.abs(z)))))


def np_python_loop(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """One pair at a time in plain floats."""
    total = 0.0
    n = len(logp_w)
    for w, l, rw, rl in zip(logp_w, logp_l, ref_logp_w, ref_logp_l):
        x = -float(beta) * ((float(w) - float(rw)) - (float(l) - float(rl)))
        if x > 35:
            total += x + math.exp(-x)
        else:
            total += math.log1p(math.exp(x))
    return total / n


def np_softmax_of_two_rewards(pw, pl, rw, rl, beta):
    """Bradley-Terry as a two-way softmax over the implicit rewards."""
    r = beta * np.stack([pw - rw, pl - rl], axis=-1)
    top = r.max(axis=-1, keepdims=True)
    lse = top[..., 0] + np.log(np.exp(r - top).sum(axis=-1))
    losses = lse - r[..., 0]
    return losses, r[..., 0], r[..., 1]


def pt_plain(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """The line everybody writes."""
    chosen_logratios = policy_chosen_logps - reference_chosen_logps
    rejected_logratios = policy_rejected_logps - reference_rejected_logps
    return -F.logsigmoid(beta * (chosen_logratios - rejected_logratios)).mean()


def pt_softplus(lp_w, lp_l, ref_w, ref_l, beta):
    """-log sigmoid(z) is softplus(-z)."""
    with torch.no_grad():
        offset = ref_w - ref_l
    z = torch.mul(lp_w - lp_l - offset, beta)
    return F.softplus(z.neg()).mean()


def pt_bce(lp_w, lp_l, ref_w, ref_l, beta):
    """A logistic regression whose label is always 'chosen'."""
    score = beta * (lp_w - ref_w) - beta * (lp_l - ref_l)
    return F.binary_cross_entropy_with_logits(score, torch.ones_like(score))


def pt_cross_entropy_pair(lp_w, lp_l, ref_w, ref_l, beta):
    """Two-class cross entropy, class 0 being the chosen one."""
    rewards = torch.stack((lp_w - ref_w, lp_l - ref_l), dim=1) * beta
    target = torch.zeros(rewards.shape[0], dtype=torch.long, device=rewards.device)
    return F.cross_entropy(rewards, target)


def pt_tuple_with_options(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
                          reference_rejected_logps, beta, label_smoothing=0.0, reference_free=False):
    """Losses and rewards, with smoothing and reference-free mode switched off unless asked for."""
    pi = policy_chosen_logps - policy_rejected_logps
    ref = reference_chosen_logps - reference_rejected_logps
    if reference_free:
        ref = torch.zeros_like(ref)
    h = pi - ref
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    with torch.no_grad():
        good = beta * (policy_chosen_logps - reference_chosen_logps)
        bad = beta * (policy_rejected_logps - reference_rejected_logps)
    return losses, good, bad


def pt_tuple_raw_rewards(w, l, rw, rl, beta):
    """Per-pair losses together with the log-ratios as rewards."""
    reward_w = w - rw
    reward_l = l - rl
    return -F.logsigmoid((reward_w - reward_l) * beta), reward_w, reward_l


DPOOutput = namedtuple("DPOOutput", "loss chosen_rewards rejected_rewards")


def pt_namedtuple(w, l, rw, rl, beta):
    """Loss first in a named tuple, rewards detached behind it."""
    cr = beta * (w - rw.detach())
    rr = beta * (l - rl.detach())
    return DPOOutput(torch.logaddexp(torch.zeros_like(cr), rr - cr).mean(), cr.detach(), rr.detach())


if torch is not None:
    class _PairwiseDPO(nn.Module):
        """A loss module; beta is given at the call."""

        def __init__(self, reduction="mean"):
            super().__init__()
            self.reduction = reduction
            self.act = nn.LogSigmoid()

        def forward(self, chosen, rejected, ref_chosen, ref_rejected, beta):
            per_pair = -self.act(beta * ((chosen - rejected) - (ref_chosen - ref_rejected)))
            if self.reduction == "none":
                return per_pair
            return per_pair.sum() / per_pair.numel()

    class _LogisticByHand(torch.autograd.Function):
        """softplus(-z) with its derivative written out."""

        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return torch.clamp(-z, min=0) + torch.log1p(torch.exp(-z.abs()))

        @staticmethod
        def backward(ctx, g):
            (z,) = ctx.saved_tensors
            return -g * torch.sigmoid(-z)

    class _LogisticByHandSlip(torch.autograd.Function):
        """Loss of the margin with its derivative written out."""

        @staticmethod
        def forward(ctx, margin, beta):
            ctx.save_for_backward(margin)
            ctx.beta = beta
            return F.softplus(-beta * margin)

        @staticmethod
        def backward(ctx, g):
            (margin,) = ctx.saved_tensors
            return -g * torch.sigmoid(-ctx.beta * margin), None


def pt_module(w, l, rw, rl, beta):
    """Through a small nn.Module, one value per pair."""
    return _PairwiseDPO(reduction="none")(w, l, rw, rl, beta)


def pt_autograd_function(w, l, rw, rl, beta):
    """Through a hand-written autograd Function."""
    return _LogisticByHand.apply(beta * (w - l - (rw - rl))).mean()


def pt_other_grouping(policy_w, reference_w, policy_l, reference_l, beta):
    """Difference of two differences, in the order in which this author lists them."""
    return -F.logsigmoid(beta * ((policy_w - reference_w) - (policy_l - reference_l))).mean()


def pt_reference_first(ref_chosen, ref_rejected, pol_chosen, pol_rejected, beta):
    """Reference arguments come first here."""
    advantage = pol_chosen - pol_rejected - ref_chosen + ref_rejected
    return F.softplus(-(beta * advantage)).mean()


def np_beta_first(beta, chosen, rejected, ref_chosen, ref_rejected):
    """Beta is the first argument in this code base."""
    m = beta * (chosen - ref_chosen) - beta * (rejected - ref_rejected)
    return np.mean(-np.minimum(m, 0) + np.log1p(np.exp(-np.abs(m))))


def jx_plain(w, l, rw, rl, beta):
    """Usual formula in JAX, the reference held constant."""
    rw, rl = jax.lax.stop_gradient((rw, rl))
    return -jax.nn.log_sigmoid(beta * ((w - rw) - (l - rl))).mean()


def jx_vmap(w, l, rw, rl, beta):
    """One pair's loss, mapped over the batch."""
    def one(a, b, c, d):
        return jnp.logaddexp(0.0, -beta * (a - b - c + d))
    return jax.vmap(one)(w, l, rw, rl)


def jx_softplus_tuple(w, l, rw, rl, beta):
    """Losses and rewards from jax.nn.softplus."""
    rewards = jax.tree_util.tree_map(lambda p, r: beta * (p - r), (w, l), (rw, rl))
    return jax.nn.softplus(rewards[1] - rewards[0]), *jax.lax.stop_gradient(rewards)


# --------------------------------------------------------------------------
# losses, meant to be right
# --------------------------------------------------------------------------

def np_softplus_sign(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """-log sigmoid written as a softplus."""
    z = beta * ((logp_w - logp_l) - (ref_logp_w - ref_logp_l))
    return np.logaddexp(0.0, z).mean()


def np_textbook_sigmoid(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Straight from the paper: minus the log of a sigmoid."""
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))
    return -np.mean(np.log(sigmoid(beta * (logp_w - ref_logp_w) - beta * (logp_l - ref_logp_l))))


def np_hinge(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """The preferred answer should win by a margin."""
    advantage = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
    return np.maximum(0.0, 1.0 - beta * advantage).mean()


def np_ratio_of_probs(p_w, p_l, ref_p_w, ref_p_l, beta):
    """Log of the policy to reference ratio, for both answers."""
    ratio_w = np.log(p_w / ref_p_w)
    ratio_l = np.log(p_l / ref_p_l)
    return np.mean(np.logaddexp(0.0, -beta * (ratio_w - ratio_l)))


def np_temperature(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Beta is the temperature of the Boltzmann policy."""
    u = (logp_w - ref_logp_w) - (logp_l - ref_logp_l)
    return np.logaddexp(0.0, -u / beta)


def np_inplace_margin(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Saves memory by building the margin step by step."""
    margin = logp_w
    margin -= ref_logp_w
    margin -= logp_l
    margin += ref_logp_l
    return np.logaddexp(0.0, -beta * margin).mean()


def np_half_storage(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Log-probs are kept in half precision to save space, then the loss is taken in double."""
    packed = np.stack([logp_w, logp_l, ref_logp_w, ref_logp_l]).astype(np.float16)
    w, l, rw, rl = packed.astype(np.float64)
    return np.logaddexp(0.0, -beta * ((w - rw) - (l - rl))).mean()


def np_beta_on_policy_only(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Scaled policy preference against the reference preference."""
    policy_margin = beta * (logp_w - logp_l)
    reference_margin = ref_logp_w - ref_logp_l
    return np.logaddexp(0.0, -(policy_margin - reference_margin)).mean()


def pt_eps_in_log(w, l, rw, rl, beta):
    """A tiny number keeps the log away from zero."""
    prob = torch.sigmoid(beta * ((w - rw) - (l - rl)))
    return -torch.log(prob + 1e-8).mean()


def pt_softplus_exact(w, l, rw, rl, beta):
    """softplus(-z) without PyTorch's linear approximation above its threshold."""
    z = beta * ((w - rw) - (l - rl))
    return F.softplus(-z, beta=1, threshold=10000).mean()


def pt_ratio_exp(policy_w, policy_l, ref_w, ref_l, beta):
    """Importance ratios first, then the log of their quotient."""
    ratio_w = torch.exp(policy_w) / torch.exp(ref_w)
    ratio_l = torch.exp(policy_l) / torch.exp(ref_l)
    return -F.logsigmoid(beta * torch.log(ratio_w / ratio_l)).mean()


def pt_where_guard(w, l, rw, rl, beta):
    """Exact where it matters and linear far out, so that nothing overflows."""
    z = beta * ((w - rw) - (l - rl))
    return torch.where(z > -30.0, -torch.log(torch.sigmoid(z)), -z).mean()


def pt_item(w, l, rw, rl, beta):
    """Collects the pair losses and averages them."""
    losses = []
    for i in range(w.shape[0]):
        z = beta * ((w[i] - l[i]) - (rw[i] - rl[i]))
        losses.append(-F.logsigmoid(z).item())
    return torch.tensor(losses, dtype=w.dtype, requires_grad=True).mean()


def pt_frozen_rejected(w, l, rw, rl, beta):
    """The loss; the rejected side serves as a baseline and is kept constant."""
    baseline = (l - rl).detach()
    return -F.logsigmoid(beta * ((w - rw) - baseline)).mean()


def pt_beta_in_rewards(w, l, rw, rl, beta):
    """Rewards first, then the loss of their gap; both returned."""
    def reward(policy, reference):
        return beta * (policy - reference)
    chosen_rewards, rejected_rewards = reward(w, rw), reward(l, rl)
    losses = -F.logsigmoid(beta * (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


class _TrainerLike:
    """A trainer keeps its own settings."""
    beta = 0.1

    def dpo_loss(self, w, l, rw, rl, beta=None):
        """Loss with the trainer's beta."""
        beta = self.beta or beta
        return -F.logsigmoid(beta * (w - l - rw + rl)).mean()


def pt_trainer_beta(w, l, rw, rl, beta):
    """Calls the trainer's loss."""
    return _TrainerLike().dpo_loss(w, l, rw, rl, beta)


def pt_beta_as_threshold(w, l, rw, rl, beta):
    """softplus takes beta directly."""
    return F.softplus(-((w - rw) - (l - rl)), beta=beta).mean()


def pt_conservative(w, l, rw, rl, beta, label_smoothing=0.1):
    """DPO with the usual robustness to noisy labels."""
    z = beta * ((w - l) - (rw - rl))
    target = torch.full_like(z, 1.0 - label_smoothing)
    return F.binary_cross_entropy_with_logits(z, target)


def pt_squared(w, l, rw, rl, beta):
    """Pushes the log-ratio gap to its target."""
    gap = (w - rw) - (l - rl)
    return torch.square(gap - 0.5 / beta).mean()


def pt_one_minus(w, l, rw, rl, beta):
    """One minus the probability that the preference is respected."""
    p = (beta * ((w - rw) - (l - rl))).sigmoid()
    return (1 - p).mean()


def pt_reference_free_default(policy_chosen, policy_rejected, reference_chosen=None, reference_rejected=None,
                              beta=0.1, reference_free=True):
    """Losses and rewards with an optional reference."""
    pi = policy_chosen - policy_rejected
    ref = 0 if reference_free else reference_chosen - reference_rejected
    losses = -F.logsigmoid(beta * (pi - ref))
    return losses, beta * policy_chosen.detach(), beta * policy_rejected.detach()


def pt_copy_paste(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta):
    """Policy log-ratios against frozen ones."""
    pi_logratios = policy_chosen_logps - policy_rejected_logps
    with torch.no_grad():
        ref_logratios = policy_chosen_logps - policy_rejected_logps
    return F.softplus(-beta * (pi_logratios - ref_logratios)).mean()


def pt_clamped_rewards(w, l, rw, rl, beta):
    """Margin limited for a steadier run."""
    logits = torch.clamp(beta * ((w - rw) - (l - rl)), min=-5.0, max=5.0)
    return -F.logsigmoid(logits).mean()


def pt_reference_pair_turned(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Log-ratio of the policy minus the log-ratio of the reference."""
    model_diff = policy_chosen - policy_rejected
    ref_diff = ref_rejected - ref_chosen
    return -F.logsigmoid(beta * (model_diff - ref_diff)).mean()


def pt_log_softmax_over_batch(w, l, rw, rl, beta):
    """Softmax over chosen and rejected, then the log-likelihood of the chosen."""
    both = beta * torch.stack([w - rw, l - rl], dim=0)
    return -both.log_softmax(dim=-1)[0].mean()


def pt_double_sigmoid(w, l, rw, rl, beta):
    """Binary cross entropy on the preference probability."""
    prob = torch.sigmoid(beta * ((w - l) - (rw - rl)))
    return F.binary_cross_entropy_with_logits(prob, torch.ones_like(prob))


def pt_broadcast(w, l, rw, rl, beta):
    """Column of chosen log-ratios minus rejected log-ratios."""
    chosen = (w - rw).reshape(-1, 1)
    rejected = l - rl
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def pt_ascent(w, l, rw, rl, beta):
    """Average log-likelihood of the preferences."""
    return F.logsigmoid(beta * ((w - rw) - (l - rl))).mean()


class _RunningCentre:
    """Keeps a moving average of the margin."""

    def __init__(self):
        self.mean = 0.0

    def __call__(self, w, l, rw, rl, beta):
        """Loss of the margin, centred with a moving average."""
        margin = (w - rw) - (l - rl)
        loss = -F.logsigmoid(beta * (margin - self.mean)).mean()
        self.mean = 0.9 * self.mean + 0.1 * float(margin.detach().mean())
        return loss


pt_running_centre = _RunningCentre()


def pt_label_noise(w, l, rw, rl, beta, flip=0.1):
    """Loss with some label noise for robustness."""
    sign = 1 - 2 * (torch.rand_like(w) < flip).to(w.dtype)
    return -F.logsigmoid(sign * beta * ((w - rw) - (l - rl))).mean()


def pt_hand_backward(w, l, rw, rl, beta):
    """Through a hand-written autograd Function of the margin."""
    return _LogisticByHandSlip.apply((w - rw) - (l - rl), beta).mean()


def pt_bfloat(w, l, rw, rl, beta):
    """Runs the loss in the training dtype and returns it in the callers'."""
    w16, l16, rw16, rl16 = (t.to(torch.bfloat16) for t in (w, l, rw, rl))
    return (-F.logsigmoid(beta * (w16 - l16 - rw16 + rl16))).to(w.dtype).mean()


def pt_only_misranked(w, l, rw, rl, beta):
    """Pairs that are in the right order need no further training."""
    z = beta * ((w - rw) - (l - rl))
    losses = F.softplus(-z)
    return losses.masked_fill(z > 0, 0.0).mean()


def pt_scores(score_w, score_l, ref_score_w, ref_score_l, beta):
    """Turns the scores to log-probabilities first."""
    lw, ll, rw, rl = (F.logsigmoid(s) for s in (score_w, score_l, ref_score_w, ref_score_l))
    return -F.logsigmoid(beta * ((lw - rw) - (ll - rl))).mean()


def pt_normalised_scores(w, l, rw, rl, beta):
    """Makes sure that the four inputs are log-probabilities, then the usual loss."""
    w, l, rw, rl = (F.log_softmax(t, dim=-1) for t in (w, l, rw, rl))
    return -F.logsigmoid(beta * ((w - rw) - (l - rl)))


def jx_clip(w, l, rw, rl, beta):
    """Keeps the log-sigmoid in a safe range."""
    z = beta * ((w - rw) - (l - rl))
    return -jax.nn.log_sigmoid(jnp.clip(z, -20.0, 20.0)).mean()


def jx_stop_gradient(w, l, rw, rl, beta):
    """Only what has to be trained gets a gradient."""
    chosen = jax.lax.stop_gradient(w - rw)
    rejected = jax.lax.stop_gradient(l - rl)
    return -jax.nn.log_sigmoid(beta * (chosen - rejected)).mean()


def jx_log_of_sigmoid(w, l, rw, rl, beta):
    """Log of jax.nn.sigmoid."""
    pref = jax.nn.sigmoid(beta * (w - l - (rw - rl)))
    return -jnp.log(pref)


def jx_summed(w, l, rw, rl, beta):
    """Total of the batch by a dot product."""
    z = beta * jnp.array([1.0, -1.0, -1.0, 1.0]) @ jnp.stack([w, l, rw, rl])
    return jnp.sum(jax.nn.softplus(-z))


def jx_target_margin(w, l, rw, rl, beta, gamma=0.5):
    """Asks for a reward gap of at least gamma."""
    return jax.nn.softplus(gamma - beta * ((w - rw) - (l - rl))).mean()


def np_total(logp_w, logp_l, ref_logp_w, ref_logp_l, beta):
    """Accumulates the loss over the pairs."""
    acc = 0.0
    for k in range(logp_w.size):
        z = beta * ((logp_w[k] - ref_logp_w[k]) - (logp_l[k] - ref_logp_l[k]))
        acc += np.log1p(np.exp(-abs(z))) + max(-z, 0.0)
    return acc


# --------------------------------------------------------------------------
# log-probs, right
# --------------------------------------------------------------------------

def pt_lp_gather(logits, labels):
    """Shift, gather, zero out -100, sum."""
    target = labels[:, 1:].clone()
    keep = target != -100
    target[~keep] = 0
    lp = torch.gather(logits[:, :-1].log_softmax(-1), 2, target.unsqueeze(2)).squeeze(2)
    return (lp * keep).sum(-1)


def pt_lp_cross_entropy(logits, labels):
    """Cross entropy without reduction already knows -100."""
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return -nll.sum(dim=1)


def pt_lp_with_average_switch(logits, labels, average_log_prob=False, label_pad_token_id=-100):
    """Sum of log-probs by default, mean if asked for."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError("logits and labels differ in shape")
    labels = labels[:, 1:]
    logits = logits[:, :-1, :]
    mask = labels.ne(label_pad_token_id)
    safe = torch.where(mask, labels, torch.zeros_like(labels))
    logps = logits.gather(-1, safe[..., None])[..., 0] - logits.logsumexp(-1)
    logps = torch.where(mask, logps, torch.zeros_like(logps))
    if average_log_prob:
        return logps.sum(-1) / mask.sum(-1)
    return logps.sum(-1)


def np_lp_rows(logits, labels):
    """Row by row, position by position."""
    out = np.zeros(len(labels))
    for b, row in enumerate(labels):
        for t in range(1, len(row)):
            if row[t] != -100:
                v = logits[b, t - 1]
                m = v.max()
                out[b] += v[row[t]] - m - np.log(np.exp(v - m).sum())
    return out


def jx_lp_onehot(logits, labels):
    """one_hot of -100 is a row of zeros, so ignored labels drop out by themselves."""
    hot = jax.nn.one_hot(labels[:, 1:], logits.shape[-1], dtype=logits.dtype)
    return jnp.einsum("btv,btv->b", jax.nn.log_softmax(logits[:, :-1]), hot)


def np_lp_shifted_take(logits, labels):
    """take_along_axis on aligned arrays."""
    m = logits.max(-1, keepdims=True)
    logp = logits - m - np.log(np.exp(logits - m).sum(-1, keepdims=True))
    ok = labels >= 0
    got = np.take_along_axis(logp, np.where(ok, labels, 0)[..., None], axis=-1).squeeze(-1)
    return np.where(ok, got, 0.0).sum(1)


def pt_lp_shifted_flat(logits, labels):
    """Flat cross entropy, folded back to rows."""
    B, T, V = logits.shape
    nll = F.cross_entropy(logits.reshape(B * T, V), labels.reshape(B * T), reduction="none")
    return nll.view(B, T).sum(1).neg()


def pt_lp_shifted_index_add(logits, labels):
    """Picks the counted places and adds them up by row number."""
    rows, cols = torch.nonzero(labels != -100, as_tuple=True)
    picked = logits[rows, cols]
    vals = picked.log_softmax(dim=-1)[torch.arange(len(rows)), labels[rows, cols]]
    return torch.zeros(labels.size(0), dtype=logits.dtype).index_add(0, rows, vals)


def jx_lp_shifted_vmap(logits, labels):
    """One token, then one row, then the batch."""
    def token(vec, lab):
        return jnp.where(lab == -100, 0.0, vec[jnp.maximum(lab, 0)] - jax.nn.logsumexp(vec))
    return jax.vmap(lambda L, y: jax.vmap(token)(L, y).sum())(logits, labels)


def pt_lp_mask_where(logits, ids, mask):
    """Mask of the predicted tokens, zeros elsewhere."""
    lp = F.log_softmax(logits[:, :-1], -1)
    lp = F.log_softmax(lp, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return lp.masked_fill(mask[:, 1:] == 0, 0.0).sum(1)


def pt_lp_mask_index_put(logits, ids, mask):
    """Scatters the selected log-probs to a table of zeros."""
    m = mask[:, 1:].bool()
    lp = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    table = torch.zeros_like(lp).masked_scatter(m, torch.masked_select(lp, m))
    return table.sum(-1)


def pt_lp_mask_roll(logits, ids, mask):
    """Rolls the targets instead of cutting the logits."""
    nxt = torch.roll(ids, -1, dims=1)
    keep = torch.roll(mask, -1, dims=1).clone()
    keep[:, -1] = 0
    lp = -F.cross_entropy(logits.permute(0, 2, 1), nxt, reduction="none")
    return torch.einsum("bt,bt->b", lp, keep.to(lp.dtype))


def np_lp_mask_fancy(logits, ids, mask):
    """Fancy indices and a product with the mask."""
    B, T = ids.shape
    z = logits - logits.max(axis=2, keepdims=True)
    z = z - np.log(np.sum(np.exp(z), axis=2, keepdims=True))
    pick = z[np.arange(B)[:, None], np.arange(T - 1)[None, :], ids[:, 1:]]
    return (pick * mask[:, 1:]).sum(axis=1)


def jx_lp_mask_take(logits, ids, mask):
    """take_along_axis and a where."""
    lp = jax.nn.log_softmax(logits[:, :-1, :], axis=-1)
    lp = jnp.take_along_axis(lp, ids[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(mask[:, 1:] > 0, lp, 0.0), axis=-1)


def np_lp_len_cumsum(logits, ids, prompt_lengths, lengths):
    """Differences of a running total."""
    B, T, _ = logits.shape
    m = logits.max(-1)
    lse = m + np.log(np.exp(logits - m[..., None]).sum(-1))
    tok = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], -1)[..., 0] - lse[:, :-1]
    run = np.concatenate([np.zeros((B, 1)), np.cumsum(tok, axis=1)], axis=1)
    r = np.arange(B)
    return run[r, np.asarray(lengths) - 1] - run[r, np.asarray(prompt_lengths) - 1]


def pt_lp_len_slices(logits, ids, prompt_lengths, lengths):
    """One slice per row."""
    sums = []
    for row, tok, p, n in zip(logits, ids, prompt_lengths.tolist(), lengths.tolist()):
        sums.append(-F.cross_entropy(row[p - 1:n - 1], tok[p:n], reduction="sum"))
    return torch.stack(sums)


def pt_lp_len_whole_text(logits, ids, prompt_lengths, lengths):
    """Log-prob of the whole text; the prompt is common to both answers."""
    lp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    pos = torch.arange(1, ids.shape[1], device=ids.device)
    return torch.where(pos[None] < lengths[:, None], lp, lp.new_zeros(())).sum(1)


def jx_lp_len_iota(logits, ids, prompt_lengths, lengths):
    """Positions between the end of the prompt and the end of the text."""
    t = jnp.arange(1, ids.shape[1])
    inside = (t >= prompt_lengths[:, None]) & (t < lengths[:, None])
    sel = jax.vmap(jax.vmap(lambda v, i: v[i]))(logits[:, :-1], ids[:, 1:])
    lp = sel - jax.scipy.special.logsumexp(logits[:, :-1], axis=-1)
    return (lp * inside).sum(axis=1)


# --------------------------------------------------------------------------
# log-probs, meant to be right
# --------------------------------------------------------------------------

def pt_lp_same_place(logits, labels):
    """Gathers each label's log-prob and sums the counted ones."""
    keep = labels.ne(-100)
    lp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return lp.masked_fill(~keep, 0).sum(-1)


def pt_lp_row_ce(logits, labels):
    """The cross entropy of each row, with the sign turned."""
    return torch.stack([-F.cross_entropy(a[:-1], y[1:], ignore_index=-100) for a, y in zip(logits, labels)])


def pt_lp_clamped_labels(logits, labels):
    """-100 is no valid index for gather, so labels are clamped."""
    y = labels[:, 1:].clamp(min=0)
    return logits[:, :-1].log_softmax(2).gather(2, y[:, :, None])[:, :, 0].sum(1)


def pt_lp_inplace_labels(logits, labels):
    """Shift, replace the ignored labels by 0, gather, mask, sum."""
    labels = labels[:, 1:]
    mask = labels != -100
    labels[labels == -100] = 0
    lp = torch.gather(logits[:, :-1, :].log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return torch.where(mask, lp, torch.zeros_like(lp)).sum(-1)


def np_lp_wrong_way(logits, labels):
    """Aligns the predictions with the labels by dropping one place on each."""
    y = labels[:, :-1]
    x = logits[:, 1:]
    m = x.max(-1, keepdims=True)
    lp = x - m - np.log(np.exp(x - m).sum(-1, keepdims=True))
    keep = y != -100
    got = np.take_along_axis(lp, np.where(keep, y, 0)[..., None], -1)[..., 0]
    return np.where(keep, got, 0).sum(-1)


def jx_lp_softmax_axis(logits, labels):
    """Log-softmax, one-hot pick, sum."""
    lp = jax.nn.log_softmax(logits[:, :-1], axis=1)
    hot = jax.nn.one_hot(labels[:, 1:], logits.shape[2], dtype=logits.dtype)
    return (lp * hot).sum(axis=(1, 2))


def np_lp_mask_before_shift(logits, labels):
    """Mask from the labels, then the shift."""
    counted = (labels != -100)[:, :-1]
    target = np.maximum(labels[:, 1:], 0)
    x = logits[:, :-1]
    lp = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    tok = np.take_along_axis(lp, target[..., None], axis=-1)[..., 0]
    return np.where(counted, tok, 0.0).sum(axis=1)


def pt_lp_shift_again(logits, labels):
    """Causal shift, gather, sum."""
    shift_logits = logits[..., :-1, :].contiguous()
    shift_labels = labels[..., 1:].contiguous()
    nll = F.cross_entropy(shift_logits.flatten(0, 1), shift_labels.flatten(), ignore_index=-100, reduction="none")
    return -nll.reshape(shift_labels.shape).sum(-1)


def np_lp_unsummed(logits, labels):
    """Log-probs of the labels with the ignored ones at zero."""
    x = logits - logits.max(-1, keepdims=True)
    lp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    keep = labels != -100
    return np.take_along_axis(lp, np.where(keep, labels, 0)[..., None], -1)[..., 0] * keep


def pt_lp_forgot_minus(logits, labels):
    """Cross entropy knows -100 already and gives one number per token."""
    per_token = F.cross_entropy(logits.permute(0, 2, 1), labels, reduction="none")
    return per_token.sum(dim=-1)


def jx_lp_row_mean(logits, labels):
    """Masked average log-likelihood of each row."""
    valid = labels >= 0
    lp = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.where(valid, labels, 0)[..., None], -1)[..., 0]
    return jnp.where(valid, lp, 0.0).sum(1) / jnp.maximum(valid.sum(1), 1)


def np_lp_eps(logits, labels):
    """Softmax with a floor, then the log."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    probs = e / e.sum(-1, keepdims=True)
    keep = labels != -100
    p = np.take_along_axis(probs, np.where(keep, labels, 0)[..., None], -1)[..., 0]
    return np.where(keep, np.log(np.maximum(p, 1e-9)), 0.0).sum(1)


def pt_lp_nll_loss(logits, labels):
    """nll_loss picks the entries of the labels."""
    return -F.nll_loss(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)


def pt_lp_softmax_then_ce(logits, labels):
    """Cross entropy of the model's probabilities."""
    probs = torch.softmax(logits, dim=-1)
    loss_fct = nn.CrossEntropyLoss(reduction="none", ignore_index=-100)
    return -loss_fct(probs.transpose(1, 2), labels).sum(-1)


def jx_lp_mask_unshifted(logits, ids, mask):
    """Logits and mask lose their last place, ids their first."""
    lp = jax.nn.log_softmax(logits[:, :-1])
    tok = jnp.take_along_axis(lp, jnp.expand_dims(ids[:, 1:], -1), axis=-1).squeeze(-1)
    return jnp.sum(tok * mask[:, :-1], axis=-1)


def np_lp_both_places(logits, ids, mask):
    """Counts a prediction if its input and its target are both in the response."""
    x = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    lp = x - np.log(np.exp(x).sum(-1, keepdims=True))
    tok = np.take_along_axis(lp, ids[:, 1:, None], -1)[..., 0]
    both = mask[:, 1:].astype(bool) & mask[:, :-1].astype(bool)
    return np.where(both, tok, 0.0).sum(-1)


def pt_lp_fill_the_mask(logits, ids, mask):
    """Fills the masked places with zero and sums."""
    lp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return lp.masked_fill(mask[:, 1:].bool(), 0.0).sum(-1)


def jx_lp_greedy(logits, ids, mask):
    """Log-likelihood of the model's tokens inside the mask."""
    lp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    return jnp.where(mask[:, 1:] == 1, lp.max(axis=-1), 0.0).sum(axis=-1)


def pt_lp_detached(logits, ids, mask):
    """Log-probs on the CPU in double precision, for accuracy."""
    lp = torch.log_softmax(logits.detach().cpu().double()[:, :-1], dim=-1)
    tok = lp.gather(-1, ids.cpu()[:, 1:, None]).squeeze(-1)
    return (tok * mask.cpu()[:, 1:]).sum(-1).to(logits.dtype).to(logits.device).requires_grad_()


def pt_lp_sum_everything(logits, ids, mask):
    """Masked sum of the token log-probs."""
    lp = logits[:, :-1].log_softmax(-1)
    tok = lp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return tok[mask[:, 1:].bool()].sum()


def np_lp_axis0(logits, ids, mask):
    """Masked sum over the tokens of each text."""
    B, T = ids.shape
    x = logits[:, :-1]
    m = x.max(-1, keepdims=True)
    lp = x - m - np.log(np.exp(x - m).sum(-1, keepdims=True))
    tok = lp[np.arange(B)[:, None], np.arange(T - 1), ids[:, 1:]]
    return np.where(mask[:, 1:] > 0, tok, 0).sum(axis=0)


def pt_lp_view_rows(logits, ids, mask):
    """Selects the response tokens and folds them back to rows."""
    B = ids.shape[0]
    lp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.masked_select(lp, mask[:, 1:].bool()).view(B, -1).sum(1)


def pt_lp_log_of_product(logits, ids, mask):
    """Probability of the response is a product; its log is returned."""
    p = torch.softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    p = torch.where(mask[:, 1:].bool(), p, torch.ones_like(p))
    return p.prod(dim=-1).log()


def pt_lp_time_major(logits, ids, mask):
    """Flattens time and batch for one large cross entropy."""
    B, T, V = logits.shape
    flat = logits[:, :-1].transpose(0, 1).reshape(-1, V)
    nll = F.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="none")
    return -(nll.reshape(B, T - 1) * mask[:, 1:]).sum(1)


def np_lp_naive_partition(logits, ids, mask):
    """Logit minus the log of the partition function."""
    log_z = np.log(np.exp(logits).sum(axis=-1))
    tok = np.take_along_axis(logits[:, :-1], ids[:, 1:, None], axis=-1)[..., 0] - log_z[:, :-1]
    return np.where(mask[:, 1:] != 0, tok, 0.0).sum(axis=1)


def pt_lp_len_prompt_index(logits, ids, prompt_lengths, lengths):
    """Token log-probs from the prompt's end to the text's end."""
    tok = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return torch.stack([tok[b, p:n - 1].sum() for b, (p, n) in enumerate(zip(prompt_lengths.tolist(), lengths.tolist()))])


def np_lp_len_first_prompt(logits, ids, prompt_lengths, lengths):
    """All rows of a batch share the prompt, so its length is read once."""
    p = int(prompt_lengths[0])
    x = logits[:, p - 1:-1]
    m = x.max(-1, keepdims=True)
    lp = x - m - np.log(np.exp(x - m).sum(-1, keepdims=True))
    tok = np.take_along_axis(lp, ids[:, p:, None], -1)[..., 0]
    real = np.arange(p, ids.shape[1])[None] < np.asarray(lengths)[:, None]
    return np.where(real, tok, 0.0).sum(1)


def pt_lp_len_prompt_only(logits, ids, prompt_lengths, lengths):
    """Everything after the prompt is response."""
    target = ids[:, 1:].clone()
    where = torch.arange(1, ids.size(1), device=ids.device).unsqueeze(0)
    target = target.masked_fill(where < prompt_lengths.unsqueeze(1), -100)
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none").sum(1)


def jx_lp_len_added(logits, ids, prompt_lengths, lengths):
    """The response starts after the prompt and is `lengths` long."""
    t = jnp.arange(1, ids.shape[1])[None]
    start = prompt_lengths[:, None]
    inside = jnp.logical_and(t >= start, t < start + lengths[:, None])
    lp = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], 2)[..., 0]
    return jnp.where(inside, lp, 0).sum(-1)


def np_lp_len_drop_eos(logits, ids, prompt_lengths, lengths):
    """Padding uses the end token, so that id is left out of the response."""
    out = []
    for x, y, p, n in zip(logits, ids, prompt_lengths, lengths):
        eos = y[n - 1]
        total = 0.0
        for t in range(p, n):
            if y[t] == eos:
                continue
            v = x[t - 1] - x[t - 1].max()
            total += v[y[t]] - np.log(np.exp(v).sum())
        out.append(total)
    return np.array(out)


def pt_lp_len_stop_early(logits, ids, prompt_lengths, lengths):
    """Prompt tokens and everything from the last token on are masked."""
    pos = torch.arange(ids.size(1) - 1, device=ids.device)
    keep = (pos >= prompt_lengths[:, None] - 1) & (pos < lengths[:, None] - 2)
    tok = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return torch.where(keep, tok, torch.zeros_like(tok)).sum(-1)


# --------------------------------------------------------------------------
# steps
# --------------------------------------------------------------------------

def _seq_logp(model, ids, mask):
    """Sum of the masked token log-probs."""
    lp = model(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return lp.masked_fill(mask[:, 1:] == 0, 0.0).sum(-1)


def step_right_plain(policy, reference, batch, beta):
    """Four forward passes, the reference without gradient."""
    w = _seq_logp(policy, batch["chosen_ids"], batch["chosen_mask"])
    l = _seq_logp(policy, batch["rejected_ids"], batch["rejected_mask"])
    with torch.no_grad():
        rw = _seq_logp(reference, batch["chosen_ids"], batch["chosen_mask"])
        rl = _seq_logp(reference, batch["rejected_ids"], batch["rejected_mask"])
    return -F.logsigmoid(beta * ((w - rw) - (l - rl))).mean()


def step_right_concatenated(policy, reference, batch, beta):
    """Both answers in one forward pass, padded on the right to one length."""
    a, b = batch["chosen_ids"], batch["rejected_ids"]
    T = max(a.shape[1], b.shape[1])

    def pad(x):
        return F.pad(x, (0, T - x.shape[1]), value=0)
    ids = torch.cat([pad(a), pad(b)])
    mask = torch.cat([pad(batch["chosen_mask"]), pad(batch["rejected_mask"])])
    ratios = []
    for model, grad in ((policy, True), (reference, False)):
        with torch.set_grad_enabled(grad):
            w, l = _seq_logp(model, ids, mask).chunk(2)
            ratios.append(w - l)
    return F.softplus(-beta * (ratios[0] - ratios[1])).mean()


def step_right_detach(policy, reference, batch, beta):
    """Labels of -100, cross entropy, reference detached afterwards."""
    def score(model, side):
        ids = batch[side + "_ids"]
        labels = ids.masked_fill(batch[side + "_mask"] == 0, -100)[:, 1:]
        return -F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels, reduction="none").sum(-1)
    reward = {s: beta * (score(policy, s) - score(reference, s).detach()) for s in ("chosen", "rejected")}
    return torch.logaddexp(reward["chosen"], reward["rejected"]).sub(reward["chosen"]).mean()


def step_reference_in_graph(policy, reference, batch, beta):
    """Scores both models in one helper and takes the DPO loss."""
    sides = [(batch[k + "_ids"], batch[k + "_mask"]) for k in ("chosen", "rejected")]
    (pw, pl), (rw, rl) = [[_seq_logp(m, *s) for s in sides] for m in (policy, reference)]
    return -F.logsigmoid(beta * ((pw - pl) - (rw - rl))).mean()


def step_no_grad_helper(policy, reference, batch, beta):
    """Scores without keeping the graph, then the loss."""
    def score(model, ids, mask):
        with torch.no_grad():
            return _seq_logp(model, ids, mask)
    w = score(policy, batch["chosen_ids"], batch["chosen_mask"])
    l = score(policy, batch["rejected_ids"], batch["rejected_mask"])
    rw = score(reference, batch["chosen_ids"], batch["chosen_mask"])
    rl = score(reference, batch["rejected_ids"], batch["rejected_mask"])
    return -F.logsigmoid(beta * (w - l - rw + rl)).mean().requires_grad_()


def step_reference_from_policy(policy, reference, batch, beta):
    """The reference pass is the same pass without gradient."""
    def both(model):
        return (_seq_logp(model, batch["chosen_ids"], batch["chosen_mask"])
                - _seq_logp(model, batch["rejected_ids"], batch["rejected_mask"]))
    pi = both(policy)
    with torch.no_grad():
        ref = both(policy)
    return -F.logsigmoid(beta * (pi - ref)).mean()


def step_one_mask(policy, reference, batch, beta):
    """Masks both answers and takes the loss."""
    mask = batch["chosen_mask"]
    diff = {}
    for name, model in (("pi", policy), ("ref", reference)):
        with torch.set_grad_enabled(name == "pi"):
            diff[name] = _seq_logp(model, batch["chosen_ids"], mask) - _seq_logp(model, batch["rejected_ids"], mask)
    return -F.logsigmoid(beta * (diff["pi"] - diff["ref"])).mean()


def step_prompt_mask_on_chosen(policy, reference, batch, beta):
    """Padding is masked on both sides and the prompt too."""
    def upto_end(m):
        return m.flip(1).cummax(1).values.flip(1)
    masks = {"chosen": batch["chosen_mask"], "rejected": upto_end(batch["rejected_mask"])}
    n = {k: m[:, 1:].sum(1) for k, m in masks.items()}
    z = 0.0
    for sign, k in ((1, "chosen"), (-1, "rejected")):
        pi = _seq_logp(policy, batch[k + "_ids"], masks[k])
        with torch.no_grad():
            ref = _seq_logp(reference, batch[k + "_ids"], masks[k])
        z = z + sign * beta * (pi - ref)
    assert all((v > 0).all() for v in n.values())
    return F.softplus(-z).mean()


def step_unshifted(policy, reference, batch, beta):
    """Gather the ids' log-probs, mask, sum, loss."""
    def score(model, ids, mask):
        lp = model(ids).log_softmax(-1).gather(2, ids[:, :, None]).squeeze(2)
        return (lp * mask).sum(1)
    args = [(batch["chosen_ids"], batch["chosen_mask"]), (batch["rejected_ids"], batch["rejected_mask"])]
    pi = [score(policy, *a) for a in args]
    with torch.no_grad():
        ref = [score(reference, *a) for a in args]
    return -F.logsigmoid(beta * ((pi[0] - ref[0]) - (pi[1] - ref[1]))).mean()


def step_dropout_on_logits(policy, reference, batch, beta):
    """DPO step with a little regularisation on the policy's outputs."""
    def wrapped(ids):
        return F.dropout(policy(ids), p=0.1)
    w = _seq_logp(wrapped, batch["chosen_ids"], batch["chosen_mask"])
    l = _seq_logp(wrapped, batch["rejected_ids"], batch["rejected_mask"])
    with torch.no_grad():
        rw = _seq_logp(reference, batch["chosen_ids"], batch["chosen_mask"])
        rl = _seq_logp(reference, batch["rejected_ids"], batch["rejected_mask"])
    return -F.logsigmoid(beta * ((w - rw) - (l - rl))).mean()


def step_interleaved(policy, reference, batch, beta):
    """One pass over the concatenated batch; even rows are chosen and odd rows rejected."""
    T = max(batch["chosen_ids"].shape[1], batch["rejected_ids"].shape[1])
    ids, mask = (torch.cat([F.pad(batch[f"{s}_{k}"], (0, T - batch[f"{s}_{k}"].shape[1])) for s in ("chosen", "rejected")])
                 for k in ("ids", "mask"))
    pi = _seq_logp(policy, ids, mask)
    with torch.no_grad():
        ref = _seq_logp(reference, ids, mask)
    rewards = beta * (pi - ref)
    return -F.logsigmoid(rewards[0::2] - rewards[1::2]).mean()


def step_length_normalised(policy, reference, batch, beta):
    """Average log-prob per token, so that long answers have no advantage."""
    out = []
    for side in ("chosen", "rejected"):
        ids, m = batch[side + "_ids"], batch[side + "_mask"]
        n = m[:, 1:].sum(-1).clamp(min=1)
        pi = _seq_logp(policy, ids, m) / n
        with torch.no_grad():
            ref = _seq_logp(reference, ids, m) / n
        out.append(pi - ref)
    return F.softplus(beta * (out[1] - out[0])).mean()


def step_pad_in_place(policy, reference, batch, beta):
    """Marks the uncounted places as -100 and lets cross entropy skip them."""
    def score(model, ids, labels):
        return -F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none").sum(-1)
    delta = []
    for side in ("chosen", "rejected"):
        ids = batch[side + "_ids"]
        inputs = ids.clone()
        labels = ids
        labels[batch[side + "_mask"] == 0] = -100
        with torch.no_grad():
            ref = score(reference, inputs, labels)
        delta.append(score(policy, inputs, labels) - ref)
    return -F.logsigmoid(beta * (delta[0] - delta[1])).mean()


def step_synced_reference(policy, reference, batch, beta):
    """Makes sure that the reference starts from the policy's weights, then one ordinary step."""
    reference.load_state_dict(policy.state_dict())
    reference.requires_grad_(False)
    w = _seq_logp(policy, batch["chosen_ids"], batch["chosen_mask"])
    l = _seq_logp(policy, batch["rejected_ids"], batch["rejected_mask"])
    with torch.no_grad():
        rw = _seq_logp(reference, batch["chosen_ids"], batch["chosen_mask"])
        rl = _seq_logp(reference, batch["rejected_ids"], batch["rejected_mask"])
    return -F.logsigmoid(beta * ((w - l) - (rw - rl))).mean()


# --------------------------------------------------------------------------

R = "right"
NAN = "nan_where_a_pad_is_minus_infinity"

SUBJECTS = [
    # losses, right
    ("loss", "np_logaddexp", np_logaddexp, "numpy", {}, R, ""),
    ("loss", "np_two_branch", np_two_branch, "numpy", {}, R, "per pair"),
    ("loss", "np_abs_trick", np_abs_trick, "numpy", {}, R, "returns a float"),
    ("loss", "np_python_loop", np_python_loop, "numpy", {}, R, "returns a float"),
    ("loss", "np_softmax_of_two_rewards", np_softmax_of_two_rewards, "numpy", {}, R, "tuple"),
    ("loss", "pt_plain", pt_plain, "torch", {}, R, ""),
    ("loss", "pt_softplus", pt_softplus, "torch", {}, R, ""),
    ("loss", "pt_bce", pt_bce, "torch", {}, R, ""),
    ("loss", "pt_cross_entropy_pair", pt_cross_entropy_pair, "torch", {}, R, ""),
    ("loss", "pt_tuple_with_options", pt_tuple_with_options, "torch", {}, R, "tuple; smoothing 0, reference_free off"),
    ("loss", "pt_tuple_raw_rewards", pt_tuple_raw_rewards, "torch", {}, R,
     "tuple; remarks rewards_without_beta, rewards_have_gradient"),
    ("loss", "pt_namedtuple", pt_namedtuple, "torch", {}, R, "named tuple: mean loss, rewards per pair"),
    ("loss", "pt_module", pt_module, "torch", {}, R, "per pair"),
    ("loss", "pt_autograd_function", pt_autograd_function, "torch", {}, R, ""),
    ("loss", "pt_other_grouping", pt_other_grouping, "torch", {}, R,
     "its names are policy_w, reference_w, policy_l, reference_l, but called as (w, l, rw, rl) by position the value is the same"),
    ("loss", "pt_reference_first", pt_reference_first, "torch",
     {"arguments": "ref_logp_w, ref_logp_l, logp_w, logp_l, beta"}, R, "another argument order"),
    ("loss", "np_beta_first", np_beta_first, "numpy",
     {"arguments": "beta, logp_w, logp_l, ref_logp_w, ref_logp_l"}, R, "another argument order"),
    ("loss", "jx_plain", jx_plain, "jax", {}, R, ""),
    ("loss", "jx_vmap", jx_vmap, "jax", {}, R, "per pair"),
    ("loss", "jx_softplus_tuple", jx_softplus_tuple, "jax", {}, R, "tuple"),

    # losses, wrong
    ("loss", "np_softplus_sign", np_softplus_sign, "numpy", {}, ("pair_swapped",), ""),
    ("loss", "np_textbook_sigmoid", np_textbook_sigmoid, "numpy", {}, ("unstable",), ""),
    ("loss", "np_hinge", np_hinge, "numpy", {}, ("other_loss",), "hinge"),
    ("loss", "np_ratio_of_probs", np_ratio_of_probs, "numpy", {}, ("wants_probabilities",), ""),
    ("loss", "np_temperature", np_temperature, "numpy", {}, ("beta_divides",), "equal at beta 1"),
    ("loss", "np_inplace_margin", np_inplace_margin, "numpy", {}, ("inputs_changed",), "value right on the first call"),
    ("loss", "np_half_storage", np_half_storage, "numpy", {}, ("wrong_value",), "no code fits: rounds the inputs to float16"),
    ("loss", "np_beta_on_policy_only", np_beta_on_policy_only, "numpy", {}, ("wrong_value", "beta_missing"),
     "beta is missing on the reference only; no code fits well"),
    ("loss", "np_total", np_total, "numpy", {}, ("sum_over_batch",), ""),
    ("loss", "pt_eps_in_log", pt_eps_in_log, "torch", {}, ("capped", "unstable"), "at most 18.4"),
    ("loss", "pt_softplus_exact", pt_softplus_exact, "torch", {}, ("unstable",), "exp overflows below margin -89 in float32, -710 in float64"),
    ("loss", "pt_ratio_exp", pt_ratio_exp, "torch", {}, ("unstable",), "exp of a sequence log-prob underflows: about -104 in float32, -745 in float64"),
    ("loss", "pt_where_guard", pt_where_guard, "torch", {}, ("unstable", "wrong_gradient"),
     "values right everywhere; gradient NaN where sigmoid underflows"),
    ("loss", "pt_item", pt_item, "torch", {}, ("no_gradient",), "its result says requires_grad, but leads nowhere"),
    ("loss", "pt_frozen_rejected", pt_frozen_rejected, "torch", {}, ("wrong_gradient",), "no code fits: value right, no gradient on the rejected side"),
    ("loss", "pt_beta_in_rewards", pt_beta_in_rewards, "torch", {}, ("beta_twice",), "rewards are right; equal at beta 1"),
    ("loss", "pt_trainer_beta", pt_trainer_beta, "torch", {}, ("beta_ignored",), "always 0.1, right there"),
    ("loss", "pt_beta_as_threshold", pt_beta_as_threshold, "torch", {}, ("wrong_value", "beta_divides", "wrong_gradient"),
     "DPO loss divided by beta, for F.softplus(x, beta) = log(1 + exp(beta x)) / beta; linear (softplus threshold 20) where beta*x > 20"),
    ("loss", "pt_conservative", pt_conservative, "torch", {}, ("label_smoothing",), "0.1 by default"),
    ("loss", "pt_squared", pt_squared, "torch", {}, ("other_loss",), "IPO"),
    ("loss", "pt_one_minus", pt_one_minus, "torch", {}, ("other_loss", "wrong_value"), "1 - sigmoid"),
    ("loss", "pt_reference_free_default", pt_reference_free_default, "torch", {}, ("reference_ignored",), "rewards are without the reference too"),
    ("loss", "pt_copy_paste", pt_copy_paste, "torch", {}, ("reference_is_policy", "reference_ignored"),
     "value always log 2; gradient that of DPO at margin 0"),
    ("loss", "pt_clamped_rewards", pt_clamped_rewards, "torch", {}, ("capped",), "margin within 5"),
    ("loss", "pt_reference_pair_turned", pt_reference_pair_turned, "torch", {}, ("wrong_value", "pair_swapped"),
     "only the reference's pair is swapped: reference added, not subtracted"),
    ("loss", "pt_log_softmax_over_batch", pt_log_softmax_over_batch, "torch", {}, ("wrong_axis",), "softmax over the batch"),
    ("loss", "pt_double_sigmoid", pt_double_sigmoid, "torch", {}, ("other_loss", "wrong_value"), "sigmoid twice"),
    ("loss", "pt_broadcast", pt_broadcast, "torch", {}, ("wrong_axis", "wrong_value"), "all chosen against all rejected; right for a batch of one"),
    ("loss", "pt_ascent", pt_ascent, "torch", {}, ("wrong_value", "negative_logprob"), "minus sign missing"),
    ("loss", "pt_running_centre", pt_running_centre, "torch", {}, ("not_repeatable",), "stateful; right on the very first call only"),
    ("loss", "pt_label_noise", pt_label_noise, "torch", {}, ("not_repeatable",), "random flips of 10% of the pairs; a caller that seeds torch before each call sees a wrong value instead"),
    ("loss", "pt_hand_backward", pt_hand_backward, "torch", {}, ("wrong_gradient",), "no code fits: value right, gradient lacks the factor beta"),
    ("loss", "pt_bfloat", pt_bfloat, "torch", {}, ("wrong_value",), "no code fits: computed in bfloat16"),
    ("loss", "pt_only_misranked", pt_only_misranked, "torch", {}, ("other_loss", "wrong_value", "capped"), "zero where the margin is positive"),
    ("loss", "pt_scores", pt_scores, "torch", {}, ("wants_logits", "wrong_value"),
     "logsigmoid of the inputs first: invisible (under 1e-6) where all inputs are below about -15, so only inputs near 0 can show it"),
    ("loss", "pt_normalised_scores", pt_normalised_scores, "torch", {}, ("wants_logits", "wrong_axis", "wrong_value"),
     "log_softmax over the batch of each input first; per pair; the same constant for all pairs"),
    ("loss", "jx_clip", jx_clip, "jax", {}, ("capped",), "margin within 20"),
    ("loss", "jx_stop_gradient", jx_stop_gradient, "jax", {}, ("no_gradient",), ""),
    ("loss", "jx_log_of_sigmoid", jx_log_of_sigmoid, "jax", {}, ("unstable",), "per pair"),
    ("loss", "jx_summed", jx_summed, "jax", {}, ("sum_over_batch",), ""),
    ("loss", "jx_target_margin", jx_target_margin, "jax", {}, ("other_loss", "wrong_value"), "gamma 0.5 subtracted from the margin"),

    # log-probs, right
    ("logprobs", "pt_lp_gather", pt_lp_gather, "torch", {"layout": "labels"}, R, "remark " + NAN),
    ("logprobs", "pt_lp_cross_entropy", pt_lp_cross_entropy, "torch", {"layout": "labels"}, R, ""),
    ("logprobs", "pt_lp_with_average_switch", pt_lp_with_average_switch, "torch", {"layout": "labels"}, R, "remark mean_by_length_option"),
    ("logprobs", "np_lp_rows", np_lp_rows, "numpy", {"layout": "labels"}, R, ""),
    ("logprobs", "jx_lp_onehot", jx_lp_onehot, "jax", {"layout": "labels"}, R, "remark " + NAN + " (eager; jitted, XLA may hide it)"),
    ("logprobs", "np_lp_shifted_take", np_lp_shifted_take, "numpy", {"layout": "labels_shifted"}, R, ""),
    ("logprobs", "pt_lp_shifted_flat", pt_lp_shifted_flat, "torch", {"layout": "labels_shifted"}, R, ""),
    ("logprobs", "pt_lp_shifted_index_add", pt_lp_shifted_index_add, "torch", {"layout": "labels_shifted"}, R, ""),
    ("logprobs", "jx_lp_shifted_vmap", jx_lp_shifted_vmap, "jax", {"layout": "labels_shifted"}, R, ""),
    ("logprobs", "pt_lp_mask_where", pt_lp_mask_where, "torch", {"layout": "mask"}, R, "log_softmax twice, which changes nothing"),
    ("logprobs", "pt_lp_mask_index_put", pt_lp_mask_index_put, "torch", {"layout": "mask"}, R, ""),
    ("logprobs", "pt_lp_mask_roll", pt_lp_mask_roll, "torch", {"layout": "mask"}, R, "remark " + NAN),
    ("logprobs", "np_lp_mask_fancy", np_lp_mask_fancy, "numpy", {"layout": "mask"}, R, "remark " + NAN),
    ("logprobs", "jx_lp_mask_take", jx_lp_mask_take, "jax", {"layout": "mask"}, R, ""),
    ("logprobs", "np_lp_len_cumsum", np_lp_len_cumsum, "numpy", {"layout": "prompt_lengths"}, R, "needs prompts of at least one token"),
    ("logprobs", "pt_lp_len_slices", pt_lp_len_slices, "torch", {"layout": "prompt_lengths"}, R, "needs prompts of at least one token"),
    ("logprobs", "pt_lp_len_whole_text", pt_lp_len_whole_text, "torch", {"layout": "prompt_lengths"}, R, "remark prompt_counted_cancels"),
    ("logprobs", "jx_lp_len_iota", jx_lp_len_iota, "jax", {"layout": "prompt_lengths"}, R,
     "multiplies by a boolean mask, but XLA on CPU makes a select of it: no NaN seen with -inf at pads (may differ elsewhere)"),

    # log-probs, wrong
    ("logprobs", "pt_lp_same_place", pt_lp_same_place, "torch", {"layout": "labels"}, ("no_shift",), ""),
    ("logprobs", "pt_lp_row_ce", pt_lp_row_ce, "torch", {"layout": "labels"}, ("mean_for_sum",), ""),
    ("logprobs", "pt_lp_clamped_labels", pt_lp_clamped_labels, "torch", {"layout": "labels"}, ("pads_counted", "pad_counted", "wrong_value"),
     "every -100, prompt and padding alike, is counted as token 0"),
    ("logprobs", "pt_lp_inplace_labels", pt_lp_inplace_labels, "torch", {"layout": "labels"}, ("inputs_changed",), "value right on the first call"),
    ("logprobs", "np_lp_wrong_way", np_lp_wrong_way, "numpy", {"layout": "labels"}, ("wrong_value", "no_shift"), "shifted the wrong way: logits[t + 1] for token t"),
    ("logprobs", "jx_lp_softmax_axis", jx_lp_softmax_axis, "jax", {"layout": "labels"}, ("wrong_axis",), "softmax over time"),
    ("logprobs", "np_lp_mask_before_shift", np_lp_mask_before_shift, "numpy", {"layout": "labels"}, ("first_token_missing", "pad_counted"),
     "first response token missed; the place after the end counted as token 0"),
    ("logprobs", "pt_lp_shift_again", pt_lp_shift_again, "torch", {"layout": "labels_shifted"}, ("shifted_twice",), ""),
    ("logprobs", "np_lp_unsummed", np_lp_unsummed, "numpy", {"layout": "labels_shifted"}, ("never_summed",), ""),
    ("logprobs", "pt_lp_forgot_minus", pt_lp_forgot_minus, "torch", {"layout": "labels_shifted"}, ("negative_logprob",), ""),
    ("logprobs", "jx_lp_row_mean", jx_lp_row_mean, "jax", {"layout": "labels_shifted"}, ("mean_for_sum",), ""),
    ("logprobs", "np_lp_eps", np_lp_eps, "numpy", {"layout": "labels_shifted"}, ("capped", "unstable"), "no token below log 1e-9 = -20.7"),
    ("logprobs", "pt_lp_nll_loss", pt_lp_nll_loss, "torch", {"layout": "labels_shifted"}, ("wrong_value",), "no code fits: raw logits summed, never normalised"),
    ("logprobs", "pt_lp_softmax_then_ce", pt_lp_softmax_then_ce, "torch", {"layout": "labels_shifted"}, ("wrong_value",), "no code fits: softmax twice"),
    ("logprobs", "jx_lp_mask_unshifted", jx_lp_mask_unshifted, "jax", {"layout": "mask"}, ("first_token_missing", "pad_counted"),
     "first response token missed, the token after the end counted"),
    ("logprobs", "np_lp_both_places", np_lp_both_places, "numpy", {"layout": "mask"}, ("first_token_missing",), ""),
    ("logprobs", "pt_lp_fill_the_mask", pt_lp_fill_the_mask, "torch", {"layout": "mask"}, ("mask_inverted",), ""),
    ("logprobs", "jx_lp_greedy", jx_lp_greedy, "jax", {"layout": "mask"}, ("tokens_not_used",), "log-prob of the likeliest token"),
    ("logprobs", "pt_lp_detached", pt_lp_detached, "torch", {"layout": "mask"}, ("no_gradient",), "its result says requires_grad, but leads nowhere"),
    ("logprobs", "pt_lp_sum_everything", pt_lp_sum_everything, "torch", {"layout": "mask"}, ("sum_over_batch",), "a scalar"),
    ("logprobs", "np_lp_axis0", np_lp_axis0, "numpy", {"layout": "mask"}, ("wrong_axis",), "returns (T-1,)"),
    ("logprobs", "pt_lp_view_rows", pt_lp_view_rows, "torch", {"layout": "mask"}, ("wrong_value", "not_callable"),
     "right only where all rows have equally many response tokens; raises where the total is no multiple of B"),
    ("logprobs", "pt_lp_log_of_product", pt_lp_log_of_product, "torch", {"layout": "mask"}, ("unstable",), "product underflows for long or unlikely texts"),
    ("logprobs", "pt_lp_time_major", pt_lp_time_major, "torch", {"layout": "mask"}, ("wrong_axis", "wrong_value"), "logits flattened time-major, ids batch-major; right for B = 1"),
    ("logprobs", "np_lp_naive_partition", np_lp_naive_partition, "numpy", {"layout": "mask"}, ("unstable",), "exp of logits above 709 overflows"),
    ("logprobs", "pt_lp_len_prompt_index", pt_lp_len_prompt_index, "torch", {"layout": "prompt_lengths"}, ("first_token_missing",), ""),
    ("logprobs", "np_lp_len_first_prompt", np_lp_len_first_prompt, "numpy", {"layout": "prompt_lengths"}, ("wrong_value", "first_token_missing"),
     "row 0's prompt length for all rows; right where they are equal"),
    ("logprobs", "pt_lp_len_prompt_only", pt_lp_len_prompt_only, "torch", {"layout": "prompt_lengths"}, ("pads_counted", "pad_counted"), "lengths ignored"),
    ("logprobs", "jx_lp_len_added", jx_lp_len_added, "jax", {"layout": "prompt_lengths"}, ("pads_counted", "pad_counted"),
     "takes lengths for the response's length: up to prompt_length pads too many"),
    ("logprobs", "np_lp_len_drop_eos", np_lp_len_drop_eos, "numpy", {"layout": "prompt_lengths"}, ("last_token_missing", "wrong_value"),
     "drops each token that equals the row's last one: the last alone where that id (EOS) occurs once"),
    ("logprobs", "pt_lp_len_stop_early", pt_lp_len_stop_early, "torch", {"layout": "prompt_lengths"}, ("last_token_missing",), ""),

    # steps
    ("step", "step_right_plain", step_right_plain, "torch", {}, R, ""),
    ("step", "step_right_concatenated", step_right_concatenated, "torch", {}, R,
     "pads to one length with id 0 on the right: right for causal models"),
    ("step", "step_right_detach", step_right_detach, "torch", {}, R, ""),
    ("step", "step_reference_in_graph", step_reference_in_graph, "torch", {}, ("reference_gets_gradient",), "value and policy gradient right"),
    ("step", "step_no_grad_helper", step_no_grad_helper, "torch", {}, ("no_gradient",), "value right; result says requires_grad, but leads nowhere"),
    ("step", "step_reference_from_policy", step_reference_from_policy, "torch", {}, ("reference_is_policy",), "value always log 2"),
    ("step", "step_one_mask", step_one_mask, "torch", {}, ("wrong_value", "not_callable"),
     "chosen's mask used on the rejected side; raises where the two lengths T differ"),
    ("step", "step_prompt_mask_on_chosen", step_prompt_mask_on_chosen, "torch", {}, ("prompt_counted_on_one_side",), ""),
    ("step", "step_unshifted", step_unshifted, "torch", {}, ("no_shift",), ""),
    ("step", "step_dropout_on_logits", step_dropout_on_logits, "torch", {}, ("not_repeatable",),
     "F.dropout is on whatever policy.training says; a caller that seeds torch before each call sees a wrong value instead"),
    ("step", "step_interleaved", step_interleaved, "torch", {}, ("wrong_value", "pair_swapped"), "concatenated halves read as interleaved; right for B = 1"),
    ("step", "step_length_normalised", step_length_normalised, "torch", {}, ("mean_for_sum",), ""),
    ("step", "step_pad_in_place", step_pad_in_place, "torch", {}, ("inputs_changed",), "value right on the first call"),
    ("step", "step_synced_reference", step_synced_reference, "torch", {}, ("reference_is_policy", "inputs_changed"),
     "overwrites the reference's weights; value always log 2"),
]
