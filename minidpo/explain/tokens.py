"""One preference pair, token by token: each token's share of the loss, and the push of the loss on its logits.

All of it is computed in float64. A row of logits belongs to a context, the prompt and the tokens so far. While two
responses agree they share rows, and the row at which they part predicts a token of each.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

from .. import losses, ops
from ..backend import Array, to_host
from ..model import Config, Params, forward
from ..scoring import Pair, collate
from ..tensor import Tensor
from ..tokenizer import END as END
from ..tokenizer import Tokenizer

Push = tuple[str, float]  # a token, and -dL/ds at its logit
DERIVED = "shared policy_gap reference_gap margin reward_w reward_l weight loss says".split()


@dataclass(frozen=True)
class TokenView:
    """One token of a response, as the loss sees it; s is the row of logits that predicts it."""

    token: str
    id: int
    row: str  # "shared" by both responses' equal tokens, "branch" where they part, "own"
    probability: float
    logp: float  # nats
    ref_logp: float
    log_ratio: float  # logp - ref_logp
    reward: float  # beta (sum of the log-ratios so far): the implicit reward of the response up to here
    coefficient: float  # dL/dlogp: -beta sigma(-z) in the chosen response, +beta sigma(-z) in the rejected
    push: float  # -dL/ds at the token itself
    gradient_norm: float  # |dL/ds|
    up: list[Push]  # the logits of s that a step down the gradient raises most
    down: list[Push]  # and lowers most


@dataclass(frozen=True)
class PairView:
    """One pair under the DPO loss; log-probabilities are in nats."""

    prompt: list[str]
    chosen: list[TokenView]
    rejected: list[TokenView]
    beta: float
    logp_w: float
    logp_l: float
    ref_logp_w: float
    ref_logp_l: float
    ids: Pair

    shared = property(lambda self: shared_rows(*self.ids[1:])[0])  # tokens that both responses begin with
    policy_gap = property(lambda self: self.logp_w - self.logp_l)
    reference_gap = property(lambda self: self.ref_logp_w - self.ref_logp_l)
    margin = property(lambda self: (self.logp_w - self.ref_logp_w) - (self.logp_l - self.ref_logp_l))
    reward_w = property(lambda self: self.beta * (self.logp_w - self.ref_logp_w))
    reward_l = property(lambda self: self.beta * (self.logp_l - self.ref_logp_l))
    branches = property(lambda self: any(token.row == "branch" for token in self.chosen))  # a shared row, two tokens

    @property
    def weight(self) -> float:
        """sigma(-z), z = beta margin: the share of its full pull that the pair still has."""
        gradient_w, _ = losses.dpo_gradient(self.logp_w, self.logp_l, self.ref_logp_w, self.ref_logp_l, self.beta)
        return -float(gradient_w) / self.beta

    @property
    def loss(self) -> float:
        return losses.dpo_loss(self.logp_w, self.logp_l, self.ref_logp_w, self.ref_logp_l, self.beta).loss.item()

    @property
    def says(self) -> str:
        """The pair in two sentences."""
        if self.ids[1] == self.ids[2]:
            return "The responses are identical: every push cancels, and only rounding is left of the gradient."
        gap = f"{abs(self.margin):.3f} nats {'larger' if self.margin > 0 else 'smaller'} than" if self.margin else "as"
        return (
            f"Relative to the reference, log pi(chosen) has moved by {self.logp_w - self.ref_logp_w:+.3f} nats and "
            f"log pi(rejected) by {self.logp_l - self.ref_logp_l:+.3f}: the first minus the second is {gap} under the "
            f"reference. At beta {self.beta:g} the implicit rewards give the label a probability of "
            f"sigma(z) = {1 - self.weight:.3f}, so the pair pulls with weight sigma(-z) = {self.weight:.3g}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Fields and properties as dicts, lists, strings and numbers, which `json.dumps` takes."""
        return asdict(self) | {name: getattr(self, name) for name in DERIVED}


def quoted(token: str) -> str:
    """A token that is safe to print: a character is in quotes and escaped, so that a space is visible."""
    return token if len(token) > 1 else repr(token)


def double(params: Params, requires_grad: bool = True) -> Params:
    """A copy on the host, in float64."""
    return {name: Tensor(to_host(p.data).astype("float64"), requires_grad) for name, p in params.items()}


def shared_rows(w: Sequence[int], l: Sequence[int]) -> tuple[int, int]:
    """The number of tokens that both responses begin with, and of the rows of logits that they share."""
    tokens = next((t for t, (a, b) in enumerate(zip(w, l)) if a != b), min(len(w), len(l)))
    return tokens, min(tokens + 1, len(w), len(l))


def context_logits(params: Params, config: Config, pair: Pair) -> Tensor:
    """The logits of a pair's contexts, each once: those of the chosen response, then the other's own.  -> (N, V)"""
    x, w, l = pair
    _, rows = shared_rows(w, l)
    of_w, of_l = (forward(params, config, [[*x, *y][:-1]])[0, len(x) - 1 :] for y in (w, l))  # (Tw, V), (Tl, V)
    return ops.concatenate(of_w, of_l[rows:])  # (Tw + Tl - rows, V)


def context_rows(pair: Pair) -> tuple[list[int], list[int]]:
    """The row of `context_logits` that predicts each token of the chosen and of the rejected response."""
    _, w, l = pair
    _, rows = shared_rows(w, l)
    return list(range(len(w))), [*range(rows), *range(len(w), len(w) + len(l) - rows)]


def context_logprobs(logits: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the chosen and of the rejected response.  (N, V) -> (Tw,), (Tl,)"""
    logp = ops.log_softmax(logits)
    w, l = (ops.gather(logp[numpy.array(rows)], list(y)) for rows, y in zip(context_rows(pair), pair[1:]))
    return w, l


def context_gradient(logits: Array, pair: Pair, gradient_w: float, gradient_l: float) -> Array:
    """dL/dlogits in closed form, from dL/dlogp_w and dL/dlogp_l.  (N, V) -> (N, V)

        dL/ds = sum of c (onehot(y) - softmax(s)) over the tokens y that the row s predicts,
        c = dL/dlogp_w = -beta sigma(-z) for a token of the chosen response, dL/dlogp_l for one of the rejected

    Since dL/dlogp_l = -dL/dlogp_w, two equal tokens cancel. Where the responses part only the softmax cancels.
    """
    onehot = numpy.eye(logits.shape[1])
    probability = ops.softmax.raw(logits)[0]
    gradient = numpy.zeros(logits.shape)
    for c, rows, y in zip((gradient_w, gradient_l), context_rows(pair), pair[1:]):
        for row, token in zip(rows, y):
            gradient[row] += c * (onehot[token] - probability[row])
    return gradient


def pair(
    policy: Params,
    reference: Params,
    config: Config,
    prompt: Sequence[int],
    chosen: Sequence[int],
    rejected: Sequence[int],
    beta: float = 0.1,
    tokenizer: Tokenizer | None = None,
    reference_config: Config | None = None,
) -> PairView:
    """One pair, token by token: each token's share of the loss, and the push of the loss on its logits.

    Without a tokenizer, tokens are named by their ids, as #7. Raises FloatingPointError if a log-probability is not
    finite. Source: Rafailov et al. 2023 (arXiv 2305.18290), section 4, "What does the DPO update do?".
    """
    ((x, w, l),) = collate([(prompt, chosen, rejected)]).pairs
    ids = (x, w, l)
    logits = context_logits(double(policy, False), config, ids)
    ref_logits = context_logits(double(reference, False), reference_config or config, ids)
    token_logps = [logp.data for logp in context_logprobs(logits, ids)]
    ref_token_logps = [logp.data for logp in context_logprobs(ref_logits, ids)]
    logp_w, logp_l, ref_logp_w, ref_logp_l = (float(logp.sum()) for logp in (*token_logps, *ref_token_logps))
    for name, logps in (("policy", (logp_w, logp_l)), ("reference", (ref_logp_w, ref_logp_l))):
        if not all(map(math.isfinite, logps)):
            raise FloatingPointError(f"a log-probability under the {name} is not finite")
    coefficients = [float(g) for g in losses.dpo_gradient(logp_w, logp_l, ref_logp_w, ref_logp_l, beta)]
    gradient = context_gradient(logits.data, ids, *coefficients)
    equal, rows_shared = shared_rows(w, l)

    def name_of(token: int) -> str:
        text = f"#{token}" if tokenizer is None else tokenizer.decode([token])
        return END if token == config.eos_token_id else text

    def views(side: int) -> list[TokenView]:
        tokens = []
        ratios = token_logps[side] - ref_token_logps[side]
        for t, (token, row) in enumerate(zip(ids[1 + side], context_rows(ids)[side])):
            push = -gradient[row]
            order = [int(i) for i in push.argsort(kind="stable")]
            tokens.append(
                TokenView(
                    token=name_of(token),
                    id=token,
                    row="shared" if t < equal else "branch" if t < rows_shared else "own",
                    probability=math.exp(token_logps[side][t]),
                    logp=float(token_logps[side][t]),
                    ref_logp=float(ref_token_logps[side][t]),
                    log_ratio=float(ratios[t]),
                    reward=beta * float(ratios[: t + 1].sum()),
                    coefficient=coefficients[side],
                    push=float(push[token]) + 0.0,  # -0 becomes 0
                    gradient_norm=float((push**2).sum() ** 0.5),
                    up=[(name_of(i), float(push[i])) for i in order[::-1][:3] if push[i] > 0],
                    down=[(name_of(i), float(push[i])) for i in order[:3] if push[i] < 0],
                )
            )
        return tokens

    prompt_tokens = [name_of(token) for token in x]
    return PairView(prompt_tokens, views(0), views(1), beta, logp_w, logp_l, ref_logp_w, ref_logp_l, ids)
