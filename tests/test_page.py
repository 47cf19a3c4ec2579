"""The page and the tables of a pair: nothing is lost, nothing turns into markup, nothing is fetched."""

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from minidpo import Tensor, explain, model, optim
from minidpo.explain import displacement, page, tables
from minidpo.model import Config
from minidpo.tokenizer import Tokenizer

TOKENIZER = Tokenizer("".join(sorted(set("\n\x07 abcdehilnoprst!<>/\"'&=.()1"))))
CONFIG = Config(TOKENIZER.vocab_size, 64, 8, 1, 2)


def view(chosen="<script>", rejected="</span><b>", prompt="<i>\n", beta=0.2):
    policy, reference = (model.init(CONFIG, np.random.default_rng(seed)) for seed in (0, 1))
    for p in policy.values():
        p.data = p.data + np.float32(0.2)
    ids = [[0, *TOKENIZER.encode(prompt)], *[[*TOKENIZER.encode(y), 0] for y in (chosen, rejected)]]
    return policy, explain.pair(policy, reference, CONFIG, *ids, beta, TOKENIZER)


class Reader(HTMLParser):
    """Tags with their attributes, texts by tag, and whether every tag is closed in order."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def test_a_response_stays_text():
    """A response that holds a script or a tag is shown as text."""
    _, shown = view("<script>alert(1)</script>", "\"'&</span><b>", "<i>\x07\n")
    read = Reader(page.page(shown))
    assert {tag for tag, _ in read.tags} <= set(
        "html head meta title style body main h1 h2 p a div span button small b br "
        "table caption thead tbody tr th td".split()
    )
    faces = "".join(text for tag, text in read.texts if tag == "button")
    assert faces == "<script>alert(1)</script>end\"'&</span><b>end"
    assert "<i>\\x07\\n" in [text for tag, text in read.texts if tag == "p"]


def test_nothing_external_is_referenced():
    """The page refers to nothing outside itself, and its content policy forbids it."""
    text = page.page(view()[1])
    assert not re.search(r"https?:|//|url\(|@import|src=|href=[^\"]|href=\"[^#]|<script|<link|<img|<iframe", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in Reader(text).tags


def test_the_page_has_every_token_and_number():
    """Every token and every number is on the page, for readers without a mouse or without colours too."""
    _, shown = view("abc", "abd no")
    text = page.page(shown)
    read = Reader(text)
    buttons = [attributes for tag, attributes in read.tags if tag == "button"]
    tips = {attributes["id"] for _, attributes in read.tags if attributes.get("role") == "tooltip"}
    tokens = [*shown.chosen, *shown.rejected]
    assert len(buttons) == len(tokens) == 11 and {attributes["aria-describedby"] for attributes in buttons} == tips
    assert len(tips) == 11
    signs = [text for tag, text in read.texts if tag == "small"]
    expected = {"shared": "=", "up": "\u25b2", "down": "\u25bc"}
    for sign, attributes, token in zip(signs, buttons, tokens, strict=True):
        assert sign == expected[attributes["class"]]
        assert attributes["class"] == ("shared" if token.row == "shared" else "up" if token.push > 0 else "down")
    assert "=" in signs and "\u25b2" in signs and "\u25bc" in signs
    hardest = max(abs(token.push) for token in tokens)
    assert [attributes["style"] for attributes in buttons] == [
        f"--hard: {100 * abs(token.push) / hardest:.0f}%" for token in tokens
    ]
    cells = [text for tag, text in read.texts if tag == "td"]
    for token in tokens:
        assert all(figure in cells for figure in page.figures(token)[1:])
    for number in (shown.logp_w, shown.ref_logp_l, shown.policy_gap, shown.margin, shown.reward_w):
        assert f"{number:.4f}" in cells
    assert f"weight sigma(-z) {shown.weight:.4g}, loss -log sigma(z) {shown.loss:.4g}" in text
    assert f"<p>{html.escape(shown.says)}</p>" in text
    headings = [text for tag, text in read.texts if tag == "h2"]
    assert headings[1:3] == [
        f"Chosen: log pi {shown.logp_w:.4f}, implicit reward {shown.reward_w:.4f}",
        f"Rejected: log pi {shown.logp_l:.4f}, implicit reward {shown.reward_l:.4f}",
    ]
    assert "button:hover + [role=tooltip], button:focus + [role=tooltip]" in text
    assert ("html", {"lang": "en"}) in read.tags and any(a.get("name") == "viewport" for _, a in read.tags)


def test_the_details_of_a_token_are_its_own():
    """The tip of a token holds its own numbers, its own direction and its own logits."""
    _, shown = view("ab c", "ab d\n")
    text = page.page(shown)
    tips = dict(re.findall(r'<span role="tooltip" id="([wl]-\d+)">(.*?)</span>', text))
    buttons = dict(re.findall(r'aria-label="([^"]*)" aria-describedby="([^"]*)"', text))
    names = {name: label for label, name in buttons.items()}
    faces = {name: face for name, face in re.findall(r'aria-describedby="([^"]*)">(.*?)<small', text)}
    for side, tokens in (("w", shown.chosen), ("l", shown.rejected)):
        for t, token in enumerate(tokens):
            tip = tips[f"{side}-{t}"]
            head, numbers, *rest = tip.split("<br>")
            push = "shared, the two" if token.row == "shared" else "pushed up" if side == "w" else "pushed down"
            assert push in head and push in (names.get(f"{side}-{t}") or push)
            assert f"p {token.probability:.5f}, log pi {token.logp:.4f}, log pi_ref {token.ref_logp:.4f}" in numbers
            assert f"log-ratio {token.log_ratio:.4f}, reward so far {token.reward:.4f}" in numbers
            assert ("The responses part here" in tip) == (token.row == "branch")
            if token.row != "shared":
                assert f"push {token.push:.2g}, |dL/ds| {token.gradient_norm:.2g}" in numbers
                assert (
                    f"up: {html.escape(repr(token.up[0][0]) if len(token.up[0][0]) == 1 else token.up[0][0])}"
                    in rest[-1]
                )
            if token.token in " \n":
                assert faces[f"{side}-{t}"] == {" ": "\u2423", "\n": "\u21b5"}[token.token]
    assert 'aria-label="space, ' in text and 'aria-label="newline, ' in text and 'aria-label="end of text, ' in text
    assert len(re.findall('class="word"', text)) == 5  # "ab " and "c"; "ab ", "d" with its newline, and the end


def test_a_token_that_is_not_pushed_has_no_arrow():
    """Where sigma(-z) has underflowed, a token has a dot and not an arrow."""
    _, shown = view("abc", "bcd", beta=1e9)
    ahead = shown if shown.margin > 0 else view("bcd", "abc", beta=1e9)[1]
    assert ahead.weight == 0 and {page.direction(token) for token in ahead.chosen + ahead.rejected} == {"none"}
    assert Reader(page.page(ahead)).texts.count(("small", "\u00b7")) == 8


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_on_every_tint_in_both_schemes():
    """Every text has a contrast of at least 4.5 to 1 on every tint, light and dark (WCAG 2.2, 1.4.3)."""
    style = page.page(view()[1]).replace("#fff;", "#ffffff;")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media", 1)]
    assert all(scheme.keys() >= {"fg", "bg", "dim", "up", "down"} for scheme in schemes)
    for scheme in schemes:
        for front, back in (("fg", "bg"), ("fg", "up"), ("fg", "down"), ("dim", "bg")):
            bright, dark = sorted((luminance(scheme[front]), luminance(scheme[back])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_the_table_in_a_terminal_has_every_token():
    """The table has every token once, with its numbers; a space or a bell is visible and not heard."""
    _, shown = view("ab c\x07", "ab e'")
    lines = tables.tokens_as_text(shown).splitlines()
    titles = [line for line in lines if line in ("shared", "chosen", "rejected")]
    assert titles == ["shared", "chosen", "rejected"]
    first = [line[7:].rsplit("  ")[0] for line in lines]
    for token in ("'a'", "' '", "'c'", "'\\x07'", '"\'"', "<|endoftext|>"):
        assert any(start.startswith(token) for start in first), token
    assert sum("cancels" in line for line in lines) == 3 + 1 and "one row of logits" in lines[-2]
    numbered = [line for line in lines[1:-2] if line not in titles]
    tokens = [*shown.chosen, *shown.rejected[shown.shared :]]
    for line, token in zip(numbered, tokens, strict=True):
        assert line[0] == {"shared": "=", "branch": "^", "own": " "}[token.row]
        cells = line[20:].split()
        own = (token.probability, token.logp, token.ref_logp, token.log_ratio, token.reward)
        assert np.allclose([float(cell) for cell in cells[:5]], own, atol=1e-4)
        if token.row != "shared":
            assert np.allclose(
                [float(cell) for cell in cells[5:7]], [token.coefficient, token.gradient_norm], rtol=0.06
            )
    assert [int(line[2:6]) for line in numbered] == [*range(len(shown.chosen)), *range(3, len(shown.rejected))]
    assert "\x07" not in tables.tokens_as_text(shown) + tables.aligned(shown)
    prompt, chosen, rejected, marks = tables.aligned(shown).splitlines()
    assert [prompt, chosen, rejected] == ["prompt    <i>\\n", "chosen    ab c\\x07", "rejected  ab e'"]
    assert marks == "          ===^ tokens shared: 3; the two pushes on them cancel"
    assert tables.width("a\u65e5\u05d0\u05b0") == 4
    for chosen, rejected, expected in (("a", "b", "^ tokens shared: 0"), ("a", "a", "= tokens shared: 2; the two")):
        assert tables.aligned(view(chosen, rejected)[1]).splitlines()[-1].strip().startswith(expected)


def test_the_summaries_show_the_numbers():
    """The summaries show the log-probabilities, the loss, the four ways and the step, to the digits printed."""
    policy, shown = view("abc", "abd")
    text = tables.summary(shown)
    w, l, gap = (list(map(float, line.split()[-4:])) for line in text.splitlines()[1:4])
    assert np.allclose(w, [shown.logp_w, shown.ref_logp_w, shown.logp_w - shown.ref_logp_w, shown.reward_w], atol=1e-4)
    assert np.allclose(l, [shown.logp_l, shown.ref_logp_l, shown.logp_l - shown.ref_logp_l, shown.reward_l], atol=1e-4)
    assert np.allclose(gap, [shown.policy_gap, shown.reference_gap, shown.margin, 0.2 * shown.margin], atol=1e-4)
    assert f"margin {shown.margin:.4f}, z = 0.2 margin = {0.2 * shown.margin:.4g}, weight" in text
    assert f"{shown.weight:.4g}, loss -log sigma(z) {shown.loss:.4g}" in text
    assert text.splitlines()[-1] == shown.says
    ways = explain.four_ways(policy, CONFIG, shown)
    table = tables.ways_as_text(ways).splitlines()
    assert len(table) == len(ways) + 2
    for line, way in zip(table[1:-1], ways, strict=True):
        assert np.allclose(
            [float(cell) for cell in line[32:].split()], [x for x in way[1:] if x is not None], rtol=1e-6
        )
    exact, finite = explain.largest_differences(ways)
    assert f"{exact:.0e} among the first three, {finite:.0e} to the fourth" in table[-1]
    plain, adam = (displacement.step(policy, CONFIG, shown, 1e-6, make) for make in (optim.SGD, optim.AdamW))
    rows = tables.step_as_text(plain, adam).splitlines()
    assert f"K_ww {plain.K_ww:.4g}, K_wl {plain.K_wl:.4g}, K_ll {plain.K_ll:.4g}; rate 1e-06" == rows[0]
    for row, name in ((rows[2], "chosen"), (rows[3], "rejected")):
        change, other = getattr(plain, name), getattr(adam, name)
        expected = (change.own, change.cross, change.predicted, change.measured, change.measured / change.predicted)
        assert np.allclose([float(cell) for cell in row.split()[2:]], [*expected, other.measured], rtol=1e-3)
    same = explain.pair(policy, policy, CONFIG, [0], [1, 2], [1, 2], 0.2)
    still = displacement.step(policy, CONFIG, same)
    assert "rounding" in tables.step_as_text(still, still)


def test_pairs_without_a_branch_or_a_push_are_shown_too():
    """Identical responses, and one that begins the other, have a page and a table."""
    for chosen, rejected in (("abc", "abc"), ("a", "b")):
        _, shown = view(chosen, rejected)
        Reader(page.page(shown))
        assert tables.tokens_as_text(shown).count("\n") >= 4
    params = {name: Tensor(p.data) for name, p in model.init(CONFIG, np.random.default_rng(0)).items()}
    prefix = explain.pair(params, params, CONFIG, [0], [1, 2], [1], 0.2, TOKENIZER)
    assert "one row of logits" not in tables.tokens_as_text(prefix)
    Reader(page.page(prefix))


@pytest.mark.parametrize("token", ["a", " ", "\n", "'"])
def test_a_token_is_quoted(token):
    """A character is in quotes and escaped, so that a space is visible."""
    assert explain.quoted(token) == repr(token) and len(explain.quoted(token)) >= 3
