"""A specification, its runs, and where they are kept: hundreds of independent calls of one experiment, on Dask.

spec = sweeps.load("layers", model_name="organism")   # data/sweeps/layers.yaml, or a path
table = sweeps.run(spec)                              # does what is missing; nothing is started if nothing is
table = sweeps.table(spec)                            # only reads
"""

from lib.sweeps.runs import run, run_all, table
from lib.sweeps.specification import expand, hours, load

__all__ = ["expand", "hours", "load", "run", "run_all", "table"]
