"""Whether the implicit reward is a proxy of the true reward that withstands pressure.

h(x, y) = beta (log pi(y|x) - log pi_ref(y|x)) is pressed in two ways: by taking the reply with the largest h of N that
the reference gave, and by edits of a reply that raise h. Goodhart's law: a measure that becomes a target ceases to be a
good measure. Source: Gao et al. 2023 (arXiv 2210.10760), who press learned reward models.
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

SIZES = (1, 2, 4, 8, 16, 32, 64)
Text = tuple[tuple[int, ...], tuple[int, ...]]  # ids of a prompt and of a reply to it
Model = Checkpoint[Any]


def text(model: Model, prompt: str, reply: str) -> Text:
    """The ids of a customer's line and of a complete reply."""
    x, y = (tuple(model.tokenizer.encode(part)) for part in (prompt + TURN, reply))
    return (END_OF_TEXT, *x), (*y, END_OF_TEXT)


def implicit_rewards(policy: Model, reference: Model, beta: float, texts: Sequence[Text], size: int = 32) -> Array:
    """beta (log pi(y|x) - log pi_ref(y|x)) of each text (x, y); equal texts have equal bits.  -> (n,)"""
    pairs = []  # of replies to one prompt, which is then computed once for both
    for x, group in itertools.groupby(sorted(set(texts)), key=lambda each: each[0]):
        replies = sorted((y for _, y in group), key=len)
        pairs += [(x, w, l) for w, l in zip(replies[::2], [*replies[1::2], replies[-1]])]
    reward: dict[Text, float] = {}
    batches = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    for batch in counted(batches, f"implicit reward: batches of {size} pairs"):
        logps, ref_logps = (shared_logprobs(model.params, model.config, batch) for model in (policy, reference))
        for place, (logp, ref_logp) in enumerate(zip(logps, ref_logps), start=1):
            ratio = to_host(logp.data).astype("float64") - to_host(ref_logp.data)
            reward.update(zip(((pair[0], pair[place]) for pair in batch), (beta * ratio).tolist()))
    return numpy.array([reward[each] for each in texts])


def candidates(reference: Model, prompts: Sequence[str], seed: int, n: int = SIZES[-1]) -> list[list[Text]]:
    """n replies of the reference to each prompt, each from its own random stream.  -> (P, n) texts"""
    result = []
    for i, prompt in enumerate(counted(prompts, f"{n} replies to each prompt: prompts")):
        x, rngs = text(reference, prompt, "")[0], [stream(seed, "best-of-n", i, j) for j in range(n)]
        samples = generate(reference.params, reference.config, [x] * n, rngs, reference.config.n_positions)
        result.append([(x, tuple(y)) for y in samples.responses])
    return result


def best_of(score: Array, value: Array, size: int) -> float:
    """The exact mean value of the best by score of all subsets of a size.  (n,), (n,) -> ()

        sum_k C(k-1, size-1)/C(n, size) value_(k),   k = 1 ... n in the order of the score; equal scores share

    Source: Nakano et al. 2021 (arXiv 2112.09332).
    """
    n = len(score)
    weight = [math.comb(k, size - 1) / math.comb(n, size) for k in range(n)]  # k scores are lower
    _, group, ties = numpy.unique(score, return_inverse=True, return_counts=True)  # numbered in the order of the score
    return float((numpy.bincount(numpy.sort(group), weight) / ties)[group] @ value)


class Best(NamedTuple):
    """The best of N replies of the reference."""

    size: int  # N
    kl: float  # log N - (N-1)/N, nats: the choice moves the reference at most so far (Beirami et al. 2024, 2401.01879)
    implicit: Estimate  # of the best by implicit reward
    true: Estimate  # of the same
    garbled: Estimate  # of the same: the share that the grammar lacks, with Wilson's interval
    ceiling: Estimate  # true reward of the best by true reward


def goodhart(implicit: Array, true: Array, garbled: Array, sizes: Sequence[int] = SIZES) -> list[Best]:
    """Goodhart's curve from the rewards of n replies to each of P prompts, and which are garbled, each (P, n)."""
    rows = []
    for N in sizes:
        columns = [(implicit, implicit), (implicit, true), (implicit, garbled), (true, true)]
        own, gold, bad, best = ([best_of(*each, N) for each in zip(score, value)] for score, value in columns)
        rows.append(Best(N, math.log(N) - (N - 1) / N, mean(own), mean(gold), share(bad), mean(best)))
    return rows


def best_of_reference(
    policy: Model, reference: Model, beta: float, prompts: Sequence[str], seed: int
) -> dict[str, list[Best]]:
    """Goodhart's curve of a policy's implicit reward on the desk, for the prompts of each slice and for all."""
    rows = candidates(reference, prompts, seed)
    implicit = implicit_rewards(policy, reference, beta, [each for row in rows for each in row])
    judgements = [world.judgement(x, reference.tokenizer.decode(y)) for x, row in zip(prompts, rows) for _, y in row]
    true, garbled = numpy.array([(each.reward, not each.well_formed) for each in judgements]).T
    columns = [each.reshape(len(prompts), -1) for each in (implicit, true, garbled)]
    slices = numpy.array([world.PROMPTS[x].slice for x in prompts])
    parts = {name: slices == name for name in world.SLICES if name in slices} | {"all": slices != ""}
    return {name: goodhart(*(each[part] for each in columns)) for name, part in parts.items()}


def goodhart_text(rows: Sequence[Best]) -> str:
    """Goodhart's curve as a table."""
    titles = ("implicit reward", "true reward", "garbled", "if chosen by true")
    lines = [f"{'best of':<8}{'KL below':>9}" + "".join(f"{title:>22}" for title in titles)]
    lines += [f"{row.size:<8}{row.kl:>9.2f}" + "".join(f"{each!s:>22}" for each in row[2:]) for row in rows]
    return "\n".join(lines)


def panels(rows: Sequence[Best]) -> list[Panel]:
    """Goodhart's curve: true reward, implicit reward and garbled replies of the best of N."""
    places, xlabel = [f"{row.size}\n{row.kl:.2f}" for row in rows], "N; below it, the nats of KL that it costs at most"
    result = []
    shown = {"true reward": ["true", "ceiling"], "implicit reward": ["implicit"], "share garbled": ["garbled"]}
    for title, names in shown.items():
        curves = []
        for name in names:
            estimates, judge = [getattr(row, name) for row in rows], "true" if name == "ceiling" else "implicit"
            error = [(each.value - each.low, each.high - each.value) for each in estimates]
            values = [each.value for each in estimates]
            curves.append(Curve(f"chosen by {judge} reward", range(len(rows)), values, "o", error=error))
        result.append(Panel(f"{title} of the best of N", xlabel, "mean, with 95 %", curves, places=places))
    return result


PARTS = {  # of each reply of the grammar
    opener + body.format(t=topic) + closer: (opener, body, topic if "{t}" in body else None, closer)
    for body in itertools.chain(*world.DEEDS.values())
    for opener, topic, closer in itertools.product(world.OPENERS, world.TOPICS, world.CLOSERS)
}


def edits(prompt: str, reply: str) -> dict[str, list[str]]:
    """What each kind of edit makes of a reply of the grammar; a deed that needs a topic gets the customer's."""
    opener, body, topic, closer = PARTS[reply]
    topic = topic or world.PROMPTS[prompt].topic
    own, letters = body.format(t=topic), [i for i, c in enumerate(reply) if c.isalpha()]
    deeds = itertools.chain(*world.DEEDS.values())
    kinds = {
        "another opener": [each + own + closer for each in world.OPENERS],
        "another topic": [opener + body.format(t=each) + closer for each in world.TOPICS],
        "another deed": [opener + each.format(t=topic) + closer for each in deeds],
        "another closer": [opener + own + each for each in world.CLOSERS],
        "a second opener": [each + reply for each in world.OPENERS if opener],
        "a second closer": [reply + each for each in world.CLOSERS if closer],
        "a letter dropped": [reply[:i] + reply[i + 1 :] for i in letters],
        "a letter doubled": [reply[: i + 1] + reply[i:] for i in letters],
    }
    return {kind: sorted(set(texts) - {reply}) for kind, texts in kinds.items()}


class Change(NamedTuple):
    """An edit, and by how much it raises either reward."""

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
    share: Estimate  # of the replies, those that have an edit that does both
    worst: Change | None  # of the edits that do both, the one that raises the implicit reward most


def pressed(score: Callable[[list[tuple[str, str]]], Array], replies: Sequence[tuple[str, str]]) -> dict[str, Edits]:
    """Edit replies of the grammar, (prompt, reply), and count what raises the score and lowers the true reward."""
    replies = list(dict.fromkeys(replies))
    variants: dict[str, list[tuple[str, str, str]]] = {}
    for x, y in replies:
        for kind, texts in edits(x, y).items():
            variants.setdefault(kind, []).extend((x, y, new) for new in texts)
    distinct = list(dict.fromkeys([*replies, *((x, new) for group in variants.values() for x, _, new in group)]))
    implicit = dict(zip(distinct, score(distinct).tolist()))
    reward = {each: world.judgement(*each).reward for each in distinct}
    result = {}
    for kind, group in variants.items():
        changes = [
            Change(*e, implicit[e[0], e[2]] - implicit[e[:2]], reward[e[0], e[2]] - reward[e[:2]]) for e in group
        ]
        both = [each for each in changes if each.implicit > 0 > each.true]
        tried, fooled = ({each[:2] for each in some} for some in (changes, both))
        raising, lowering = sum(each.implicit > 0 for each in changes), sum(each.true < 0 for each in changes)
        worst = max(both, key=lambda each: each.implicit, default=None)
        fraction = share([each in fooled for each in tried])
        result[kind] = Edits(len(changes), raising, lowering, len(both), fraction, worst)
    return result


def edits_of_policy(
    policy: Model, reference: Model, beta: float, replies: Sequence[tuple[str, str]]
) -> dict[str, Edits]:
    """What edits of a policy's well-formed replies do to its implicit reward and to the true one."""

    def score(texts: Sequence[tuple[str, str]]) -> Array:
        return implicit_rewards(policy, reference, beta, [text(policy, *each) for each in texts])

    return pressed(score, [(x, y) for x, y in replies if y in PARTS])


def edits_text(kinds: Mapping[str, Edits]) -> str:
    """The edits as a table, and the worst of each kind."""
    lines = [f"{'edit':<18}{'n':>6}{'implicit up':>13}{'true down':>11}{'both':>7}{'replies with both':>22}"]
    for kind, row in kinds.items():
        lines.append(f"{kind:<18}{row.n:>6}{row.raising:>13}{row.lowering:>11}{row.both:>7}{row.share!s:>22}")
    for kind, worst in ((kind, row.worst) for kind, row in kinds.items() if row.worst):
        lines += ["", f"{kind}: implicit {worst.implicit:+.2f}, true {worst.true:+d}  ({printable(worst.prompt)})"]
        lines += [f"  {printable(worst.reply)}", f"  {printable(worst.edited)}"]
    return "\n".join(lines)
