"""A training run small enough for tests: 110 real JPEG digits, a tiny wide ResNet, a few steps."""

import contextlib
import errno
import gc
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "mpl_fast" / "train.py"

CONFIG = """
recipe: {recipe}
steps: 6
labeled_batch: 4
unlabeled_batch: 8
eval_every: 4
eval_batch: 16
log_every: 2
checkpoint_every: 2
device: cpu
deterministic: true
data: {{image_size: 16, crop: pad_crop, flip: true, num_ops: 1, magnitude: 8,
  translate: 4, cutout: 4, threads: 1, prefetch: 1}}
model: {{name: wrn_10_1, norm_momentum: 0.1}}
algorithm:
"""
LEARNER = "{lr: 0.05, delay_steps: 1, warmup: 2, ema: 0.9, dropout: 0.2}"
MPL = f"  teacher: {LEARNER}\n  student: {LEARNER}\n"
MPL += "  consistency: {ramp: 2, threshold: 0.1}\n"
ALGORITHMS = {  # the first word is the recipe; fine-tuning needs another run: test_finetune.py
    "supervised": f"  learner: {LEARNER}\n",
    "supervised mixup": f"  learner: {LEARNER}\n  mixup: 1.0\n",
    "uda": f"  learner: {LEARNER}\n  consistency: {{ramp: 2, threshold: 0.1}}\n",
    "fixmatch": f"  learner: {LEARNER}\n  threshold: 0.1\n",
    "mpl": MPL,
    "mpl sampled": MPL + "  feedback: sampled\n  baseline: 0.9\n",
    "mpl per_example": MPL + "  feedback: per_example\n",
    "mpl exact": MPL + "  feedback: exact\n  held_out: 0.5\n",
    "mpl exact split recompute": MPL
    + "  feedback: exact\n  bn_batches: split\n  teacher_graph: recompute\n",
    "mpl parity_kekmodel": MPL + "  feedback: parity_kekmodel\n",
    "mpl parity_google": MPL + "  feedback: parity_google\n  baseline: 0.9\n",
    "mpl_roleplay": MPL + "  swap_every: 2\n  student_delay_steps: 1\n",
    "smpl": f"  learner: {LEARNER}\n  consistency: {{ramp: 2, threshold: 0.1}}\n",
    "smpl exact": f"  learner: {LEARNER}\n  feedback: exact\n",
    "metasemi": f"  learner: {LEARNER}\n",
}


def make_rec(folder: Path) -> Path:
    """Packs 60 training and 50 held-out digits with the command that users run."""
    write_digits(folder / "images")
    images, out = folder / "images", folder / "rec"
    command = [sys.executable, ROOT / "tools" / "make_rec.py", "pack", "--quiet"]
    command += ["--src", images / "train", "--val", images / "val", "--labeled", "20", "--out", out]
    subprocess.run([str(part) for part in command], check=True)
    return out


def write_digits(folder: Path, train: int = 60, val: int = 50) -> None:
    """Writes scikit-learn's digits as 16 x 16 JPEG files in class folders."""
    import cv2
    import numpy as np
    import simplejpeg
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(train + val):
        image = cv2.resize((digits.images[i] * 255 / 16).astype(np.uint8), (16, 16))
        color = np.ascontiguousarray(np.repeat(image[..., None], 3, axis=2))
        file = folder / ("train" if i < train else "val") / str(digits.target[i]) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(simplejpeg.encode_jpeg(color, quality=95))


def arguments(folder: Path, rec: Path, *, recipe: str = "mpl") -> list[str]:
    """Options of a run in `folder`; `recipe` is a key of ALGORITHMS."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{recipe.replace(' ', '_')}.yaml"
    config.write_text(CONFIG.format(recipe=recipe.split()[0]) + ALGORITHMS[recipe])
    return ["--config", str(config), "--data.root", str(rec), "--run-dir", str(folder)]


def command(arguments: list[str], ranks: int = 1) -> list[str]:
    """What a user types."""
    if ranks == 1:
        return [sys.executable, str(TRAIN), *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={ranks}", str(TRAIN), *arguments]


def environment() -> dict[str, str]:
    """One thread a rank: sums come in one order, and two cores are enough for two ranks."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def free_port() -> str:
    """A free port of this machine."""
    with socket.socket() as one:
        one.bind(("", 0))
        return str(one.getsockname()[1])


def run(arguments: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end, however it ends."""
    return subprocess.run(
        command(arguments, ranks),
        capture_output=True,
        text=True,
        timeout=600,
        env=environment(),
        check=False,
    )


def run_here(main: Callable[[], object], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, which saves the seconds of its imports."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch("sys.argv", ["", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            torch.use_deterministic_algorithms(False)
    gc.collect()  # closes what the end of a process would
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def train_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs train.py in this process."""
    from mpl_fast import train

    return run_here(train.main, [*arguments])


def run_in_turn(*sessions: list[str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs sessions one after the other: of one rank in this process, of more in one process each.

    A session is a run's options, or one of SESSIONS with its arguments.
    """
    if ranks == 1:
        return run_here(lambda: in_turn([*sessions]), [])
    return launch("tests.tiny_run", json.dumps(sessions), ranks=ranks)


def launch(module: str, argument: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a module of the tests under torchrun."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", *launcher, argument],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": path},
        check=False,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without events."""
    return [line for line in _metrics(folder) if "event" not in line]


def events(folder: Path) -> list[dict[str, Any]]:
    """The events in metrics.jsonl."""
    return [line for line in _metrics(folder) if "event" in line]


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def final_state(folder: Path, step: int = 6) -> dict[str, Any]:
    """What all ranks share of a run's checkpoint."""
    file = folder / "checkpoints" / f"step_{step:08d}" / "state.pt"
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def replace_state(file: Path, state: dict[str, Any]) -> None:
    """Replaces a file of a checkpoint, and its checksum."""
    torch.save(state, file)
    about = file.with_name("checkpoint.json")
    content, text = file.read_bytes(), json.loads(about.read_text())
    text["files"][file.name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    about.write_text(json.dumps(text))


def flip(file: Path) -> None:
    """Changes one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def evaluate(*arguments: str) -> None:
    """Runs tools/evaluate.py in this process."""
    from tools.evaluate import main

    with mock.patch("sys.argv", ["evaluate.py", *arguments]):
        main()


FULL = set[tuple[int, int]]()  # ranks and steps of checkpoints that cannot be written


def full_disk(rank: str, *steps: str) -> None:
    """Of one rank, for the checkpoints of some steps of the following sessions."""
    FULL.clear()
    FULL.update((int(rank), int(step)) for step in steps)


SESSIONS: dict[str, Callable[..., object]] = {
    "evaluate": evaluate,  # on all ranks, as the next; the others on the first
    "full_disk": full_disk,
    "flip": lambda file: flip(Path(file)),
    "move": lambda file, to: Path(file).rename(to),
}


def in_turn(sessions: list[list[str]]) -> None:
    """All sessions use one process group: it cannot be joined again after leaving it."""
    from mpl_fast import distributed
    from mpl_fast.config import command_line
    from mpl_fast.errors import UserError
    from mpl_fast.training import phases, saving

    real = saving._write

    def write(path: Path, *given: Any) -> dict[str, Any]:
        if (distributed.rank(), int(path.parent.name[-8:])) in FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *given)

    leave = distributed.shutdown
    with (
        mock.patch.object(distributed, "shutdown"),  # of evaluations
        mock.patch.object(saving, "_write", write),
    ):
        for name, *given in sessions:
            distributed.barrier()
            if name not in SESSIONS:
                try:
                    phases.train(*command_line.phases([name, *given]))
                except UserError as error:
                    print(f"rank {distributed.rank()}: {error}", file=sys.stderr)
            elif distributed.rank() == 0 or name in ("evaluate", "full_disk"):
                SESSIONS[name](*given)
            distributed.barrier()
    leave()


if __name__ == "__main__":
    in_turn(json.loads(sys.argv[1]))
