"""The live view of `train`: what a run does, in a terminal, with rich.

`seen` keeps what rows said, `panel` makes lines of it for any width and height, `screen` holds them
at the bottom of a terminal, and `view` brings the three together.
"""

from branchcore.live_view.view import LiveView

__all__ = ["LiveView"]
