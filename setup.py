"""What is installed, under which name, and what it needs; other settings: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def version() -> str:
    """Reads the version as text: importing the package would need its dependencies installed."""
    text = (HERE / "mpl_fast" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('mpl_fast/__init__.py has no line __version__ = "..."')
    return found[1]


# `apex` is not here and must never be: the registry's package of that name is an unrelated web
# toolkit. NVIDIA's apex is optional and comes from its own repository or NVIDIA's container.
REQUIRES = [
    "torch>=2.11",
    "nvidia-dali-cuda120>=2.4",
    "triton>=3.6",
    "numpy",
    "tensorboardX",
    "timm",
    "PyYAML",
    "simplejpeg",
    "opencv-python-headless",
]
DEMO = ["scikit-learn", "matplotlib"]
RAY = ["ray"]  # packing on a cluster: make_rec.py pack --engine ray
PARQUET = ["pyarrow>=14.0.1"]  # packing from parquet files; older ones may run code in them
REPORT = ["scikit-learn", "matplotlib", "jinja2"]  # tools/report.py
EXPORT = ["onnx", "onnxscript", "onnxruntime"]  # tools/export.py to .onnx
SWEEP = ["optuna", "optuna-dashboard", "matplotlib"]  # tools/sweep.py
NOTEBOOK = ["jupyterlab"]
TESTS = ["pytest", "pytest-xdist", "hypothesis", "playwright", "nbclient", "ipykernel"]
DEV = [*TESTS, "ruff", "mypy", "types-PyYAML", "setuptools>=77", *DEMO, *RAY, *PARQUET]
DEV += [*REPORT, *EXPORT, *SWEEP]

setup(
    name="mpl_fast",
    version=version(),
    description="High-throughput Meta Pseudo Labels for image classifiers",
    long_description=(HERE / "README.md").read_text("utf-8")
    if (HERE / "README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # By hand, not by search: `kernels` is a link without `__init__.py`, which a search would skip,
    # and tests, tools and configs are no packages.
    packages=[
        "mpl_fast",
        "mpl_fast.algorithms",
        "mpl_fast.config",
        "mpl_fast.data",
        "mpl_fast.dry_run",
        "mpl_fast.inference",
        "mpl_fast.kernels",
        "mpl_fast.learner",
        "mpl_fast.models",
        "mpl_fast.packing",
        "mpl_fast.packing.check",
        "mpl_fast.packing.plan",
        "mpl_fast.packing.publish",
        "mpl_fast.packing.sources",
        "mpl_fast.packing.write",
        "mpl_fast.report",
        "mpl_fast.sweep",
        "mpl_fast.training",
    ],
    package_data={"mpl_fast.report": ["page.html", "page.css", "page.js"]},
    install_requires=REQUIRES,
    extras_require={
        # Replaces nvidia-dali-cuda120 on a CUDA 13 driver: uninstall that one first, since both
        # own the same folder.
        "cuda13": ["nvidia-dali-cuda130>=2.4"],
        "demo": DEMO,
        "report": REPORT,
        "export": EXPORT,
        "sweep": SWEEP,
        "notebook": NOTEBOOK,
        "parquet": PARQUET,
        "ray": RAY,
        "dev": DEV,
    },
)
