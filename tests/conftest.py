"""Settings and fixtures of all tests: paths, threads, and when a test cannot run here."""

import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Before torch is imported: the tensors of tests are small, and tests run on all cores already.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Two busy cores make any time limit a coin toss.
settings.register_profile("default", deadline=None, max_examples=30)
settings.load_profile("default")


# A shell starts background jobs with Ctrl-C ignored, which processes of the tests would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# `tools/first_gpu_run.sh` ends tests so that take too long: pytest then prints what has failed.
signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real image archives beside the repository; without it the test is skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the image archives of ../shared/data")
    return folder


@pytest.fixture(scope="session")
def tiny_rec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty training and fifty held-out digits, packed by the command that users run."""
    from tests.tiny_run import make_rec

    return make_rec(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def tiny_trained(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a complete run of recipe mpl on these digits, on any processor in fp32."""
    from tests.tiny_run import arguments, train_here

    run = tmp_path_factory.mktemp("trained") / "run"
    done = train_here(*arguments(run, tiny_rec), "--precision=fp32")
    assert done.returncode == 0, done.stderr
    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files with slow tests first, so that all processes end at about the same time, and skips
    tests marked `gpu` without a GPU."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: files stay together
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # late: most test files do without

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
