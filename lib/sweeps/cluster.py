"""Run many independent calls on Dask: on this machine, or on any cluster that Dask's own tools have started.

One process a worker, one thread each, so memory is bounded by the number of workers. A call whose worker dies is run
again elsewhere; Dask gives up on it after a few deaths, and counts every call that waited at the dying worker too. So
each call given up is tried once more with the cluster to itself, and only one that fails then is reported.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, KilledWorker, LocalCluster, Security, as_completed
from distributed.core import rpc

from lib.errors import SweepError

_LEAVE_CTRL_C_TO_US = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # run as a worker starts
Calls = dict[str, dict[str, Any]]
TIMEOUT = 10  # seconds to reach a scheduler, and to wait for one that is lost


@contextmanager
def connect(scheduler: str | None, *, workers: int) -> Iterator[Client]:
    """A client of the scheduler at an address, or of as many workers on this machine. Raises SweepError where nobody
    answers at the address."""
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # deaths of workers are counted and told by us
    forks = {"distributed.worker.multiprocessing-method": "forkserver"} if sys.platform == "linux" else {}  # one import
    with dask.config.set({"distributed.scheduler.worker-saturation": 1.0, **forks}):
        if scheduler is not None:
            _require_scheduler(scheduler)
            with Client(scheduler, timeout=TIMEOUT, set_as_default=False) as client:
                yield client
            return
        quiet = {"silence_logs": logging.CRITICAL, "dashboard_address": None, "preload": [_LEAVE_CTRL_C_TO_US]}
        cluster = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, **quiet)
        with cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _require_scheduler(address: str) -> None:
    """Asked with a limit of time, because Dask's own client waits for ever at a port where something else listens."""

    async def kind() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as peer:
            return (await asyncio.wait_for(peer.identity(), TIMEOUT))["type"]

    try:
        with ThreadPoolExecutor(1) as aside:  # a notebook has a loop of its own in this thread
            found = aside.submit(asyncio.run, kind()).result()
    except (OSError, ValueError, MemoryError) as error:  # the last: the words of a web page, taken for a length
        found = type(error).__name__
    if found != "Scheduler":
        raise SweepError(
            f"no Dask scheduler answers at {address!r} ({found}). Start one (`dask scheduler`), give the address that "
            "it prints, such as tcp://node1:8786, or leave --scheduler out to run here."
        )


def each(
    client: Client, function: Callable[..., Any], calls: Calls, homes: Mapping[str, int] | None = None
) -> Iterator[tuple[str, Any]]:
    """Call the function with each mapping of arguments: (key, what it gave or the exception that it raised), as they
    finish. homes: by key, the number of the worker that should do it if it is not busy while another is idle. Raises
    ConnectionError when the scheduler is lost."""
    given_up = []
    for key, outcome in _finished(client, function, calls, homes):
        if isinstance(outcome, KilledWorker):
            given_up.append(key)
        else:
            yield key, outcome
    for key in given_up:
        yield from _finished(client, function, {key: calls[key]}, None, "alone")


def _finished(
    client: Client, function: Callable[..., Any], calls: Calls, homes: Mapping[str, int] | None, how: str = "run"
) -> Iterator[tuple[str, Any]]:
    workers, keys = list(client.nthreads()) if homes else [], {}
    for key, given in calls.items():
        place = (
            {"workers": workers[homes[key] % len(workers)], "allow_other_workers": True} if homes and workers else {}
        )
        keys[client.submit(function, **given, **place, key=(how, key), pure=True)] = key
    try:
        for future, outcome in as_completed(list(keys), loop=client.loop, with_results=True, raise_errors=False):
            if future.status not in ("finished", "error"):
                raise ConnectionError(f"the call was {future.status}")
            yield keys.pop(future), outcome if future.status == "finished" else outcome[1]
    finally:
        client.cancel(list(keys))
