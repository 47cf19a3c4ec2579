"""Replies of models of the desk, judged by the true reward: how good they are in each slice, and how they fail."""

import collections
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..data import world
from ..data.world import Judgement
from ..run.checkpoint import Checkpoint
from ..run.workers import Workers, worker_count
from ..scoring import packed_logprobs
from ..streams import stream
from ..tokenizer import END_OF_TEXT, TURN, printable
from .intervals import Estimate, mean, paired, share

RATES = ("declined", "answered", "garbled", "on_topic", "polite")
TITLES = {  # of the rows of a table; declined and answered mean opposite things in different slices
    "reward": "true reward", "gain": "gain over {}", "better": "replies better", "equal": "replies equal",
    "worse": "replies worse",
    **{name: name.replace("_", " ") for name in RATES}, "length": "length, tokens", "kl": "KL to {}",
}  # fmt: skip
Figures = dict[str, dict[str, Any]]  # by slice, and "all"; counts, and Estimates


class Judged(NamedTuple):
    """A model's replies to some prompts."""

    replies: list[str]
    judgements: list[Judgement]
    lengths: list[int]  # tokens, end-of-text among them
    ratios: list[float]  # log pi(y|x) - log pi_ref(y|x), whose mean is an estimate of KL(pi || pi_ref)

    def summary(self) -> dict[str, float]:
        """Means over all replies, for the log of a run."""
        shares = {name: [getattr(each, name) for each in self.judgements] for name in ("reward", "well_formed")}
        return {f"judge/{name}": statistics.fmean(x) for name, x in {**shares, "kl": self.ratios}.items()}


def judged(
    model: Checkpoint[Any], reference: Checkpoint[Any], prompts: Sequence[str], seed: int, template: str = "as trained"
) -> Judged:
    """Draw a reply to each prompt, written in a template of `world.TEMPLATES`, and judge it.

    Each prompt has its own random stream: models that are asked the same draw with the same random numbers.
    """
    if reference.config.n_positions < model.config.n_positions:
        raise ValueError(
            f"the reference has n_positions = {reference.config.n_positions} and the model "
            f"{model.config.n_positions}: it cannot score every reply"
        )
    asked = [world.TEMPLATES[template](x) + TURN for x in prompts]
    ids = [[END_OF_TEXT, *model.tokenizer.encode(x)] for x in asked]
    rngs = [stream(seed, "judge", i) for i in range(len(ids))]
    with Workers(min(len(ids), worker_count(model.params))) as workers:
        drawn = workers.generate(model.params, model.config, ids, rngs, model.config.n_positions)
    replies = [model.tokenizer.decode(y) for y in drawn.responses]
    ratios = [
        math.fsum(logps) - packed_logprobs(reference.params, reference.config, [(x, y)]).data.sum().item()
        for x, y, logps in zip(ids, drawn.responses, drawn.logprobs)
    ]
    judgements = [world.judgement(x, y) for x, y in zip(prompts, replies)]
    return Judged(replies, judgements, list(map(len, drawn.responses)), ratios)


def slices(prompts: Sequence[str]) -> dict[str, list[int]]:
    """Which prompts are in each slice, and all of them."""
    names = [world.PROMPTS[x].slice for x in prompts]
    parts = {name: [i for i, each in enumerate(names) if each == name] for name in world.SLICES}
    return {**{name: part for name, part in parts.items() if part}, "all": list(range(len(prompts)))}


def figures(own: Judged, ref: Judged, prompts: Sequence[str]) -> Figures:
    """What the replies of a model are worth in each slice, and the paired difference to the reference's."""
    result: Figures = {}
    for name, part in slices(prompts).items():
        verdicts, others = ([each.judgements[i] for i in part] for each in (own, ref))
        rewards = [each.reward for each in verdicts]
        row: dict[str, Any] = {"n": len(part), "reward": mean(rewards)}
        row |= paired(rewards, [each.reward for each in others])
        row |= {rate: share([getattr(each, rate) for each in verdicts]) for rate in RATES}
        row |= {"length": mean([own.lengths[i] for i in part]), "kl": mean([own.ratios[i] for i in part])}
        result[name] = row
    for rate in ("declined", "answered"):
        del result["all"][rate]
    return result


def as_text(models: Mapping[str, Figures], reference: str) -> str:
    """A table for each slice, one column per model."""
    width = max(24, *(len(name) + 2 for name in models))
    lines = []
    for part in next(iter(models.values())):
        count = next(iter(models.values()))[part]["n"]
        lines += ["", f"{part + f', {count} replies':<22}" + "".join(f"{name:>{width}}" for name in models)]
        for name, title in TITLES.items():
            cells = [str(each[part][name]) for each in models.values() if name in each[part]]
            lines += [f"{title.format(reference):<22}" + "".join(f"{cell:>{width}}" for cell in cells)] if cells else []
    return "\n".join(lines[1:])


def records(models: Mapping[str, Judged], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """For each prompt, every model's reply, its true reward and its reasons."""
    return [
        {
            "prompt": x,
            "slice": world.PROMPTS[x].slice,
            "replies": {
                name: {"reply": each.replies[i], **each.judgements[i]._asdict(), "faults": each.judgements[i].faults}
                for name, each in models.items()
            },
        }
        for i, x in enumerate(prompts)
    ]


def templates(own: Mapping[str, Judged], ref: Mapping[str, Judged], name: str, reference: str) -> str:
    """A table of what replies are worth, by the template that the prompts were written in."""
    lines = [f"{name + ' and ' + reference:<20}{'reward':>24}{reference:>24}{'gain':>24}{'garbled':>24}"]
    for template, each in own.items():
        rewards, others = ([verdict.reward for verdict in x.judgements] for x in (each, ref[template]))
        garbled = share([verdict.garbled for verdict in each.judgements])
        cells = mean(rewards), mean(others), paired(rewards, others)["gain"], garbled
        lines.append(f"{template:<20}" + "".join(f"{cell!s:>24}" for cell in cells))
    return "\n".join(lines)


def failures(own: Judged, ref: Judged, prompts: Sequence[str], most: int, name: str, reference: str) -> str:
    """How often each fault is in each slice, the worst replies, and those that became worse than the reference's."""
    parts = {part: places for part, places in slices(prompts).items() if part != "all"}
    counts = {
        part: collections.Counter(f for i in places for f in own.judgements[i].faults) for part, places in parts.items()
    }
    faults = sorted({fault for count in counts.values() for fault in count})
    lines = [f"{name}: faults of {len(prompts)} replies", f"{'':<18}" + "".join(f"{part:>12}" for part in parts)]
    lines += [f"{'replies':<18}" + "".join(f"{len(places):>12}" for places in parts.values())]
    lines += [f"{fault:<18}" + "".join(f"{counts[part][fault]:>12}" for part in parts) for fault in faults]
    rewards, others = ([each.reward for each in judged.judgements] for judged in (own, ref))
    worst = sorted(range(len(prompts)), key=lambda i: rewards[i])
    lost = sorted((i for i in worst if rewards[i] < others[i]), key=lambda i: rewards[i] - others[i])

    def entry(i: int, against: bool) -> list[str]:
        faults = ", ".join(own.judgements[i].faults)
        first = f"{printable(prompts[i])}  ({world.PROMPTS[prompts[i]].slice}{'; ' * bool(faults)}{faults})"
        former = [f"  {others[i]:+d}  {printable(ref.replies[i])}  ({reference})"] * against
        return [first, *former, f"  {rewards[i]:+d}  {printable(own.replies[i])}"]

    lines += ["", f"the worst {min(most, len(worst))}", *(line for i in worst[:most] for line in entry(i, False))]
    if own is not ref:
        lines += ["", f"worse than {reference}'s: {len(lost)}, those that lost most"]
        lines += [line for i in lost[:most] for line in entry(i, True)]
    return "\n".join(lines)


def flat(figures: Figures) -> dict[str, Estimate]:
    """Every figure by the name that a gate gives it: "benign/declined", "reward/gain" for all slices."""
    result = {}
    for part, row in figures.items():
        for name, value in row.items():
            metric = "reward/gain" if name == "gain" else name
            number = value if isinstance(value, Estimate) else Estimate(value, value, value)
            result[metric if part == "all" else f"{part}/{metric}"] = number
    return result
