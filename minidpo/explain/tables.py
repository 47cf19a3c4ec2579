"""An explained pair as tables for a terminal."""

import unicodedata
from collections.abc import Sequence

from ..tokenizer import printable
from .displacement import ROUNDING, Step
from .tokens import END, PairView, quoted
from .ways import Ways, largest_differences

PREFIX = {"shared": "=", "branch": "^", "own": ""}


def text_of(tokens: Sequence[str]) -> str:
    """The tokens as one text, without end-of-text."""
    return "".join(token for token in tokens if token != END)


def width(text: str) -> int:
    """The number of terminal columns that a text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def aligned(view: PairView) -> str:
    """Prompt and responses on lines of their own, with a mark below the tokens that the responses share."""
    chosen, rejected = ([token.token for token in side] for side in (view.chosen, view.rejected))
    marks = "=" * width(printable(text_of(chosen[: view.shared]))) + ("^" if view.branches else "")
    parts = (("prompt", view.prompt), ("chosen", chosen), ("rejected", rejected))
    lines = [f"{name:<9} {printable(text_of(tokens))}" for name, tokens in parts]
    note = f"tokens shared: {view.shared}" + ("; the two pushes on them cancel" if view.shared else "")
    return "\n".join([*lines, f"{'':<9} {marks} {note}"])


def tokens_as_text(view: PairView) -> str:
    """One token per line: the shared ones, then the rest of the chosen and of the rejected response."""
    titles = ("p", "log pi", "log ref", "ratio", "so far", "dL/dlogp", "|dL/ds|")
    lines = [f"{'':<20}" + "".join(f"{title:>10}" for title in titles) + "  logits up / down, -dL/ds"]
    sides = (("chosen", view.chosen), ("rejected", view.rejected))
    for name, part in (("shared", view.chosen[: view.shared]), *[(name, side[view.shared :]) for name, side in sides]):
        lines += [name] if part else []
        for t, token in enumerate(part, start=0 if name == "shared" else view.shared):
            up, down = (" ".join(f"{quoted(c)} {push:+.2g}" for c, push in side) for side in (token.up, token.down))
            coefficient = "cancels" if token.row == "shared" else f"{token.coefficient:+.3g}"
            figures = (token.logp, token.ref_logp, token.log_ratio, token.reward)
            lines.append(
                f"{PREFIX[token.row]:>1} {t:>4} {quoted(token.token):<13}{token.probability:>10.5f}"
                + "".join(f"{figure:>10.4f}" for figure in figures)
                + f"{coefficient:>10}{token.gradient_norm:>10.1e}"
                + (f"  {up} / {down}" if token.up else "")
            )
    if view.branches:
        lines.append("^ one row of logits, two tokens: the softmax cancels, so one token is pushed up, the other down")
    return "\n".join([*lines, "so far: the implicit reward, beta times the sum of ratios; s: the row of logits"])


def totals(view: PairView) -> list[tuple[str, ...]]:
    """The four log-probabilities and their differences: name, policy, reference, log-ratio, reward."""
    rows = (
        ("log pi(chosen)", view.logp_w, view.ref_logp_w, view.logp_w - view.ref_logp_w, f"{view.reward_w:.4f}"),
        ("log pi(rejected)", view.logp_l, view.ref_logp_l, view.logp_l - view.ref_logp_l, f"{view.reward_l:.4f}"),
        ("gap", view.policy_gap, view.reference_gap, view.margin, f"{view.beta * view.margin:.4g}"),
    )
    return [(name, *[f"{x:.4f}" for x in logps], reward) for name, *logps, reward in rows]


def loss_line(view: PairView) -> str:
    """The margin, z, the weight and the loss."""
    return (
        f"margin {view.margin:.4f}, z = {view.beta:g} margin = {view.beta * view.margin:.4g}, "
        f"weight sigma(-z) {view.weight:.4g}, loss -log sigma(z) {view.loss:.4g}"
    )


def summary(view: PairView) -> str:
    """The four log-probabilities, and the loss that they make."""
    lines = [f"{'':<15}{'policy':>12}{'reference':>12}{'log-ratio':>12}{'reward':>12}"]
    lines += [f"{name:<16}{policy:>11}" + "".join(f"{x:>12}" for x in rest) for name, policy, *rest in totals(view)]
    return "\n".join([*lines, loss_line(view), view.says])


def ways_as_text(rows: Sequence[Ways]) -> str:
    """The gradient in four ways, and the largest difference between them."""
    lines = [f"{'dL/d':<32}{'formula':>16}{'per logit':>16}{'autograd':>16}{'difference':>16}"]
    for name, *ways in rows:
        lines.append(f"{name:<32}" + "".join(f"{'':>16}" if way is None else f"{way:>16.8g}" for way in ways))
    exact, finite = largest_differences(rows)
    largest = max(abs(row.autograd) for row in rows)
    note = f"largest difference: {exact:.0e} among the first three, {finite:.0e} to the fourth"
    return "\n".join([*lines, f"{note}; largest entry {largest:.2g}"])


def step_as_text(plain: Step, adam: Step) -> str:
    """The prediction and the measurement of a step, beside a step of AdamW at the same rate."""
    lines = [
        f"K_ww {plain.K_ww:.4g}, K_wl {plain.K_wl:.4g}, K_ll {plain.K_ll:.4g}; rate {plain.learning_rate:g}",
        f"{'change of':<18}{'own push':>12}{'cross push':>12}{'predicted':>12}{'measured':>12}{'ratio':>10}"
        f"{'AdamW':>12}",
    ]
    for name in ("chosen", "rejected"):
        change, other = getattr(plain, name), getattr(adam, name)
        ratio = f"{change.measured / change.predicted:.5f}" if abs(change.predicted) > ROUNDING else "rounding"
        lines.append(
            f"{f'log pi({name})':<18}{change.own:>+12.3e}{change.cross:>+12.3e}{change.predicted:>+12.3e}"
            f"{change.measured:>+12.3e}{ratio:>10}{other.measured:>+12.3e}"
        )
    lines += [
        "K_ab: the inner product of the gradients of log pi(a) and log pi(b); w chosen, l rejected.",
        "own push: from this response's gradient; cross push: from the other response's, through shared parameters.",
        "AdamW: its first step at the same rate, which the kernel does not predict.",
    ]
    return "\n".join(lines)
