"""Time and memory: calls that take turns, processes of their own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Times = dict[str, list[float]]


def time_in_turns(
    calls: Mapping[Hashable, Callable[[], Any]],
    rounds: int,
    repeats: int = 1,
    wait: Callable[[Any], None] = lambda outputs: None,
    seed: int = 0,
) -> dict[Hashable, Times]:
    """Times several calls in one process, all of them in every round.

    Whatever else the machine does falls on all of them alike, and they can be
    compared with each other round by round.

    Args:
        calls: What to time.
        rounds: How often each call has its turn; the order is drawn anew in
            each round.
        repeats: Calls of one turn, after one that is not counted.
        wait: Is given what a call returned, and returns when it is computed.
        seed: Of the order.

    Returns:
        `"wall_ms"` and `"cpu_ms"` of each call, a number for each round:
        milliseconds of one call, by the wall clock and of the process.
    """
    times: dict = {key: {"wall_ms": [], "cpu_ms": []} for key in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    gc.freeze()  # what is there already is not looked through again
    for _ in range(rounds):
        shuffle(order)
        for key in order:
            wait(calls[key]())
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                outputs = calls[key]()
            wait(outputs)
            wall = time.perf_counter() - wall
            cpu = time.process_time() - cpu
            times[key]["wall_ms"].append(1e3 * wall / repeats)
            times[key]["cpu_ms"].append(1e3 * cpu / repeats)
    gc.unfreeze()
    return times


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """Runs a function in a process that has done nothing before.

    It is a new process and no fork, which TensorFlow's threads would not
    survive.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def give_freed_memory_back() -> None:
    """In new processes: pools of oneDNN and of the C library would keep it."""
    os.environ.setdefault("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "1")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "1000000")


def peak_mb() -> float:
    """The most resident megabytes that this process has had; Linux only."""
    # `ru_maxrss` would do, were it not inherited from the parent process.
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """The resident megabytes of this process now; Linux only."""
    return _status_mb("VmRSS")


def reset_peak() -> None:
    """Restarts the peak from what is in use now."""
    gc.collect()
    # What XLA's compiler has freed, the C library still keeps.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


def _status_mb(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1_024 / 1e6
