"""Whether a measurement can be believed, and where a model comes from."""

from . import calibration, provenance, versions

__all__ = ["calibration", "provenance", "versions"]
