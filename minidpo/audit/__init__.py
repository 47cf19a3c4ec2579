"""Whether a measurement can be believed."""

from . import calibration, gates, intervals, pairs, proxy, replies

__all__ = ["calibration", "gates", "intervals", "pairs", "proxy", "replies"]
