"""The induction task with few words, as tests configure it."""

from ovqk.config.schema import Config
from ovqk.testing.prompted_models import with_few_words
from support.commands import compose


def cell(seed: int, *overrides: str) -> Config:
    """A cell of the induction task."""
    return with_few_words(compose("task=induction", "analysis=full", f"seed={seed}", *overrides))
