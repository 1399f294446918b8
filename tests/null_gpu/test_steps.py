"""A step of every recipe and feedback: no host wait, no mix-up of devices, no more launches.

`python -m tests.null_gpu.test_steps update` writes launches.json anew.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpl_fast.algorithms.base import train_step
from mpl_fast.config import AlgorithmConfig
from tests.null_gpu import machine

pytestmark = pytest.mark.slow
TABLE = Path(__file__).with_name("launches.json")
PRECISIONS = ("bf16", "float32")
WARMUP, STEPS = 3, 2
TOLERANCE = 1.05
Found = dict[str, Any]


def measure() -> Found:
    """Faults and launches of a step of each variant; in a process on the null GPU."""
    from mpl_fast import models
    from tests.null_gpu.training import ALL

    variants = ((precision, precision == "bf16") for precision in PRECISIONS)
    return {
        precision: {name: step(config, bf16) for name, config in ALL.items()}
        | {model: step(ALL["mpl exact"], bf16, model) for model in models.PLAIN}
        for precision, bf16 in variants
    }


def step(config: AlgorithmConfig, bf16: bool, model: str = "wrn_10_1") -> Found:
    """Faults and launches of a step."""
    from tests.null_gpu.training import batch, mixed, new, watched

    algorithm, images = new(config, bf16=bf16, model=model), batch(bf16=bf16)

    def steps(first: int, last: int) -> None:
        for t in range(first, last):
            train_step(algorithm, images, t)

    steps(0, WARMUP)  # kernels are compiled, memory is allocated
    faults, seen = watched(lambda: steps(WARMUP, WARMUP + STEPS))
    faults += mixed(lambda: steps(WARMUP + STEPS, WARMUP + STEPS + 1))
    return {"faults": faults, "launches": seen.launches / STEPS}


@pytest.fixture(scope="module")
def found() -> Found:
    """What `measure` found."""
    return _measured()


def _measured() -> Found:
    measured: Found = json.loads(machine.run("tests.null_gpu.test_steps", "measure"))
    return measured


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_waits_copies_pageable_memory_or_mixes_devices(
    precision: str, found: Found
) -> None:
    assert {name: step["faults"] for name, step in found[precision].items() if step["faults"]} == {}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_step_has_more_launches_than_the_table(precision: str, found: Found) -> None:
    table = json.loads(TABLE.read_text())
    if torch.__version__.split("+")[0] != table["torch"]:
        pytest.skip(f"launches.json counts those of torch {table['torch']}")
    counted = {name: step["launches"] for name, step in found[precision].items()}
    known = table[precision]
    more = {n: (known.get(n), c) for n, c in counted.items() if c > TOLERANCE * known.get(n, 0)}
    assert not more, "if that is meant: python -m tests.null_gpu.test_steps update"
    assert known.keys() == counted.keys()


def update() -> None:
    """Writes the table."""
    counted = {
        precision: {name: step["launches"] for name, step in steps.items()}
        for precision, steps in _measured().items()
    }
    table = {"torch": torch.__version__.split("+")[0], **counted}
    TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "update":
        update()
    else:
        print(json.dumps(measure()))
