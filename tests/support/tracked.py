"""The one cell of a results folder, and its run."""

from pathlib import Path

from ovqk.config.schema import TrackingMode
from ovqk.tracking.track import track_cell


def cell(results: Path) -> Path:
    (record,) = results.glob("*/*/*/record.json")
    return record.parent


def track(results: Path, mode: str) -> str | None:
    return track_cell(cell(results), results, TrackingMode(mode), "ovqk-test", None)
