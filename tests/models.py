"""Small models for tests: float64, with parameters so large that every mistake shows."""

import numpy as np
from hypothesis import strategies as st

from minidpo import model
from minidpo.model import Config

CONFIG = Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=2, n_head=2)


def small(seed=0, config=CONFIG):
    """Parameters far from their initial values: no bias is 0, no norm is the identity."""
    rng = np.random.default_rng(seed)
    params = model.init(config, rng, dtype="float64")
    for p in params.values():
        p.data = p.data + 0.5 * rng.normal(size=p.shape)
    return params


def ids(min_size=1, max_size=4):
    return st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=min_size, max_size=max_size)


@st.composite
def pairs(draw):
    """Prompt, chosen and rejected; the responses are often equal, or share a prefix, or one begins with the other."""
    prompt, chosen = draw(ids()), draw(ids())
    kind = draw(st.sampled_from(["any", "equal", "longer", "branching"]))
    if kind == "equal":
        return prompt, chosen, list(chosen)
    if kind == "longer":
        return prompt, chosen[:3], chosen[:3] + draw(ids(1, 2))
    if kind == "branching":
        return prompt, chosen, chosen[:2] + draw(ids(1, 2))
    return prompt, chosen, draw(ids())
