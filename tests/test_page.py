"""What a person sees of a pair: nothing is lost, nothing is markup, nothing is fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from minidpo import Tensor, displacement, explain, model, optim, page
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
    """Otherwise a response that holds a script runs it in the reader's browser."""
    _, shown = view("<script>alert(1)</script>", "\"'&</span><b>", "<i>\x07\n")
    read = Reader(page.page(shown))
    assert {tag for tag, _ in read.tags} <= set(
        "html head meta title style body main h1 h2 p div span button small b br "
        "table caption thead tbody tr th td".split()
    )
    faces = "".join(text for tag, text in read.texts if tag == "button")
    assert faces == "<script>alert(1)</script>end\"'&</span><b>end"
    assert "<i>\\x07\\n" in [text for tag, text in read.texts if tag == "p"]


def test_nothing_external_is_referenced():
    """Otherwise opening a page tells a stranger of it, and it is empty without a network."""
    text = page.page(view()[1])
    assert not re.search(r"https?:|//|url\(|@import|src=|href=|<script|<link|<img|<iframe", text)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in Reader(text).tags


def test_the_page_has_every_token_and_number():
    """Otherwise a reader without a mouse, or without colours, sees less."""
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
        assert all(figure in cells for figure in page.figures(token))
    for number in (shown.logp_w, shown.ref_logp_l, shown.policy_gap, shown.margin, shown.reward_w):
        assert f"{number:.4f}" in cells
    assert f"weight sigma(-z) {shown.weight:.4f}, loss -log sigma(z) {shown.loss:.4f}" in text
    assert ("html", {"lang": "en"}) in read.tags and any(a.get("name") == "viewport" for _, a in read.tags)


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_can_be_read_on_every_tint_in_both_schemes():
    """Otherwise the hardest pushed token is the one that cannot be read. (WCAG 2.2, 1.4.3: at least 4.5 to 1.)"""
    style = page.STYLE.replace("#fff;", "#ffffff;")
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("@media", 1)]
    assert all(scheme.keys() >= {"fg", "bg", "dim", "up", "down"} for scheme in schemes)
    for scheme in schemes:
        for front, back in (("fg", "bg"), ("fg", "up"), ("fg", "down"), ("dim", "bg")):
            bright, dark = sorted((luminance(scheme[front]), luminance(scheme[back])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_the_table_in_a_terminal_has_every_token():
    """Otherwise the page and the terminal tell of two pairs; a space or a bell must be seen and not heard."""
    _, shown = view("ab c\x07", "ab e'")
    lines = page.tokens_as_text(shown).splitlines()
    titles = [line for line in lines if line in ("shared", "chosen", "rejected")]
    assert titles == ["shared", "chosen", "rejected"]
    first = [line[2:].rsplit("  ")[0] for line in lines]
    for token in ("'a'", "' '", "'c'", "'\\x07'", '"\'"', "<|endoftext|>"):
        assert any(start.startswith(token) for start in first), token
    assert sum("cancels" in line for line in lines) == 3 + 1 and "one row of logits" in lines[-1]
    assert "\x07" not in page.tokens_as_text(shown) + page.aligned(shown)
    prompt, chosen, rejected, marks = page.aligned(shown).splitlines()
    assert [prompt, chosen, rejected] == ["prompt    <i>\\n", "chosen    ab c\\x07", "rejected  ab e'"]
    assert marks == "          ===^ tokens shared: 3; what they are pushed by cancels"


def test_the_summaries_show_the_numbers():
    """Otherwise the footer rounds away what the loss is made of."""
    policy, shown = view("abc", "abd")
    text = page.summary(shown)
    for number in (shown.logp_w, shown.logp_l, shown.ref_logp_w, shown.ref_logp_l, shown.margin, shown.loss):
        assert f"{number:.4f}" in text
    assert text.splitlines()[-1] == shown.says
    ways = explain.four_ways(policy, CONFIG, shown)
    table = page.ways_as_text(ways).splitlines()
    assert len(table) == len(ways) + 2 and table[1].split() == ["logp_w", *[f"{ways[0].autograd:.9f}"] * 3]
    plain, adam = (displacement.step(policy, CONFIG, shown, 1e-6, make) for make in (optim.SGD, optim.AdamW))
    rows = page.step_as_text(plain, adam).splitlines()
    assert f"K_ww {plain.K_ww:.4g}, K_wl {plain.K_wl:.4g}, K_ll {plain.K_ll:.4g}; rate 1e-06" == rows[0]
    assert f"{plain.chosen.measured:+.3e}" in rows[2] and f"{adam.rejected.measured:+.3e}" in rows[3]


def test_pairs_without_a_branch_or_a_push_are_shown_too():
    """Otherwise identical responses, or one that begins the other, divide by 0 on the page."""
    for chosen, rejected in (("abc", "abc"), ("a", "b")):
        _, shown = view(chosen, rejected)
        Reader(page.page(shown))
        assert page.tokens_as_text(shown).count("\n") >= 4
    params = {name: Tensor(p.data) for name, p in model.init(CONFIG, np.random.default_rng(0)).items()}
    prefix = explain.pair(params, params, CONFIG, [0], [1, 2], [1], 0.2, TOKENIZER)
    assert "one row of logits" not in page.tokens_as_text(prefix)
    Reader(page.page(prefix))


@pytest.mark.parametrize("token", ["a", " ", "\n", "'"])
def test_a_token_can_be_told_from_another(token):
    """Otherwise a space looks like nothing."""
    assert explain.quoted(token) == repr(token) and len(explain.quoted(token)) >= 3
