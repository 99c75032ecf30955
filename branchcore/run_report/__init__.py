"""A run's folder as one HTML page: nothing to load, nothing to install, for a phone or a desk.

The way of the data: `read` -> `series` -> `chart`, `tree_picture`, `stage_bars`, `sample_rows`,
`facts` -> `page`. What users wrote becomes text in `markup` and nowhere else.
"""

from branchcore.run_report.page import page, write_report
from branchcore.run_report.read import Run, read_run

__all__ = ["Run", "page", "read_run", "write_report"]
