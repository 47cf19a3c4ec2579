"""Hypothesis strategies: the cases of `minidpo.verify.cases`, with arrays in every memory layout."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minidpo.verify.cases import CASES

LAYOUTS = ("C", "F", "every other", "backwards")
seeds = st.integers(0, 2**32 - 1)
fifth = settings(max_examples=settings.default.max_examples // 5)  # of a profile's examples, where one takes long


def with_layout(values, layout):
    """The same array, with another order in memory."""
    if layout == "every other" and values.ndim:
        return np.repeat(values, 2, axis=-1)[..., ::2]
    if layout == "backwards" and values.ndim:
        return values[::-1].copy()[::-1]
    return np.array(values, order="F" if layout == "F" else "C")


class HypothesisDraw:
    """A `minidpo.verify.cases.Draw` that lets hypothesis choose."""

    def __init__(self, draw):
        self.draw = draw

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def array(self, shape):
        values = self.draw(hnp.arrays(np.float64, shape, elements=st.floats(-3, 3)))
        return with_layout(values, self.draw(st.sampled_from(LAYOUTS)))


@st.composite
def cases(draw, name):
    """Arguments and options for the op `name`."""
    return CASES[name](HypothesisDraw(draw))


def each_array(function, x):
    """Apply a function to every array in an argument, also inside an index; leave everything else."""
    if isinstance(x, tuple):
        return tuple(each_array(function, part) for part in x)
    return function(x) if isinstance(x, np.ndarray) else x


def arrays(shape=(2, 3), low=-3.0, high=3.0):
    return hnp.arrays(np.float64, shape, elements=st.floats(low, high))


def is_varied(x):
    """Whether an argument is a floating-point array, so has a gradient."""
    return isinstance(x, np.ndarray) and x.dtype.kind == "f"
