"""Preference data: rows from files, and a small world whose true reward is known."""
