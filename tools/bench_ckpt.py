"""Measures checkpoints: how long a save stops training, bytes a second, and the way back.

The network is trained by Meta Pseudo Labels, so that a checkpoint holds two learners. The limits
are of the same bytes, in the same run: written and synced plainly to a file in the same folder,
read from it, and hashed in memory. `--smoke` takes a tiny network.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence

import torch

from mpl_fast import algorithms, models
from mpl_fast.algorithms.base import Algorithm
from mpl_fast.config import LearnerConfig, MPLConfig
from mpl_fast.errors import UserError, output_errors
from mpl_fast.learner import Learner
from tools.bench.clock import interleaved, spread
from tools.bench.device import NAMES, chosen
from tools.bench.report import Row, add_options, prepare, publish, result
from tools.bench_starts.saving import Saving

TINY = {"model": "wrn_10_1", "classes": 10, "rounds": 1}
STALL = 50.0  # ms, of a save


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 2: an option is wrong, or the folder cannot be written."""
    options = _options(arguments)
    if options.smoke:
        vars(options).update(TINY)
    try:
        found = _measured(options)
    except UserError as error:
        print(f"bench_ckpt: {error}", file=sys.stderr)
        return 2
    claim = f"median of {options.rounds} interleaved rounds; files are read from the page cache"
    publish(result("bench_ckpt", options, claim, found), options.out)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--model", default="resnet50", metavar="NAME", help="(%(default)s)")
    add("--classes", type=int, default=1000, metavar="N", help="(%(default)s)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    add("--folder", type=Path, default=Path("runs"), help="on the disk that counts (%(default)s)")
    add_options(parser, "bench_ckpt", rounds=5)
    return parser.parse_args(arguments)


def _measured(options: argparse.Namespace) -> list[Row]:
    prepare(options.out)
    algorithm = _algorithm(options)
    with output_errors(options.folder):
        options.folder.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".bench_ckpt_", dir=options.folder))
    try:
        saving = Saving(algorithm, folder)
        works: dict[str, Callable[[], object]] = {
            "save": saving.save,
            "verify": saving.verify,
            "load": saving.load,
            "resume": saving.resume,
            "plain write": saving.plain_write,
            "plain read": saving.plain_read,
            "plain hash": saving.plain_hash,
        }
        seconds = interleaved(
            works,
            rounds=options.rounds,
            warmup=1,
            seed=options.seed,
            seconds=60.0 * (options.minutes or float("inf")),
        )
        return _rows(seconds, saving.bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _algorithm(options: argparse.Namespace) -> Algorithm:
    device = chosen(options.device)
    options.device = device.type
    torch.manual_seed(options.seed)

    def new_learner(config: LearnerConfig) -> Learner:
        network = models.build(options.model, options.classes)
        return Learner(network, config, steps=1, device=device)

    return algorithms.build(MPLConfig(), new_learner)


def _rows(seconds: dict[str, list[float]], size: int) -> list[Row]:
    ms = {name: spread([1e3 * s for s in found]) for name, found in seconds.items()}
    rate = {name: spread([1e-6 * size / s for s in found]) for name, found in seconds.items()}
    size_mb = spread([size / 1e6])
    plain = {name: rate[f"plain {name}"] for name in ("write", "read", "hash")}
    return [
        Row("a checkpoint", size_mb, "MB", steady=True),
        Row(
            "a save stops training", ms["save"], "ms", limit=ms["plain write"].median, target=STALL
        ),
        Row("save", rate["save"], "MB/s", "higher", limit=plain["write"].median),
        Row("verify", rate["verify"], "MB/s", "higher", limit=plain["hash"].median),
        Row("load", rate["load"], "MB/s", "higher", limit=plain["read"].median),
        Row("verify, load and restore", ms["resume"], "ms"),
        *(Row(f"plain {name}", found, "MB/s", "higher") for name, found in plain.items()),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
