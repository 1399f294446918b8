"""Starts Python on a machine with GPUs that compute nothing, which are built from `stubs/`.

PyTorch, Triton and DALI run their own code for CUDA; below them are stubs of the runtime, the
driver, cuBLAS and NCCL. The libraries are preloaded, so every test has a process of its own.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).with_name("stubs")
RUNTIME = ("log.c", "kernels.c", "streams.c", "memory.c", "device.c", "cublas.c", "nccl.c")
DRIVER = ("driver.c", "driver_absent.c")
OF_OTHER_DEVICES = ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")


def run(module: str, *arguments: str, ranks: int = 0) -> str:
    """Runs a module of the repository and returns what it printed; fails if the module does.

    `ranks`: under torchrun, with as many GPUs.
    """
    command = [sys.executable, "-W", "ignore", "-m"]
    if ranks:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    done = subprocess.run(
        [*command, module, *arguments],
        capture_output=True,
        text=True,
        timeout=1800,
        cwd=ROOT,
        env=environment(max(ranks, 1)),
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def environment(gpus: int) -> dict[str, str]:
    """The environment of a process on a machine with `gpus` null GPUs."""
    libraries = _built()
    inherited = {k: v for k, v in os.environ.items() if k not in OF_OTHER_DEVICES}
    return inherited | {
        "LD_PRELOAD": str(libraries / "libnull_runtime.so"),
        "LD_LIBRARY_PATH": str(libraries),
        "TRITON_LIBCUDA_PATH": str(libraries),
        "TRITON_CACHE_DIR": str(libraries / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(libraries / "inductor"),
        # The stubs give memory in whole blocks.
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",
        "NULL_GPUS": str(gpus),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


@functools.cache
def _built() -> Path:
    """The folder of the compiled stubs; skips the test where they cannot be compiled.

    It also holds what Inductor and Triton compile for the null GPU, and serves all processes and
    later calls until a stub or a version changes.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    headers = [
        *(file.parent for file in packages.glob("nvidia/*/include/cuda_runtime_api.h")),
        *packages.glob("triton/backends/nvidia/include"),
    ]
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    if len(headers) < 2:
        pytest.skip("needs CUDA's headers, which torch and triton install on Linux")
    digest = hashlib.sha256(repr([version("torch"), version("triton"), headers]).encode())
    for file in sorted(STUBS.iterdir()):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / f"null_gpu-{digest.hexdigest()[:16]}"
    if folder.exists():
        return folder
    folder.parent.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="null_gpu.", dir=folder.parent))
    compiler = ["gcc", "-O1", "-shared", "-fPIC", *(f"-I{path}" for path in headers)]
    for name, sources, options in (
        ("libnull_runtime.so", RUNTIME, ["-lpthread"]),
        ("libcuda.so.1", DRIVER, ["-Wl,-soname,libcuda.so.1"]),
    ):
        files = [str(STUBS / source) for source in sources]
        command = [*compiler, *files, "-o", str(made / name), *options, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (made / "libcuda.so").symlink_to("libcuda.so.1")  # the name that Triton links to
    # Without its functions, PyTorch asks the runtime how many GPUs there are.
    (made / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")
    try:
        made.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(made)
    return folder
