"""Benchmarks: `python -m tools.bench NAME [options]`, from the root of the repository."""

import sys
from collections.abc import Sequence
from importlib import import_module

from mpl_fast.errors import run_command
from tools.bench.jobs import interrupt_on_signals

NAMES = {
    "step": "a whole training step, beside a plain PyTorch step of MPL",
    "losses": "the fused losses: time, launches, bytes, beside PyTorch, torch.compile and Liger",
    "backbone": "networks by themselves: layouts, precisions, torch.compile, a dry run's bounds",
    "derivative": "the derivative that feedback exact takes: fused norms, PyTorch's, central",
    "optimizer": "clipping, SGD and moving average",
    "input": "DALI pipelines, beside torchvision and SPDL",
    "pack": "packing, verifying and re-splitting, beside webdataset, MDS and im2rec",
    "plan": "the plan and the end of a pack of a million images: CPU time and memory",
    "syncs": "host synchronizations, launches and collectives of a step of each recipe",
    "ranks": "how a step scales over ranks",
    "checkpoint": "saving and verifying a checkpoint, and resuming",
    "startup": "--help, first step, resume",
    "all": "every benchmark that this machine can run, within --minutes",
    "compare": "two results, or two folders of them: fails on a regression",
}


def main(arguments: Sequence[str]) -> int:
    """Runs one benchmark and returns its exit code; 2 if there is no such benchmark."""
    if arguments and arguments[0] in NAMES:
        # Imported here: PyTorch takes seconds, which neither the list nor `compare` needs.
        code: int = import_module(f"tools.bench.{arguments[0]}").main(arguments[1:])
        return code
    help_wanted = not arguments or arguments[0] in ("-h", "--help")
    out = sys.stdout if help_wanted else sys.stderr
    if not help_wanted:
        print(f"tools.bench: error: there is no benchmark {arguments[0]!r}", file=out)
    print("usage: python -m tools.bench NAME [options]\n", file=out)
    print("\n".join(f"  {name:<12}{text}" for name, text in NAMES.items()), file=out)
    return 0 if help_wanted else 2


if __name__ == "__main__":
    interrupt_on_signals()  # so that temporary data is removed
    run_command("tools.bench", lambda: main(sys.argv[1:]), "interrupted")
