"""The place of the config files: beside the package in a checkout, inside it if it was installed from a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
"""The folder that holds config.yaml, model/, task/, analysis/ and tracking/."""
