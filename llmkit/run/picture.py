"""Figures of matplotlib that notebooks show. Importing it takes matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class Picture(Figure):
    """A figure that belongs to no window: a notebook shows it once, where it is the value of a cell."""

    def _repr_png_(self) -> bytes:
        """Return it as PNG, for IPython."""
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=90, bbox_inches="tight")
        return file.getvalue()
