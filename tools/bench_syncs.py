"""Counts what a warm step of each recipe makes the host wait for, launches and exchanges.

Host synchronizations: on CUDA as PyTorch tells of them, on a CPU those operators that would wait
for a GPU. Launches: kernels, copies and fills; on a CPU operators other than views. Collectives: of
a step on 2 ranks, DDP's own included. (The loop around the step adds one more on the host, the wish
to stop, which it waits for a step later and the GPU never.) Nothing is timed.
The public code's step stands beside ours, without a budget.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, UserError
from tools.bench import report
from tools.bench.clock import Spread
from tools.bench.device import NAMES, chosen
from tools.bench.report import Row
from tools.bench_steps import contestants
from tools.bench_steps.collectives import counted
from tools.bench_steps.contestants import Contestant, Flavor
from tools.bench_steps.launches import launches
from tools.bench_steps.setting import RECIPES, Setting, default_size, network
from tools.bench_steps.waits import waits

Json = dict[str, Any]
SYNCS, COLLECTIVES = 0, 3  # budgets of a step
UNIT = "a step"
WARM = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1: a step is above its budget. 2: an option that cannot be."""
    options = _options(arguments)
    try:
        setting = _setting(options)
        report.prepare(options.out)
        network(setting)  # a wrong name is told here, not by every rank
        found = _counted(options, setting)
        report.write(found, options.out)
    except UserError as error:
        fail("bench_syncs", error)
    print(report.table(found["rows"]))
    above = [row["name"] for row in found["rows"] if row.get("met") is False]
    for name in above:
        print(f"bench_syncs: above the budget: {name}: {found['where'].get(name)}", file=sys.stderr)
    return int(bool(above))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="wrn_28_2", metavar="NAME", help="any that mpl_fast knows (%(default)s)")
    add("--labeled", type=int, default=4, metavar="N", help="labeled images (%(default)s)")
    add("--mu", type=int, default=2, metavar="N", help="unlabeled for each of them (%(default)s)")
    add("--device", choices=NAMES, default="auto", help="(%(default)s)")
    recipes = tuple(RECIPES)
    add("--recipe", nargs="+", choices=recipes, metavar="NAME", help="(all)")
    report.add_options(parser, "bench_syncs", rounds=1)
    return parser.parse_args(arguments)


def _setting(options: argparse.Namespace) -> Setting:
    device = chosen(options.device)
    if min(options.labeled, options.mu) < 1:
        raise ConfigError("--labeled and --mu must be 1 or more")
    if options.recipe is None:  # a smoke test without what takes seconds to load, in 3 processes
        options.recipe = [r for r in RECIPES if not (options.smoke and r.endswith("exact"))]
    if options.smoke:
        return Setting("wrn_10_1", 2, 2, 16, device)
    size = default_size(options.model)
    return Setting(options.model, options.labeled, options.mu, size, device)


def _counted(options: argparse.Namespace, setting: Setting) -> Json:
    rows, where = list[Row](), dict[str, Any]()
    exchanged = counted(setting, options.recipe)
    plain = contestants.plain(setting, amp=False)
    _count("plain mpl", plain, setting, rows, where, budget=None)
    flavor = Flavor(bf16=setting.device.type == "cuda")
    for recipe in options.recipe:
        one = contestants.ours(setting, recipe, flavor)
        assert one is not None
        _count(recipe, one, setting, rows, where, budget=SYNCS)
        names = exchanged[recipe]
        rows.append(_row(f"{recipe}: collectives", names, COLLECTIVES, where))
    claim = f"counts of one warm step of {setting.model}, eager"
    return report.result("bench_syncs", options, claim, rows) | {"where": where}


def _count(
    name: str,
    one: Contestant,
    setting: Setting,
    rows: list[Row],
    where: dict[str, Any],
    *,
    budget: float | None,
) -> None:
    for _ in range(WARM):  # libraries synchronize when they are loaded
        one.step()
    found = waits(one.step, setting.device)
    rows.append(_row(f"{name}: host synchronizations", found, budget, where))
    what = "launches" if setting.device.type == "cuda" else "operator calls"
    number = float(launches(one.step, setting.device))
    rows.append(Row(f"{name}: {what}", Spread(number, number, number, 1), UNIT, steady=True))


def _row(name: str, found: Counter[str], budget: float | None, where: dict[str, Any]) -> Row:
    number = float(sum(found.values()))
    if found:
        where[name] = dict(found)
    return Row(name, Spread(number, number, number, 1), UNIT, steady=True, target=budget)


if __name__ == "__main__":
    raise SystemExit(main())
