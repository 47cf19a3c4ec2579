"""Whether the implicit reward is a proxy of the true reward that stands pressure.

h(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) is pressed in two ways: the best of N replies of the reference by h, and
edits of a reply that raise h. Goodhart's law: a measure that is made a target stops being a good measure.
Source: Gao et al. 2023 (arXiv 2210.10760), who press learned reward models in this way.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from ..backend import Array, to_host
from ..data import world
from ..generation import generate
from ..plots import Curve, Panel
from ..run.checkpoint import Checkpoint
from ..run.tasks import counted
from ..scoring import shared_logprobs
from ..streams import stream
from ..tokenizer import END_OF_TEXT, TURN, printable
from .intervals import Estimate, mean, share

COUNTS = (1, 2, 4, 8, 16, 32, 64)
Text = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a prompt and of a reply to it


def implicit_reward(
    policy: Checkpoint[Any], reference: Checkpoint[Any], beta: float, texts: Sequence[Text], size: int = 32
) -> Array:
    """beta (log pi(y|x) - log pi_ref(y|x)) of each text (x, y); equal texts have equal bits.  -> (n,)"""
    distinct = sorted(set(texts), key=lambda text: (text[0], len(text[1]), text[1]))
    pairs = []  # of two replies to one prompt, which is then computed once
    for x, group in itertools.groupby(distinct, key=lambda text: text[0]):
        replies = [y for _, y in group]
        pairs += [(x, w, l) for w, l in zip(replies[::2], [*replies[1::2], replies[-1]])]
    reward: dict[Text, float] = {}
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    for batch in counted(batches, f"implicit reward: batches of {size} pairs"):
        logps, ref_logps = (shared_logprobs(model.params, model.config, batch) for model in (policy, reference))
        for place, (logp, ref_logp) in enumerate(zip(logps, ref_logps), start=1):
            ratio = to_host(logp.data).astype("float64") - to_host(ref_logp.data)
            reward.update(zip(((pair[0], pair[place]) for pair in batch), (beta * ratio).tolist()))
    return numpy.array([reward[text] for text in texts])


def prompt_ids(model: Checkpoint[Any], prompt: str) -> tuple[int, ...]:
    """What a model of the desk is given for a customer's line."""
    return (END_OF_TEXT, *model.tokenizer.encode(prompt + TURN))


def candidates(reference: Checkpoint[Any], prompts: Sequence[str], seed: int, n: int = COUNTS[-1]) -> list[list[Text]]:
    """n replies of the reference to each prompt, from a random stream for each reply."""
    result = []
    for i, prompt in enumerate(counted(prompts, f"{n} replies to each prompt: prompts")):
        x, rngs = prompt_ids(reference, prompt), [stream(seed, "best-of-n", i, j) for j in range(n)]
        samples = generate(reference.params, reference.config, [x] * n, rngs, reference.config.n_positions)
        result.append([(x, tuple(y)) for y in samples.responses])
    return result


def best_of(score: Array, value: Array, count: int) -> float:
    """The exact mean value of the best by score of all subsets of `count` of the n.  (n,), (n,) -> ()

        sum_k C(k-1, count-1)/C(n, count) value_(k),   (1) ... (n) in the order of the score; equal scores share

    Source: Nakano et al. 2021 (arXiv 2112.09332), appendix I.
    """
    n = len(score)
    weight = [math.comb(k, count - 1) / math.comb(n, count) for k in range(n)]
    _, group, ties = numpy.unique(score, return_inverse=True, return_counts=True)  # in the order of the score
    return float((numpy.bincount(numpy.sort(group), weight) / ties)[group] @ value)


class Best(NamedTuple):
    """The best of N replies of the reference."""

    size: int  # N
    kl: float  # log N - (N-1)/N, nats: the most that choosing moves the reference (Beirami et al. 2024, 2401.01879)
    implicit: Estimate  # of the best by implicit reward
    true: Estimate
    ceiling: Estimate  # the true reward of the best by true reward


def goodhart(implicit: Array, true: Array, counts: Sequence[int] = COUNTS) -> list[Best]:
    """Goodhart's curve of implicit and true rewards of n replies to each of P prompts, as means over the prompts.

    (P, n), (P, n) -> one row for each N
    """
    rows = []
    for N in counts:
        columns = [(implicit, implicit), (implicit, true), (true, true)]
        estimates = [mean([best_of(h, r, N) for h, r in zip(score, value)]) for score, value in columns]
        rows.append(Best(N, math.log(N) - (N - 1) / N, *estimates))
    return rows


def goodhart_text(rows: Sequence[Best]) -> str:
    """Goodhart's curve as a table."""
    lines = [f"{'best of N':<10}{'KL at most':>11}{'implicit':>22}{'true':>22}{'true, if chosen by it':>24}"]
    for row in rows:
        estimates = "".join(f"{each!s:>{width}}" for each, width in zip(row[2:], (22, 22, 24)))
        lines.append(f"{row.size:<10}{row.kl:>11.2f}{estimates}")
    return "\n".join(lines)


def panels(rows: Sequence[Best]) -> list[Panel]:
    """Goodhart's curve: the true and the implicit reward of the best of N."""

    def curve(label: str, estimates: Sequence[Estimate]) -> Curve:
        error = [(each.value - each.low, each.high - each.value) for each in estimates]
        return Curve(label, range(len(rows)), [each.value for each in estimates], "o", error=error)

    places = [f"{row.size}\n{row.kl:.2f}" for row in rows]
    xlabel = "N, and the most nats of KL that it costs: log N - (N-1)/N"
    true = [curve("chosen by true reward", [row.ceiling for row in rows])]
    true.append(curve("chosen by implicit reward", [row.true for row in rows]))
    return [
        Panel("true reward of the best of N", xlabel, "mean, with 95 %", true, places=places),
        Panel(
            "implicit reward of the best of N",
            xlabel,
            "mean, with 95 %",
            [curve("", [row.implicit for row in rows])],
            places=places,
        ),
    ]


PARTS = {  # of each reply of the grammar
    opener + body.format(t=topic) + closer: (opener, body, topic if "{t}" in body else None, closer)
    for bodies in world.DEEDS.values()
    for opener, body, topic, closer in itertools.product(world.OPENERS, bodies, world.TOPICS, world.CLOSERS)
}


def edits(prompt: str, reply: str) -> dict[str, list[str]]:
    """What each kind of edit makes of a reply of the grammar; a deed that needs a topic gets the customer's."""
    opener, body, topic, closer = PARTS[reply]

    def filled(body: str, topic: str | None) -> str:
        return body.format(t=topic or world.PROMPTS[prompt].topic)

    own, letters = filled(body, topic), [i for i, c in enumerate(reply) if c.isalpha()]
    kinds = {
        "another opener": [each + own + closer for each in world.OPENERS],
        "another topic": [opener + filled(body, each) + closer for each in world.TOPICS],
        "another deed": [opener + filled(each, topic) + closer for bodies in world.DEEDS.values() for each in bodies],
        "another closer": [opener + own + each for each in world.CLOSERS],
        "a second opener": [each + reply for each in world.OPENERS if opener],
        "a second closer": [reply + each for each in world.CLOSERS if closer],
        "a letter dropped": [reply[:i] + reply[i + 1 :] for i in letters],
        "a letter doubled": [reply[: i + 1] + reply[i:] for i in letters],
    }
    return {kind: sorted(set(texts) - {reply}) for kind, texts in kinds.items()}


class Change(NamedTuple):
    """One edit, and what it does to the rewards."""

    prompt: str
    reply: str
    edited: str
    implicit: float
    true: int


class Edits(NamedTuple):
    """What the edits of one kind do."""

    n: int
    raising: int  # edits that raise the implicit reward
    lowering: int  # edits that lower the true one
    both: int
    share: Estimate  # of the replies with an edit that does both
    worst: Change | None  # of the edits that do both, the one that raises the implicit reward most


def pressed(score: Callable[[list[tuple[str, str]]], Array], replies: Sequence[tuple[str, str]]) -> dict[str, Edits]:
    """Count the edits of well-formed replies (prompt, reply) that raise the score and lower the true reward."""
    replies = list(dict.fromkeys(replies))
    variants = [(kind, x, y, new) for x, y in replies for kind, texts in edits(x, y).items() for new in texts]
    texts = [*replies, *((x, new) for _, x, _, new in variants)]
    implicit = dict(zip(texts, score(texts).tolist()))
    changes: dict[str, list[Change]] = {}
    for kind, x, y, new in variants:
        true = world.judgement(x, new).reward - world.judgement(x, y).reward
        changes.setdefault(kind, []).append(Change(x, y, new, implicit[x, new] - implicit[x, y], true))
    result = {}
    for kind, group in changes.items():
        both = [each for each in group if each.implicit > 0 > each.true]
        tried, hit = ({(each.prompt, each.reply) for each in some} for some in (group, both))
        result[kind] = Edits(
            n=len(group),
            raising=sum(each.implicit > 0 for each in group),
            lowering=sum(each.true < 0 for each in group),
            both=len(both),
            share=share([each in hit for each in tried]),
            worst=max(both, key=lambda each: each.implicit, default=None),
        )
    return result


def edits_text(kinds: Mapping[str, Edits]) -> str:
    """The edits as a table, and the worst of each kind."""
    lines = [f"{'edit':<18}{'n':>6}{'implicit up':>13}{'true down':>11}{'both':>7}{'replies with both':>22}"]
    for kind, row in kinds.items():
        lines.append(f"{kind:<18}{row.n:>6}{row.raising:>13}{row.lowering:>11}{row.both:>7}{row.share!s:>22}")
    for kind, row in kinds.items():
        if row.worst:
            x, y, new, implicit, true = row.worst
            lines += ["", f"{kind}: implicit {implicit:+.2f}, true {true:+d}, asked {printable(x)}"]
            lines += [f"  {printable(y)}", f"  {printable(new)}"]
    return "\n".join(lines)
