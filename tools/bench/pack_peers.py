"""Installs the peers of `pack`, each in an environment of its own.

`python -m tools.bench.pack_peers FOLDER`, once; then `python -m tools.bench pack --peers FOLDER`.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = {
    "streams": ("webdataset==1.0.2", "mosaicml-streaming==0.13.0"),
    "mxnet": ("mxnet==1.9.1", "numpy==1.23.5", "opencv-python-headless<4.9"),
}
VERSION = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


def main() -> None:
    """Installs every peer."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m tools.bench.pack_peers FOLDER")
    folder = Path(sys.argv[1])
    for name, packages in ENVIRONMENTS.items():
        # mxnet 1.9.1 needs numpy 1.23, which has no wheel for a Python after 3.11.
        python = shutil.which("python3.11") if name == "mxnet" else sys.executable
        if not python:
            sys.exit("pack_peers: mxnet 1.9.1 needs python3.11, which is not on the PATH")
        subprocess.run([python, "-m", "venv", folder / name], check=True)
        if name == "streams":
            _share_torch(folder / name)
        subprocess.run([folder / name / "bin" / "pip", "install", *packages], check=True)


def versions(folder: Path) -> dict[str, str]:
    """The version of every package that is installed there."""
    found = {}
    for environment, packages in ENVIRONMENTS.items():
        python = folder / environment / "bin" / "python"
        for package in packages if python.exists() else ():
            name = package.split("=")[0].split("<")[0]
            command: list[str | Path] = [python, "-c", VERSION, name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                found[name] = done.stdout.strip()
    return found


def _share_torch(environment: Path) -> None:
    """Makes our torch visible: mosaicml-streaming imports it, its writer never uses it."""
    torch = importlib.util.find_spec("torch")
    if torch and torch.origin:
        [site] = environment.glob("lib/python*/site-packages")
        (site / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")


if __name__ == "__main__":
    main()
