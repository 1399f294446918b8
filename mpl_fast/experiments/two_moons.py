"""The two-moons study: python -m mpl_fast.experiments.two_moons --out DIR"""

import argparse
import difflib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.config.command_line import fail
from mpl_fast.errors import ConfigError, OutputError, UserError, output_errors
from mpl_fast.experiments.command import AtLeast, Parser

if TYPE_CHECKING:
    from mpl_fast.experiments.moons_data import Setting
    from mpl_fast.experiments.moons_study import Result

PROGRAM = "two_moons"
INTERRUPTED = 130  # as shells have it after Ctrl-C
ABOUT = """Does feedback help? Labels only, MPL with each feedback and SMPL on two moons with six
labels, over many label draws and initial weights, paired. Writes two_moons.json, two_moons.md and
two_moons.png."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study and writes its files."""
    try:
        chosen = _parse(arguments)
        run(chosen)
    except UserError as error:
        fail(PROGRAM, error)
    except ModuleNotFoundError as error:
        fail(PROGRAM, UserError(f"{error.name} is missing: pip install scikit-learn matplotlib"))
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(chosen: argparse.Namespace) -> None:
    """The study of a checked command line."""
    import matplotlib  # noqa: F401  missing, it is to be missed before the training
    import torch

    from mpl_fast.experiments.moons_contestants import CONTESTANTS
    from mpl_fast.experiments.moons_data import Options
    from mpl_fast.experiments.moons_figure import draw
    from mpl_fast.experiments.moons_report import as_json, as_markdown, brief, write
    from mpl_fast.experiments.moons_study import study, with_baselines

    names = with_baselines(_known(chosen.contestants, list(CONTESTANTS)))
    options = Options(
        draws=chosen.draws,
        inits=chosen.inits,
        steps=chosen.steps,
        seed=chosen.seed,
        labels=chosen.labels,
    )
    _prepare(chosen.out)
    # What torch's forward-mode differentiation says of itself is nothing that a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    began, done = time.perf_counter(), 0

    def tell(name: str, found: "Mapping[Setting, Result]") -> None:
        nonlocal done
        done += 1
        seconds = time.perf_counter() - began
        print(
            f"{done:2d}/{len(names)} {seconds:5.0f} s  {CONTESTANTS[name].title}: {brief(found)}",
            flush=True,
        )

    results = study(names, options, tell)
    written = write(
        chosen.out,
        {
            "two_moons.json": lambda p: _text(p, as_json(results, options)),
            "two_moons.md": lambda p: _text(p, as_markdown(results, options)),
            "two_moons.png": lambda p: draw(results, options, p),
        },
    )
    print(*written, sep="\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=ABOUT, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--draws", type=AtLeast(2), default=20, help="label draws (20)")
    parser.add_argument("--inits", type=AtLeast(1), default=10, help="weights for each (10)")
    parser.add_argument("--steps", type=AtLeast(1), default=1000, help="training steps (1000)")
    parser.add_argument("--seed", type=AtLeast(0), default=0, help="of all that is random (0)")
    parser.add_argument(
        "--labels",
        choices=("spread", "random"),
        default="spread",
        help="the six labels: spread along the moons as published, or any six points (spread)",
    )
    parser.add_argument(
        "--contestants",
        default="",
        metavar="A,B",
        help="only these, and what they are compared with (all)",
    )
    return parser.parse_args(arguments)


def _known(text: str, names: list[str]) -> list[str]:
    """The contestants of a comma-separated list; all of an empty one."""
    asked = [name for name in text.replace(" ", "").split(",") if name]
    for name in asked:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"--contestants: {name!r} does not exist; {hint}")
    return asked or names


def _prepare(out: Path) -> None:
    """A folder that cannot be written is to be known before the training, not after."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".two_moons.probe"
        probe.touch()
        probe.unlink()


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
