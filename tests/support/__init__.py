"""Helpers that the tests share. Fixtures are in conftest.py."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
