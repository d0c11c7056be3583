"""Two ways to the same numbers, run in turn in one process: which is faster, by how much, with how much memory.

Absolute times of a shared machine mean little. So each round runs both, the order turned round every time, and what is
kept is their ratio, round by round; and beside it the share of the rate at which this machine multiplied large
matrices in the same minute.
"""

import platform
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.checkpoints.fetching import give_back
from lib.studies.costs import SHARE

Work = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """ours, peer: do the work and give the result. same: the largest difference of two results, relative to what the
    tolerance is. share: of the speed-up that the counts of operations allow, how much is to be reached; None where the
    peer does not do the same work. ours_of, peer_of: the share of the work that a call does, where a sample stands for
    the whole. seconds: how long ours may take at most."""

    name: str
    what: str
    peer_name: str
    ours: Work
    peer: Work
    same: Callable[[Any, Any], float]
    tolerance: float
    share: float | None = SHARE
    ours_of: float = 1.0
    peer_of: float = 1.0
    rounds: int = 5
    seconds: float | None = None


def run(row: Row, matmul: float) -> dict[str, Any]:
    """Warm up, check that both say the same, then time them in turn. Raises AssertionError where they differ."""
    (mine, flops), (theirs, peer_flops) = count(row.ours), count(row.peer)
    difference = row.same(mine, theirs)
    assert difference <= row.tolerance, f"{row.name}: results differ by {difference:.2g}, allowed {row.tolerance:.2g}"
    del mine, theirs
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    grown: dict[str, list[float | None]] = {"ours": [], "peer": []}
    for i in range(row.rounds):
        for side in ("ours", "peer")[:: 1 if i % 2 else -1]:
            work, share = (row.ours, row.ours_of) if side == "ours" else (row.peer, row.peer_of)
            took, more = timed(work)
            seconds[side].append(took / share)
            grown[side].append(more)
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["peer"], strict=True)]
    best, flops, peer_flops = min(seconds["ours"]), flops / row.ours_of, peer_flops / row.peer_of
    bound = peer_flops / flops if flops and peer_flops else None  # times faster, if both ran at one rate
    goal = row.share * bound if row.share and bound else None
    return {
        "row": row.name,
        "what": row.what,
        "peer": row.peer_name,
        "rounds": row.rounds,
        "difference": difference,
        "tolerance": row.tolerance,
        "ours_s": median(seconds["ours"]),
        "peer_s": median(seconds["peer"]),
        "ratio": median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "bound": bound,
        "goal": goal,
        "limit_s": row.seconds,
        "met": _met(goal, row.seconds, median(ratios), median(seconds["ours"])),
        "ours_mb": _most(grown["ours"]),
        "peer_mb": _most(grown["peer"]),
        "gflop": flops / 1e9,
        "peer_gflop": peer_flops / 1e9,
        "matmul_share": flops / best / matmul if flops else None,
    }


def _met(goal: float | None, limit: float | None, ratio: float, seconds: float) -> bool | None:
    if goal is None and limit is None:
        return None
    return (goal is None or ratio >= goal) and (limit is None or seconds <= limit)


def timed(work: Work) -> tuple[float, float | None]:
    """Seconds, and MB by which the process grew at its largest meanwhile; None where the kernel does not tell."""
    give_back()
    before = _mark()
    start = perf_counter()
    work()
    seconds = perf_counter() - start
    return seconds, None if before is None else max(0.0, (_status("VmHWM") - before) / 1024)


def _mark() -> int | None:
    """KB in use; the high-water mark starts anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _most(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return max(known) if known else None


def count(work: Work) -> tuple[Any, float]:
    """What the work gives, and the floating-point operations of the matrix products in it."""
    with FlopCounterMode(display=False) as counter:
        result = work()
    return result, float(counter.get_total_flops())


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def matmul_rate(n: int = 1536, rounds: int = 9) -> float:
    """Operations a second of a large product in fp32, at the best of a few."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / min(timed(lambda: a @ b)[0] for _ in range(rounds))


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
