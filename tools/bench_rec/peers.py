"""Installs the peers of the benchmark, each in an environment of its own."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

PEERS = {
    "streams": ("webdataset==1.0.2", "mosaicml-streaming==0.13.0"),
    "mxnet": ("mxnet==1.9.1", "numpy==1.23.5", "opencv-python-headless<4.9"),
}
VERSION = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


def prepare(folder: Path) -> None:
    """Install every peer."""
    for name, packages in PEERS.items():
        # mxnet 1.9.1 needs numpy 1.23, which has no wheel for a Python after 3.11.
        python = shutil.which("python3.11") if name == "mxnet" else sys.executable
        if not python:
            sys.exit("bench_make_rec: mxnet 1.9.1 needs python3.11, which is not on the PATH")
        subprocess.run([python, "-m", "venv", folder / name], check=True)
        if name == "streams":
            _lend_torch(folder / name)
        subprocess.run([folder / name / "bin" / "pip", "install", *packages], check=True)


def _lend_torch(environment: Path) -> None:
    """Let it find this project's torch: mosaicml-streaming imports it, the writer never uses it."""
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        [site] = environment.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")


def versions(folder: Path) -> dict[str, str]:
    """Return the version of every package that is installed there."""
    found = {}
    for environment, packages in PEERS.items():
        python = folder / environment / "bin" / "python"
        for package in packages if python.exists() else ():
            name = package.split("=")[0].split("<")[0]
            asked: list[str | Path] = [python, "-c", VERSION, name]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found[name] = done.stdout.strip()
    return found
