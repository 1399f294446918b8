"""What a step exchanges with other ranks: run by torchrun, rank 0 writes what it has counted.

usage: collectives.py OUT.json MODEL LABELED MU SIZE RECIPE [RECIPE ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mpl_fast import distributed
from mpl_fast.training.process import die_with_launcher
from tools.bench_steps import contestants
from tools.bench_steps.contestants import Flavor
from tools.bench_steps.setting import Setting

RANKS, WARM = 2, 2
PREFIX = "c10d::"  # what every collective calls, DDP's own in C++ too


def collectives(step: Callable[[], Any]) -> Counter[str]:
    """Collectives of one call, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = (event.name for event in profiler.events() or ())
    return Counter(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def counted(setting: Setting, recipes: Sequence[str]) -> dict[str, Counter[str]]:
    """Those of a step of each recipe on 2 ranks, which gloo connects on the CPU.

    Which collectives there are does not depend on the device. Raises RuntimeError with what the
    ranks said if they fail.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "counted.json"
        sizes = [setting.model, *map(str, (setting.labeled, setting.mu, setting.size))]
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, __file__, str(out), *sizes, *recipes],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the ranks failed:\n{done.stderr[-4000:]}")
        found: dict[str, dict[str, int]] = json.loads(out.read_text())
    return {recipe: Counter(names) for recipe, names in found.items()}


def main(out: str, model: str, labeled: str, mu: str, size: str, *recipes: str) -> None:
    """One rank."""
    die_with_launcher()
    distributed.start("cpu")
    setting = Setting(model, int(labeled), int(mu), int(size), torch.device("cpu"))
    found: dict[str, Counter[str]] = {}
    for recipe in recipes:
        one = contestants.ours(setting, recipe, Flavor())
        assert one is not None
        for _ in range(WARM):  # DDP settles its buckets in its first steps
            one.step()
        found[recipe] = collectives(one.step)
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
