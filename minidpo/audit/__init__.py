"""Whether a measurement can be believed."""

from . import calibration, intervals, proxy

__all__ = ["calibration", "intervals", "proxy"]
