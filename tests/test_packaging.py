"""What is installed, and that nothing of ours takes a name that belongs to somebody else.

`kernels/` is at the top of the repository, where a reader looks for it, and is imported as
`mpl_fast.kernels`, through a link. It has no `__init__.py` on purpose: the registry has a package
named `kernels`, and a folder without that file loses to any real package on the path, so this
checkout can never shadow it, nor an installation overwrite it.
"""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

LOCK_LINE = re.compile(r"[a-z0-9][a-z0-9.-]*==[^\s;]+( ; [^;]+)?")


def requirements(root: Path) -> list[str]:
    """Lines of the lock."""
    lines = (root / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def test_kernels_is_a_link_without_init(root: Path) -> None:
    link = root / "mpl_fast" / "kernels"
    assert link.is_symlink()
    assert link.resolve() == root / "kernels"
    assert not (root / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_kernels_is_found_under_our_name_only(tmp_path: Path) -> None:
    """From a neutral folder, as a user would have it."""
    code = (
        "import mpl_fast.kernels.reference as ours, importlib.util as u, sys;"
        "spec = u.find_spec('kernels');"
        "places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())];"
        "print(ours.__file__, *places, sep='\\n')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if out.stderr.endswith("No module named 'mpl_fast'\n"):
        pytest.skip("mpl_fast is not installed; `make venv` does")
    assert out.returncode == 0, out.stderr
    ours, *others = out.stdout.split()
    home = Path(ours).resolve().parent
    assert home.name == "kernels"
    assert all(Path(other).resolve() not in (home, home / "__init__.py") for other in others)


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files of a wheel, built from a copy so that nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (root / name).exists():
            (source / name).write_bytes((root / name).read_bytes())
    for folder in ("mpl_fast", "kernels"):
        for file in sorted((root / folder).rglob("*.*")):
            if file.suffix not in (".py", ".html", ".css", ".js"):
                continue
            relative = file.relative_to(root)
            if relative.parts[:2] != ("mpl_fast", "kernels"):
                (source / relative).parent.mkdir(parents=True, exist_ok=True)
                (source / relative).write_bytes(file.read_bytes())
    (source / "mpl_fast" / "kernels").symlink_to("../kernels")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("mpl_fast-*.whl")
    return zipfile.ZipFile(built).namelist()


@pytest.mark.slow
def test_wheel_holds_license_and_every_module_under_one_name(root: Path, wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mpl_fast"}
    packed = {name for name in wheel if name.endswith(".py")}
    assert {f"mpl_fast/report/page.{kind}" for kind in ("html", "css", "js")} <= {*wheel}
    files = set((root / "mpl_fast").rglob("*.py")) | set((root / "mpl_fast/kernels").glob("*.py"))
    assert packed == {str(file.relative_to(root)) for file in files}
    assert "mpl_fast/kernels/teacher.py" in packed
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_apex_of_the_registry_is_never_required(root: Path) -> None:
    """It is an unrelated web toolkit; NVIDIA's has another source."""
    quoted = re.findall(r'"([A-Za-z][\w.-]*)', (root / "setup.py").read_text())
    assert "torch" in quoted
    assert "apex" not in quoted
    assert not [line for line in requirements(root) if line.startswith("apex")]


def test_the_lock_pins_every_line_and_names_no_host(root: Path) -> None:
    lines = requirements(root)
    assert len(lines) > 50
    assert [line for line in lines if not LOCK_LINE.fullmatch(line)] == []
    assert "torch==2.15.0 ; python_full_version >= '3.11'" in lines


def test_the_lock_pins_every_requirement(root: Path) -> None:
    """What setup.py requires is in the lock, or a fresh `.venv` would lack it."""
    setup = ast.parse((root / "setup.py").read_text())
    lists = [
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("REQUIRES", "DEMO")
    ]
    wanted = {re.split(r"[<>=\[]", name)[0].lower() for names in lists for name in names}
    lock = (root / "requirements.lock").read_text()
    pinned = {m[1].lower() for m in re.finditer(r"^([\w.-]+)==", lock, re.MULTILINE)}
    assert len(wanted) > 10 and not wanted - pinned


@pytest.mark.slow
def test_plain_pytest_finds_tests_and_tools(root: Path) -> None:
    """As `pytest` starts, without the working folder on the import path."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/tools/test_studies.py"],
        cwd=root,
        env={"PATH": os.environ["PATH"], "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.ngc"])
@pytest.mark.parametrize("module", ["tools.bench", "tools.studies.ablation"])
def test_tools_are_found_in_the_environment_of_an_image(root: Path, file: str, module: str) -> None:
    """PYTHONSAFEPATH, which the images set, takes the working folder off the import path."""
    image = (root / "docker" / file).read_text()
    variables = dict(re.findall(r"\b(PYTHON[A-Z]+)=(\S+)", image))
    assert variables.pop("PYTHONSAFEPATH") == "1"
    environment = {
        name: value.replace("/opt/mpl_fast", str(root)) for name, value in variables.items()
    }
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=root,
        env={"PATH": os.environ["PATH"], "PYTHONSAFEPATH": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lacks", ["", "equalize", "decoders.image_random_crop"])
def test_an_image_is_not_built_with_a_dali_that_lacks_an_operator(root: Path, lacks: str) -> None:
    deleted = f"from nvidia.dali import fn; del fn.{lacks}" if lacks else ""
    check = "import runpy; runpy.run_path('docker/dali_operators.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{deleted}\n{check}"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == bool(lacks) and (f"lacks {lacks}: install" in done.stderr) == bool(
        lacks
    )
