"""Whether a measurement can be believed, and where a model comes from."""

from . import calibration, gates, intervals, pairs, provenance, proxy, replies, versions

__all__ = ["calibration", "gates", "intervals", "pairs", "provenance", "proxy", "replies", "versions"]
