"""An explained pair as one HTML page; the template is page.html."""

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template

from ..tokenizer import printable
from .tables import loss_line, text_of, totals
from .tokens import END, PairView, TokenView, quoted

SIGNS = {"up": "\u25b2", "down": "\u25bc", "shared": "=", "none": "\u00b7"}
PUSHES = {"up": "pushed up", "down": "pushed down", "shared": "shared, the two pushes cancel", "none": "not pushed"}
NAMES = {" ": "space", "\n": "newline", END: "end of text"}
FACES = {" ": "\u2423", "\n": "\u21b5", END: "end"}
COLUMNS = ("token", "p", "log pi", "log pi_ref", "log-ratio", "reward so far", "dL/dlogp", "push", "|dL/ds|")


def escaped(text: str) -> str:
    """A text that cannot become markup, with its unprintable characters written out."""
    return html.escape(printable(text))


def direction(token: TokenView) -> str:
    """The direction in which a token's own logit is pushed."""
    if token.row == "shared":
        return "shared"
    return "up" if token.push > 0 else "down" if token.push < 0 else "none"


def figures(token: TokenView) -> list[str]:
    """A token's sign and name, then its numbers, in the order of the columns."""
    logps = (token.logp, token.ref_logp, token.log_ratio, token.reward)
    coefficient = "cancels" if token.row == "shared" else f"{token.coefficient:.2g}"
    pushes = [f"{token.push:.2g}", f"{token.gradient_norm:.2g}"]
    head = f"{SIGNS[direction(token)]} {escaped(quoted(token.token))}"
    return [head, f"{token.probability:.5f}", *[f"{x:.4f}" for x in logps], coefficient, *pushes]


def token_button(token: TokenView, name: str, hardest: float) -> str:
    """One token: a sign shows its push without colour, and its numbers appear on hover and on focus."""
    push, quote = direction(token), escaped(quoted(token.token))
    face, spoken = FACES.get(token.token, token.token), NAMES.get(token.token, token.token)
    moves = [
        f"{title} {', '.join(f'{escaped(quoted(c))} {push:+.2g}' for c, push in part)}"
        for title, part in (("up:", token.up), ("down:", token.down))
        if part
    ]
    numbers = ", ".join(f"{title} {figure}" for title, figure in zip(COLUMNS[1:], figures(token)[1:]))
    branch = "The responses part here: one row of logits, two tokens." if token.row == "branch" else ""
    lines = [f"<b>{quote}</b> {PUSHES[push]}", numbers, branch, "; ".join(moves)]
    return (
        f'<button type="button" class="{push}" style="--hard: {100 * abs(token.push) / hardest:.0f}%" '
        f'aria-label="{escaped(spoken)}, {PUSHES[push]}" aria-describedby="{name}">'
        f'{escaped(face)}<small aria-hidden="true">{SIGNS[push]}</small></button>'
        f'<span role="tooltip" id="{name}">{"<br>".join(filter(None, lines))}</span>'
    )


def words(tokens: Sequence[TokenView], name: str, hardest: float) -> str:
    """A response as tinted tokens, which may break into lines after its spaces."""
    parts = [""]
    for t, token in enumerate(tokens):
        parts[-1] += token_button(token, f"{name}-{t}", hardest)
        parts += [""] if token.token.isspace() else []
    return "\n".join(f'<span class="word">{part}</span>' for part in parts if part)


def rows(table: Iterable[Sequence[str]]) -> str:
    """The rows of a table, each a head and its cells."""
    return "\n".join(
        f'<tr><th scope="row">{head}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>' for head, *cells in table
    )


def page(view: PairView) -> str:
    """The page: no script, no network, and a content policy that forbids both."""
    hardest = max((abs(token.push) for token in view.chosen + view.rejected), default=0.0) or 1.0
    template = Template((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        SIGNS,
        says=escaped(view.says),
        prompt=escaped(text_of(view.prompt)),
        chosen=words(view.chosen, "w", hardest),
        rejected=words(view.rejected, "l", hardest),
        loss_line=loss_line(view),
        totals=rows(totals(view)),
        columns="".join(f'<th scope="col">{title}</th>' for title in COLUMNS),
        chosen_rows=rows(map(figures, view.chosen)),
        rejected_rows=rows(map(figures, view.rejected)),
        **{name: f"{getattr(view, name):.4f}" for name in ("logp_w", "logp_l", "reward_w", "reward_l")},
    )
