"""A specification, its runs, and where they are kept: hundreds of independent calls of one experiment, on Dask."""

from lib.sweeps.runs import expand, hours, load, run, run_all, table

__all__ = ["expand", "hours", "load", "run", "run_all", "table"]
