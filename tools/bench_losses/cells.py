"""One cell of the grid: a contestant at a shape, measured in every respect; and the order."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch

from tools.bench_losses import clock, contestants
from tools.bench_losses.problems import LOSSES, Shape

Json = dict[str, Any]
IMAGENET, IMAGENET_21K, ODD = (1000, 1000), (21841, 21888), (21841, 21841)  # classes, width
BATCHES = (256, 1024, 4096, 32768)
BF16, FP32 = torch.bfloat16, torch.float32
# What the goals are about; everything else follows, loss by loss.
FIRST = [
    Shape("teacher", *IMAGENET, 32768, BF16),
    Shape("teacher", *IMAGENET_21K, 4096, BF16),
    Shape("teacher", *IMAGENET, 256, BF16),
    Shape("student", *IMAGENET, 256, BF16),
    Shape("pseudo", *IMAGENET, 256, BF16),
    Shape("teacher", *IMAGENET, 1024, BF16),
    Shape("student", *IMAGENET, 32768, BF16),
    Shape("student", *IMAGENET_21K, 4096, BF16),
]


def rest() -> Iterator[Shape]:
    """All other shapes, the teacher's before the student's, 16 bits before 32."""
    heads = (IMAGENET, IMAGENET_21K, ODD)
    for dtype, loss, head, batch in product((BF16, FP32), LOSSES, heads, BATCHES):
        too_large = head != IMAGENET and batch > 4096
        shape = Shape(loss, *head, batch, dtype)
        if not too_large and (dtype == BF16 or batch == 4096) and shape not in FIRST:
            yield shape


def measure(shape: Shape, name: str) -> Json:
    """Everything about one contestant at one shape; `failed` says why there are no numbers."""
    cell: Json = {
        **shape._asdict(),
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rows": shape.rows,
        "contestant": name,
        "minimal_bytes": shape.minimal_bytes,
    }
    torch.cuda.empty_cache()
    try:
        sets = clock.input_sets(shape)
        call = contestants.build(name, shape)
        clock.warm_up(call, sets)
        cell["launches"] = clock.launches(call, sets[0])
        cell["extra_bytes"] = clock.extra_memory(call, sets[0])
        cell["wall_us"] = clock.wall(call, sets)
        cell["input_sets"] = len(sets)
    except Exception as error:  # the other contestants' numbers are worth having
        return {**cell, "failed": _line(error)}
    try:
        times = clock.replayed(call, sets)
    except Exception as error:  # such as Liger's .item(): no graph can hold a synchronization
        torch.cuda.synchronize()
        return {**cell, "not_capturable": _line(error)}
    cell["graph_us"] = times._asdict()
    cell["gb_per_s"] = shape.minimal_bytes / times.median / 1e3
    return cell


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
