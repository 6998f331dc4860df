"""Run folders: written, read, checked, compared, and exchanged with other tools.

>>> run = lens.runs.open_run(run.path)
>>> lens.runs.compare_runs(run, other).findings()
"""

from lens.common.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
