"""What a person sees of an explained pair: tables in a terminal, and a page for a browser."""

import html
import unicodedata
from collections.abc import Sequence

from ..tokenizer import printable
from .displacement import ROUNDING, Step
from .tokens import END, PairView, TokenView, Ways, largest_differences, quoted

# ---- in a terminal -------------------------------------------------------------------------------------------

PREFIX = {"shared": "=", "branch": "^", "own": ""}


def text_of(tokens: Sequence[str]) -> str:
    """The tokens as one text, without end-of-text."""
    return "".join(token for token in tokens if token != END)


def width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def branches(view: PairView) -> bool:
    """Whether there is a row of logits at which the responses part."""
    return any(token.row == "branch" for token in view.chosen)


def aligned(view: PairView) -> str:
    """Prompt and responses below each other, with a mark below what the responses share."""
    chosen, rejected = ([token.token for token in side] for side in (view.chosen, view.rejected))
    marks = "=" * width(printable(text_of(chosen[: view.shared]))) + ("^" if branches(view) else "")
    parts = (("prompt", view.prompt), ("chosen", chosen), ("rejected", rejected))
    lines = [f"{name:<9} {printable(text_of(tokens))}" for name, tokens in parts]
    told = f"tokens shared: {view.shared}" + ("; what they are pushed by cancels" if view.shared else "")
    return "\n".join([*lines, f"{'':<9} {marks} {told}"])


def tokens_as_text(view: PairView) -> str:
    """One token a line: the shared ones, then the rest of the chosen and of the rejected response."""
    titles = ("p", "log pi", "log ref", "ratio", "so far", "dL/dlogp", "|dL/ds|")
    lines = [f"{'':<20}" + "".join(f"{title:>10}" for title in titles) + "  logits up / down, -dL/ds"]
    sides = (("chosen", view.chosen), ("rejected", view.rejected))
    for name, part in (("shared", view.chosen[: view.shared]), *[(name, side[view.shared :]) for name, side in sides]):
        lines += [name] if part else []
        for t, token in enumerate(part, start=0 if name == "shared" else view.shared):
            moved = [" ".join(f"{quoted(c)} {push:+.2g}" for c, push in side) for side in (token.up, token.down)]
            coefficient = "cancels" if token.row == "shared" else f"{token.coefficient:+.3g}"
            figures = (token.logp, token.ref_logp, token.log_ratio, token.reward)
            lines.append(
                f"{PREFIX[token.row]:>1} {t:>4} {quoted(token.token):<13}{token.probability:>10.5f}"
                + "".join(f"{figure:>10.4f}" for figure in figures)
                + f"{coefficient:>10}{token.gradient_norm:>10.1e}"
                + (f"  {moved[0]} / {moved[1]}" if token.up else "")
            )
    branch = "^ one row of logits, two tokens: the softmax cancels, what is left pushes one up and the other down"
    so_far = "so far: the implicit reward up to the token, beta times the sum of the ratios; s: the row of logits"
    return "\n".join([*lines, *([branch] if branches(view) else []), so_far])


def totals(view: PairView) -> list[tuple[str, ...]]:
    """The four log-probabilities and their differences: name, policy, reference, log-ratio, reward."""
    rows = (
        ("log pi(chosen)", view.logp_w, view.ref_logp_w, view.logp_w - view.ref_logp_w, f"{view.reward_w:.4f}"),
        ("log pi(rejected)", view.logp_l, view.ref_logp_l, view.logp_l - view.ref_logp_l, f"{view.reward_l:.4f}"),
        ("gap", view.policy_gap, view.reference_gap, view.margin, f"{view.beta * view.margin:.4g}"),
    )
    return [(name, *[f"{x:.4f}" for x in logps], reward) for name, *logps, reward in rows]


def made_of_it(view: PairView) -> str:
    """What the loss makes of the margin."""
    return (
        f"margin {view.margin:.4f}, z = {view.beta:g} margin = {view.beta * view.margin:.4g}, "
        f"weight sigma(-z) {view.weight:.4g}, loss -log sigma(z) {view.loss:.4g}"
    )


def summary(view: PairView) -> str:
    """The four log-probabilities and what the loss makes of them."""
    return "\n".join(
        [
            f"{'':<15}{'policy':>12}{'reference':>12}{'log-ratio':>12}{'reward':>12}",
            *[f"{name:<16}{policy:>11}" + "".join(f"{x:>12}" for x in rest) for name, policy, *rest in totals(view)],
            made_of_it(view),
            view.says,
        ]
    )


def ways_as_text(rows: Sequence[Ways]) -> str:
    """The table of the four ways, and the largest difference between them."""
    lines = [f"{'dL/d':<32}{'formula':>16}{'per logit':>16}{'autograd':>16}{'difference':>16}"]
    for name, *ways in rows:
        lines.append(f"{name:<32}" + "".join(f"{'':>16}" if way is None else f"{way:>16.8g}" for way in ways))
    exact, finite = largest_differences(rows)
    largest = max(abs(row.autograd) for row in rows)
    told = f"largest difference: {exact:.0e} among the first three, {finite:.0e} to the fourth"
    return "\n".join([*lines, f"{told}; largest entry {largest:.2g}"])


def step_as_text(plain: Step, adam: Step) -> str:
    """What a step was predicted to do and did; beside it, a step of AdamW at the same rate."""
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
    return "\n".join(
        [
            *lines,
            "K_ab: the inner product of the gradients of log pi(a) and log pi(b), w chosen, l rejected.",
            "own push: by what the loss asks of this response; cross push: by what it asks of the other, through the",
            "parameters that both use. AdamW: its first step at the same rate, which the kernel does not predict.",
        ]
    )


# ---- in a browser --------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --fg: #1a1a1a; --bg: #fff; --dim: #595959; --line: #767676;
  --up: #8ab8ff; --down: #ffb066; }
@media (prefers-color-scheme: dark) {
  :root { --fg: #ececec; --bg: #16181c; --dim: #adadad; --line: #8a8a8a; --up: #2a62b5; --down: #9c4f08; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1rem 16rem; background: var(--bg); color: var(--fg);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.5rem 0 .3rem; }
.text, button, td, th { font-family: ui-monospace, monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.tokens { margin: 0; padding: 0; } .word { display: inline-flex; flex-wrap: wrap; }
button { display: inline-flex; flex-direction: column; align-items: center; min-width: 1.5rem; min-height: 2.6rem;
  margin: 0 1px 2px 0; padding: .1rem .15rem; border: 1px solid transparent; border-radius: .2rem; font-size: 1rem;
  line-height: 1.2; color: var(--fg); background: color-mix(in srgb, var(--tint) var(--hard), transparent); }
button small { font-size: .7rem; } .up { --tint: var(--up); } .down { --tint: var(--down); }
.none { --tint: transparent; } .shared { --tint: transparent; border: 1px dashed var(--line); }
button:hover, button:focus { outline: 2px solid var(--fg); outline-offset: 0; }
[role=tooltip] { position: fixed; inset: auto 0 0; margin: 0 auto; max-width: 60rem; padding: .7rem 1rem;
  visibility: hidden; background: var(--bg); border-top: 2px solid var(--fg); font-size: .9rem; max-height: 15rem;
  overflow: auto; z-index: 1; }
button:hover + [role=tooltip], button:focus + [role=tooltip], [role=tooltip]:hover { visibility: visible; }
button:hover + [role=tooltip] { z-index: 2; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
td, th { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th[scope=row] { text-align: left; }
"""
SIGNS = {"up": "\u25b2", "down": "\u25bc", "shared": "=", "none": "\u00b7"}
PUSHED = {"up": "pushed up", "down": "pushed down", "shared": "shared, the two pushes cancel", "none": "not pushed"}
NAMES = {" ": "space", "\n": "newline", END: "end of text"}
FACES = {" ": "\u2423", "\n": "\u21b5", END: "end"}
COLUMNS = ("token", "p", "log pi", "log pi_ref", "log-ratio", "reward so far", "dL/dlogp", "push", "|dL/ds|")


def escaped(text: str) -> str:
    """A text that stays text on a page: nothing in it is markup, and what cannot be seen is written out."""
    return html.escape(printable(text))


def direction(token: TokenView) -> str:
    """Where a token's own logit is pushed."""
    if token.row == "shared":
        return "shared"
    return "up" if token.push > 0 else "down" if token.push < 0 else "none"


def figures(token: TokenView) -> list[str]:
    """A token's numbers, in the order of the columns."""
    own = (token.logp, token.ref_logp, token.log_ratio, token.reward)
    pushes = (token.coefficient, token.push, token.gradient_norm)
    told = [f"{token.probability:.5f}", *[f"{x:.4f}" for x in own], *[f"{x:.2g}" for x in pushes]]
    return [*told[:5], "cancels", *told[6:]] if token.row == "shared" else told


def token_button(token: TokenView, name: str, hardest: float) -> str:
    """One token: its sign can be read without colour, its numbers appear on hover and on focus."""
    where = direction(token)
    face, spoken = FACES.get(token.token, token.token), NAMES.get(token.token, token.token)
    moved = [
        f"{title} {', '.join(f'{escaped(quoted(c))} {push:+.2g}' for c, push in part)}"
        for title, part in (("up:", token.up), ("down:", token.down))
        if part
    ]
    told = [f"{title} {figure}" for title, figure in zip(COLUMNS[1:], figures(token))]
    branch = ["Here the responses part: one row of logits, two tokens."] if token.row == "branch" else []
    tip = "<br>".join([f"<b>{escaped(quoted(token.token))}</b> {PUSHED[where]}", ", ".join(told)])
    tip += "".join(f"<br>{line}" for line in [*branch, "; ".join(moved)] if line)
    return (
        f'<button type="button" class="{where}" style="--hard: {100 * abs(token.push) / hardest:.0f}%" '
        f'aria-label="{escaped(spoken)}, {PUSHED[where]}" aria-describedby="{name}">'
        f'{escaped(face)}<small aria-hidden="true">{SIGNS[where]}</small></button>'
        f'<span role="tooltip" id="{name}">{tip}</span>'
    )


def response_section(
    title: str, name: str, tokens: Sequence[TokenView], logp: float, reward: float, hardest: float
) -> str:
    """A response as tinted tokens, broken into lines at its spaces."""
    words = [""]
    for t, token in enumerate(tokens):
        words[-1] += token_button(token, f"{name}-{t}", hardest)
        words += [""] if token.token.isspace() else []
    spans = "\n".join(f'<span class="word">{word}</span>' for word in words if word)
    return f'<h2>{title}: log pi {logp:.4f}, implicit reward {reward:.4f}</h2>\n<div class="tokens">\n{spans}\n</div>'


def token_table(title: str, tokens: Sequence[TokenView]) -> str:
    """The numbers of a response, for whoever would rather read them all."""
    heads = "".join(f'<th scope="col">{title}</th>' for title in COLUMNS)
    rows = "\n".join(
        f'<tr><th scope="row">{SIGNS[direction(token)]} {escaped(quoted(token.token))}</th>'
        + "".join(f"<td>{figure}</td>" for figure in figures(token))
        + "</tr>"
        for token in tokens
    )
    return (
        f'<div class="wide" role="region" aria-label="{title}" tabindex="0"><table><caption>{title}</caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )


def page(view: PairView) -> str:
    """One HTML page that needs nothing else: no script, no network; a policy in it forbids both."""
    hardest = max((abs(token.push) for token in view.chosen + view.rejected), default=0.0) or 1.0
    four = "\n".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{x}</td>" for x in figures) + "</tr>"
        for name, *figures in totals(view)
    )
    heads = "<td></td>"
    heads += "".join(f'<th scope="col">{name}</th>' for name in ("policy", "reference", "log-ratio", "reward"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>One preference pair under the DPO loss</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>One preference pair under the DPO loss</h1>
<p>{escaped(view.says)}</p>
<p>{SIGNS["up"]} and {SIGNS["down"]}: a step down the gradient pushes this token's logit up or down, the harder the
stronger the tint. {SIGNS["shared"]}: both responses have this token, and their pushes cancel. Point at a token, or
reach it with the tab key, for its numbers; <a href="#numbers">or read them all</a>.</p>
<h2>Prompt</h2>
<p class="text">{escaped(text_of(view.prompt))}</p>
{response_section("Chosen", "w", view.chosen, view.logp_w, view.reward_w, hardest)}
{response_section("Rejected", "l", view.rejected, view.logp_l, view.reward_l, hardest)}
<h2>The pair</h2>
<div class="wide" role="region" aria-label="The pair" tabindex="0"><table>
<caption>Log-probabilities in nats; {made_of_it(view)}</caption>
<thead><tr>{heads}</tr></thead>
<tbody>
{four}
</tbody></table></div>
<h2 id="numbers">Every number</h2>
{token_table("The chosen response", view.chosen)}
{token_table("The rejected response", view.rejected)}
</main>
</body>
</html>
"""
