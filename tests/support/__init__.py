"""Helpers that the tests share. Fixtures are in conftest.py."""

from pathlib import Path

from support.type_checks import checked as checked  # found by name: the option --jaxtyping-packages in pyproject.toml

ROOT = Path(__file__).parents[2]
"""The repository."""
