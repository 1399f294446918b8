"""What each feedback is worth and costs: python -m mpl_fast.experiments.feedbacks --out DIR"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from mpl_fast.experiments.command import AtLeast, Parser

PROGRAM = "feedbacks"
INTERRUPTED = 130  # as shells have it after Ctrl-C
SMOKE = {"problems": 3, "drawn": 2, "draws": 8, "rounds": 3}
ABOUT = """Compares the teacher's gradient of every feedback of Meta Pseudo Labels with the exact
meta-gradient on random tiny problems, counts the passes of a step and clocks it on a CPU. Writes
feedbacks.json and feedbacks.md."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the files."""
    try:
        run(_parse(arguments))
    except UserError as error:
        fail(PROGRAM, error)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(chosen: argparse.Namespace) -> None:
    """The measurements of a checked command line."""
    _prepare(chosen.out)
    import torch

    from mpl_fast.experiments import feedbacks_measure as measure
    from mpl_fast.experiments.feedbacks_problems import KINDS
    from mpl_fast.experiments.feedbacks_report import Results, as_json, as_markdown
    from mpl_fast.experiments.moons_report import write

    names = ("problems", "drawn", "draws", "rounds")
    amounts = SMOKE if chosen.smoke else {name: getattr(chosen, name) for name in names}
    if amounts["drawn"] > amounts["problems"]:
        raise ConfigError(
            f"--drawn {amounts['drawn']} is more than --problems {amounts['problems']}"
        )
    options = measure.Options(**amounts, scale=chosen.scale, seed=chosen.seed)
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    began, near = time.perf_counter(), {}
    for name, kind in KINDS.items():
        if name != "off":
            near[name] = {u: measure.nearness(kind, u, options) for u in options.sizes}
            cosines = ", ".join(f"{row.cosine:+.2f}" for row in near[name].values())
            print(
                f"{time.perf_counter() - began:5.0f} s  {kind.title}: cosine {cosines}", flush=True
            )
    counted = {
        name: {network: measure.rows_of(c) for network, c in measure.passes(kind).items()}
        for name, kind in KINDS.items()
    }
    clocked = measure.seconds(options)
    off = sorted(clocked["off"])[len(clocked["off"]) // 2]
    results = Results(near, counted, measure.relative(clocked), off, torch.get_num_threads())
    print(f"{time.perf_counter() - began:5.0f} s  {options.rounds} rounds clocked", flush=True)
    texts = {
        "feedbacks.json": as_json(results, options),
        "feedbacks.md": as_markdown(results, options),
    }
    writers = {
        name: lambda path, text=text: path.write_text(text, encoding="utf-8")
        for name, text in texts.items()
    }
    print(*write(chosen.out, writers), sep="\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=ABOUT, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    for name, least, default, words in (
        ("problems", 1, 60, "random problems"),
        ("drawn", 2, 10, "of these with drawn labels"),
        ("draws", 2, 80, "draws of labels in each of these"),
        ("rounds", 2, 25, "steps of each feedback that are clocked"),
        ("seed", 0, 0, "of all that is random"),
    ):
        read = AtLeast(least)
        parser.add_argument(f"--{name}", type=read, default=default, help=f"{words} ({default})")
    parser.add_argument(
        "--scale",
        type=_above_0,
        default=2.0,
        help="multiplies the networks' initial weights: the larger, the surer they are (2)",
    )
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    return parser.parse_args(arguments)


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


def _prepare(out: Path) -> None:
    """A folder that cannot be written is to be known before the work, not after."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".feedbacks.probe"
        probe.touch()
        probe.unlink()


if __name__ == "__main__":
    main()
