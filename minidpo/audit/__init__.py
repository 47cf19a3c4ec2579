"""Whether a measurement can be believed."""

from . import calibration

__all__ = ["calibration"]
