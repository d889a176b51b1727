"""Predictions tested against nulls: statistics, random draws, tests, verdicts, candidates."""
