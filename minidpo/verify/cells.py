"""What a score counts, read from its gradient, and what is wrong with it.

For a score that is a sum of w log pi[t, v], the gradient in row t of the logits is w (onehot(v) - softmax): so it says
which (row, token) entered, with which weight. Our batches have no token twice in a text, so a token names its place.
"""

from typing import NamedTuple

import numpy

from ..backend import Array
from .loss_check import close
from .report import Report
from .texts import Texts

Cells = dict[tuple[int, int], float]  # (row, token) of one text -> weight
MOST = 12  # tokens of one row that a score may count


def cells(gradient: Array, logits: Array) -> tuple[Cells, str]:
    """The weights w of (row, token) in a sum of w log pi, and what is wrong if it is no such sum.  (T, V), (T, V)"""
    found: Cells = {}
    for t in numpy.flatnonzero(abs(gradient).max(axis=-1) > 1e-7):
        g = gradient[t]
        p = numpy.exp(logits[t] - numpy.logaddexp.reduce(logits[t]))
        total = float(numpy.median(-g / p))  # most tokens enter through the softmax alone
        weights = g + total * p
        entered = numpy.flatnonzero(abs(weights) > 1e-4 * max(1e-3, abs(weights).max()))
        if abs(total) < 1e-9 and len(entered) < MOST:
            return {}, "logits are added up without log_softmax"
        if not 1 <= len(entered) <= MOST or abs(weights.sum() - total) > 1e-4 * max(1e-3, abs(total)):
            return {}, "it is not a sum of log-probabilities"
        for v in entered:
            found[int(t), int(v)] = float(weights[v])
    return found, ""


def places(row: list[int], found: Cells) -> tuple[int, dict[int, float], dict[int, int]]:
    """The shift that most cells have (0: row t - 1 predicts token t), the weight of each place, and the strange tokens.

    A strange token is not the one at any place near its row; it is given by row.
    """
    shifts = [t + 1 - p for t, v in found for p, token in enumerate(row) if token == v and abs(t + 1 - p) <= 2]
    shift = max(sorted(set(shifts), key=abs), key=shifts.count) if shifts else 0
    counted: dict[int, float] = {}
    strange: dict[int, int] = {}
    for (t, v), weight in found.items():
        place = t + 1 - shift
        if 0 <= place < len(row) and row[place] == v:
            counted[place] = counted.get(place, 0.0) + weight
        else:
            strange[t] = v
    return shift, counted, strange


def picture(texts: Texts, counted: list[Cells]) -> str:
    """The places of each text: what was counted above what should have been."""
    lines = ["counted (#) and what counts (=), by place; p prompt, r response, . pad"]
    for b, found in enumerate(counted):
        n, length, row = int(texts.prompt_lengths[b]), int(texts.lengths[b]), texts.rows[b]
        _, places_counted, _ = places(row, found)
        kinds = "".join("p" if t < n else "r" if t < length else "." for t in range(len(row)))
        lines.append(f"  text {b}  {kinds}")
        lines.append("          " + "".join("#" if t in places_counted else " " for t in range(len(row))))
        lines.append("          " + "".join("=" if n <= t < length else " " for t in range(len(row))))
    return "\n".join(lines)


class Beside(NamedTuple):
    """What is counted of one text beside what counts, by place; of other tokens than the text's, by row."""

    shift: int
    prompt: set[int]
    pads: set[int]
    missing: set[int]
    fillers: dict[int, int]  # in rows that no token of the response needs
    strange: dict[int, int]  # in rows of the response


def beside(texts: Texts, b: int, found: Cells) -> Beside:
    """Sort the cells of text b."""
    n, length = int(texts.prompt_lengths[b]), int(texts.lengths[b])
    shift, counted, odd = places(texts.rows[b], found)
    wanted = set(range(n, length))
    own = {p - 1 + shift for p in wanted}
    return Beside(
        shift,
        prompt={p for p in counted if p < n},
        pads={p for p in counted if p >= length},
        missing=wanted - set(counted),
        fillers={t: v for t, v in odd.items() if t not in own},
        strange={t: v for t, v in odd.items() if t in own},
    )


def diagnose(report: Report, texts: Texts, counted: list[Cells], average: str = "") -> None:
    """Compare what was counted with what counts, and name the difference; `average` is an option of the subject."""
    empty = [not found and len(y) > 1 for found, y in zip(counted, texts.responses)]
    if any(empty) or not any(counted):
        report.fault("wrong_value", f"nothing of text {empty.index(True) if any(empty) else 0} is counted")
        return
    if _looked_up(texts, counted):
        _weights(report, texts, counted, average)
        _places(report, texts, [beside(texts, b, found) for b, found in enumerate(counted)])
    else:
        report.fault("tokens_not_used", "the text's tokens are never looked up: other tokens are counted in their rows")


def _looked_up(texts: Texts, counted: list[Cells]) -> bool:
    """Whether the tokens counted are mostly those of the text, or else in other rows than the response's."""
    foreign = 0
    for b, (row, found) in enumerate(zip(texts.rows, counted)):
        foreign += sum(not 0 <= t + 1 < len(row) or row[t + 1] != v for t, v in found)
        if {t for t, _ in found} != {p - 1 for p in range(texts.prompt_lengths[b], texts.lengths[b])}:
            return True
    return 2 * foreign <= sum(map(len, counted))


def _weights(report: Report, texts: Texts, counted: list[Cells], average: str) -> None:
    """Name weights that are not 1."""
    weights = [numpy.array(list(found.values())) for found in counted if found]
    lengths = [len(y) for y, found in zip(texts.responses, counted) if found]
    size, own, T = [float(numpy.median(each)) for each in weights], list(map(len, weights)), texts.ids.shape[1]

    def one_over(*counts: int) -> bool:
        return all(any(close(abs(s) * n, 1.0, 1e-3) for n in (each, *counts)) for s, each in zip(size, own))

    if all(s < 0 for s in size):
        report.fault("negative_logprob", "the sign is missing: it gives -log pi(y|x)")
    if all(close(abs(s), 1 / n, 1e-4) for s, n in zip(size, lengths)) and max(lengths) > 1:
        if average:
            report.remark("mean_by_length_option", f"the option {average} divides by the length: DPO sums")
        report.fault("mean_for_sum", "it is the mean over the response's tokens, and DPO sums them", 1.0, size)
    elif all(close(abs(s), 1.0, 1e-4) for s in size):
        if any(abs(w / s - 1).max() > 1e-3 for w, s in zip(weights, size)):
            report.fault("wrong_value", "tokens are counted with unequal weights", 1.0, weights[0].tolist())
    elif one_over(T):
        report.fault("mean_for_sum", "it is a mean over tokens, and DPO sums them", 1.0, size)
    elif one_over(T - 1, sum(lengths)):
        report.fault("mean_for_sum", "it is divided by a number of tokens, and DPO sums them", 1.0, size)
    else:
        report.fault("wrong_value", "each log-probability is multiplied by a factor", 1.0, size)


SHIFTS = {
    1: ("no_shift", "row t is read for token t: it must be row t - 1, which has not seen it"),
    2: ("no_shift", "row t + 1 is read for token t: it is shifted in the wrong direction"),
    -1: ("shifted_twice", "row t - 2 is read for token t: it is shifted twice"),
    -2: ("shifted_twice", "row t - 3 is read for token t: it is shifted too often"),
}


def _places(report: Report, texts: Texts, found: list[Beside]) -> None:
    """Name rows that are shifted, tokens of the response that are missing, and places that do not count."""
    shifts = [each.shift for each in found]
    shift = max(sorted(set(shifts), key=abs), key=shifts.count)
    if shift:
        report.fault(*SHIFTS[shift])
    if all(len(each.missing) == len(y) for each, y in zip(found, texts.responses)) and any(e.prompt for e in found):
        report.fault("mask_inverted", "the prompt and the pads are counted and the response is not: it is inverted")
        return
    _missing(report, texts, [each.missing for each in found], shift)
    extra = [len(each.pads) + len(each.fillers) for each in found]
    if max(extra) == 1:
        report.fault("pad_counted", "one pad after the response is counted")
    elif any(extra):
        token = next((v for each in found for v in each.fillers.values()), None)
        as_what = "" if token is None else f" as token {token}"
        report.fault("pads_counted", f"places where nothing counts are counted{as_what}")
    if any(each.prompt for each in found):
        _prompts(report, texts, [each.prompt for each in found])
    if any(each.strange for each in found) and not report.findings:
        report.fault("wrong_value", "other tokens than those of the text are counted")


def _missing(report: Report, texts: Texts, missing: list[set[int]], shift: int) -> None:
    """Name the tokens of responses that are not counted."""
    some = [(m, int(n), int(end) - 1) for m, n, end in zip(missing, texts.prompt_lengths, texts.lengths) if m]
    if some and all(m == {first} for m, first, _ in some):
        report.fault("first_token_missing", "the first token of a response is not counted")
    elif some and all(m == {last} for m, _, last in some):
        report.fault("last_token_missing", "the last token of a response, end-of-text, is not counted")
    elif some and (not shift or any(len(m) > 2 for m, _, _ in some)):
        firsts, lasts = all(first in m for m, first, _ in some), all(last in m for m, _, last in some)
        code = "first_token_missing" if firsts else "last_token_missing" if lasts else "wrong_value"
        report.fault(code, "tokens of a response are not counted", None, [sorted(m) for m in missing])


def _prompts(report: Report, texts: Texts, counted: list[set[int]]) -> None:
    """Say what it means that tokens of prompts are counted."""
    if not all(c for c, n in zip(counted, texts.prompt_lengths) if n > 1):
        report.fault("prompt_counted_on_one_side", "the prompt is counted in some texts and not in others")
        return
    whole = all(c >= set(range(1, n)) for c, n in zip(counted, texts.prompt_lengths))
    what = "the prompt is" if whole else "tokens of the prompt are"
    if any(finding.code == "mean_for_sum" for finding in report.findings):
        report.fault("prompt_counted_on_one_side", f"{what} counted, too, which does not cancel in a mean")
        return
    report.remark("prompt_counted_cancels", f"{what} counted, too: it cancels in the DPO loss of sums, not in means, "
                  "in IPO by length or in logged log-probabilities")  # fmt: skip
