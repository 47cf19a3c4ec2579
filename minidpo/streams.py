"""Named random streams: what one part draws never moves what another draws."""

import numpy


def stream(seed: int, *name: str | int) -> numpy.random.Generator:
    """The random stream of a name, such as `stream(0, "batches", epoch)`.

    A stream is a function of seed and name alone: nothing has to be kept for a run to go on where it stopped,
    and a new name draws from a stream of its own.
    """
    key = [seed] if not name else [seed, *"/".join(map(str, name)).encode()]
    return numpy.random.default_rng(key)
