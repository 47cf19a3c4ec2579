"""Named random streams: drawing from one never changes what another gives."""

import numpy


def stream(seed: int, *name: str | int) -> numpy.random.Generator:
    """The random stream of a name, such as `stream(0, "batches", epoch)`.

    It depends on seed and name alone, so a run that resumes needs no saved state, and every name has its own stream.
    """
    key = [seed] if not name else [seed, *"/".join(map(str, name)).encode()]
    return numpy.random.default_rng(key)
