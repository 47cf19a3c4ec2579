"""Data: preferences.py reads, validates, encodes and splits files; world.py is a support desk with a known reward."""
