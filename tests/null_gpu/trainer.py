"""Runs on the null GPU, one after the other, as `tests.tiny_run` runs them on a CPU.

No kernel computes anything, so what the host reads from the device is replaced: metrics, hits, and
whether weights are finite.
"""

import json
import math
import os
import sys
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn.parallel import distributed as ddp

from mpl_fast import distributed
from mpl_fast.algorithms.base import Metrics, train_step
from mpl_fast.learner import Learner
from mpl_fast.training import evaluate, metrics, run
from tests.null_gpu import device
from tests.tiny_run import SESSIONS, in_turn

STEP, THREAD = "a step begins", "in a thread"
_row = metrics._row
_diverging = set[int]()  # steps whose next row has losses that are not finite
_pools: list[int] = []  # of graphs that hold memory, when each step begins


def _row_of_zeros(pending: metrics.PendingRow) -> tuple[int, metrics.Row]:
    values = device.zeros_on_host(pending.values)
    if pending.step in _diverging:
        _diverging.remove(pending.step)
        values[[name.startswith("loss/") for name in pending.names]] = math.nan
    return _row(pending._replace(values=values))


def _nothing(*arguments: Any, **named: Any) -> None:
    """In place of a check by DDP that reads what ranks have gathered."""


def _step(*arguments: Any) -> Metrics:
    pools = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}
    _pools.append(len(pools - {(0, 0)}))
    device.note(STEP)
    return train_step(*arguments)


def waits(line: str) -> bool:
    """Whether the host waits."""
    return "SYNC" in line or "pageable" in line


def main(out: str, sessions: list[list[str]]) -> None:
    """Runs sessions, and writes what the device has seen to OUT.RANK."""
    device.watch()
    with (
        mock.patch.object(metrics, "_row", _row_of_zeros),
        mock.patch.object(evaluate, "_hits", device.no_hits),
        mock.patch.object(Learner, "finite", device.always_finite),
        mock.patch.object(ddp, "_verify_param_shape_across_processes", _nothing),
        mock.patch.object(run, "train_step", _step),
        mock.patch.dict(SESSIONS, diverge=lambda step: _diverging.add(int(step))),
    ):
        in_turn(sessions)
    seen = device.seen()
    steps = [[*lines] for is_step, lines in groupby(seen.log, STEP.__eq__) if not is_step][1:]
    found = {
        "refused": seen.lines("REFUSED"),
        "escaped": seen.lines("ESCAPED"),
        "captures": [sum("CAPTURE begins" in x for x in lines) for lines in steps],
        "graph_launches": [sum(x.startswith("GRAPH") for x in lines) for lines in steps],
        "pools": _pools,
        "waits": [[x for x in lines if waits(x) and not x.endswith(THREAD)] for lines in steps],
        "waits_in_threads": [[x for x in lines if x.endswith(THREAD)] for lines in steps],
        "copies": [sum("device->pinned" in x for x in lines) for lines in steps],
        "pinned": [sum("HOSTALLOC" in x for x in lines) for lines in steps],
        "collectives": [sum("KERNEL nccl" in x for x in lines) for lines in steps],
    }
    rank, _ = distributed.ranks_of_launcher()
    Path(f"{out}.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # at the end of Python, libraries would read values, too
