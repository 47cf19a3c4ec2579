"""Whether a measurement can be believed."""

from . import calibration, gates, intervals, replies

__all__ = ["calibration", "gates", "intervals", "replies"]
