"""A Matplotlib figure that a notebook shows, though pyplot is never imported."""

import io

import matplotlib
from matplotlib.figure import Figure

from ovqk.figures.drawing import STYLE


class ShownFigure(Figure):
    """A figure with a picture for notebooks.

    IPython shows other figures only after pyplot was imported or `%matplotlib inline` was run. If so, it makes its own
    picture of this one too, and `_repr_png_` is not called.
    """

    def _repr_png_(self) -> bytes:
        """Return the figure as PNG."""
        written = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(written, format="png", bbox_inches="tight")
        return written.getvalue()
