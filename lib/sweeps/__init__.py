"""A specification, its runs, where they are kept, and their record: hundreds of calls of one experiment, on Dask.

spec = sweeps.load("layers", model_name="organism")   # data/sweeps/layers.yaml, or a path
[table] = sweeps.tables(report, [spec])               # a chapter: the record; with RECORD=off, done here
table = sweeps.run(spec)                              # does what is missing; nothing is started if nothing is
"""

from lib.sweeps.record import recorded, tables
from lib.sweeps.runs import run
from lib.sweeps.specification import expand, further, load

__all__ = ["expand", "further", "load", "recorded", "run", "tables"]
