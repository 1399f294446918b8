"""Counts host synchronizations, launches and collectives of a warm step of each recipe.

Host synchronizations: on CUDA those that PyTorch reports, on a CPU the operators that would wait
for a GPU. Launches: kernels, copies and fills; on a CPU operators other than views. Collectives: of
a step on 2 ranks, DDP's own included; with batch norm over both ranks (`norm sync`), two for each
norm of both networks as well. (The loop around the step adds one more on the host, the
request to stop, which it waits for a step later and the GPU never.) Nothing is timed. The plain
step is counted as well, without a budget. Exit code 1: a step is above its budget.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mpl_fast import distributed
from mpl_fast.training.process import die_with_launcher
from tools.bench import step_variants
from tools.bench.count import collectives, host_syncs, launches, operators
from tools.bench.harness import Report, run
from tools.bench.results import count_row
from tools.bench.step_variants import RECIPES, Flavor, Variant, add_setting_options, setting_of
from tools.bench.torchrun import arguments_of, on_ranks

TINY = {"model": "wrn_10_1", "labeled": 2, "mu": 2, "image_size": 16}
SYNCS, COLLECTIVES = 0, 3  # budgets of a step
RANKS, WARM = 2, 2
SYNC_NORM = "mpl norm sync"


def main(arguments: Sequence[str]) -> int:
    """See `tools.bench.harness.run`."""
    return run("syncs", __doc__, arguments, measure, options, rounds=1, tiny=TINY)


def options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every benchmark."""
    add_setting_options(parser, "4", mu=2)
    add, recipes = parser.add_argument, tuple(RECIPES)
    add("--recipe", nargs="+", choices=recipes, default=recipes, metavar="NAME", help="(all)")


def measure(options: argparse.Namespace, report: Report) -> None:
    """The plain step, then recipe after recipe."""
    setting = setting_of(options, cuda=4, cpu=4)
    device = setting.device
    report.claim = f"counts of one warm step of {setting.model}, eager"
    report.more["where"] = {}
    exchanged = on_ranks("tools.bench.syncs", RANKS, setting, options.recipe)
    _count("plain mpl", step_variants.plain(setting, amp=False), device, report, budget=None)
    norms = sum(isinstance(m, _BatchNorm) for m in step_variants.network(setting).modules())
    for name, (recipe, flavor) in _variants(options.recipe).items():
        one = step_variants.ours(setting, recipe, flavor._replace(bf16=device.type == "cuda"))
        _count(name, one, device, report, budget=SYNCS)
        budget = COLLECTIVES + (2 * 2 * norms if flavor.norm == "sync" else 0)
        _add(f"{name}: collectives", Counter(exchanged[name]), budget, report)


def _variants(recipes: Sequence[str]) -> dict[str, tuple[str, Flavor]]:
    """Recipe and flavor of what is counted, by name."""
    found = {recipe: (recipe, Flavor()) for recipe in recipes}
    if "mpl" in recipes:
        found[SYNC_NORM] = "mpl", Flavor(norm="sync")
    return found


def _count(
    name: str, one: Variant, device: torch.device, report: Report, *, budget: int | None
) -> None:
    for _ in range(WARM):  # libraries synchronize when they are loaded
        one.step()
    _add(f"{name}: host synchronizations", host_syncs(one.step, device), budget, report)
    if device.type == "cuda":
        report.add([count_row(f"{name}: launches", launches(one.step), "a step")])
    else:
        calls = operators(one.step).launches
        report.add([count_row(f"{name}: operator calls", calls, "a step")])


def _add(name: str, found: Counter[str], budget: int | None, report: Report) -> None:
    if found:
        report.more["where"][name] = dict(found)
    if budget is not None and found.total() > budget:
        report.fail(name, f"above the budget of {budget}: {dict(found)}")
    report.add([count_row(name, found.total(), "a step", target=budget)])


def rank(given: Sequence[str]) -> None:
    """On one rank: counts the collectives of a step of each recipe; rank 0 writes them.

    Which collectives there are does not depend on the device, so gloo connects the ranks.
    """
    die_with_launcher()
    distributed.init("cpu")
    out, setting, recipes = arguments_of(given, torch.device("cpu"))
    found: dict[str, Counter[str]] = {}
    for name, (recipe, flavor) in _variants(recipes).items():
        one = step_variants.ours(setting, recipe, flavor)
        for _ in range(WARM):  # DDP orders its buckets in its first steps
            one.step()
        found[name] = collectives(one.step)
    if distributed.rank() == 0:
        out.write_text(json.dumps(found))
    distributed.shutdown()


if __name__ == "__main__":
    rank(sys.argv[1:])
