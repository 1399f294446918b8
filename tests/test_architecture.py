"""Imports point one way, and the command lines stay quick: read off the source, nothing is run.

The order, from top to bottom; a unit imports only units below it:

    train | sweep -> report -> inference | dry_run -> training -> algorithms -> learner
          -> losses | models | packing -> kernels | data -> batch | config | distributed | locks
          -> errors | atomic | first_few | untrusted
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mpl_fast"
LAYERS = [
    {"train", "sweep"},
    {"report"},
    {"inference", "dry_run"},
    {"training"},
    {"algorithms"},
    {"learner"},
    {"losses", "models", "packing"},
    {"kernels", "data"},
    {"batch", "config", "distributed", "locks"},
    {"errors", "atomic", "first_few", "untrusted"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})
COMMANDS = [*FILES, *sorted(ROOT.glob("tools/**/*.py"))]
PARSERS = [path for path in COMMANDS if "Parser(" in path.read_text()]
NEVER_IN_ALGORITHMS = (
    "torch.distributed", "torch.amp", "torch.autocast", "torch.cuda.amp", "torch.nn.parallel",
    "nvidia", "triton",
)  # fmt: skip
# Behind a command line that answers --help at once: these wait until they are needed.
LIGHT = [
    "__init__", "config/__init__", "config/command_line", "data/__init__", "data/manifest",
    "data/records", "errors", "packing/__init__", "packing/cli", "packing/options", "packing/pack",
    "sweep/__init__", "sweep/command", "train", "training/process", "training/status",
]  # fmt: skip
HEAVY = {"torch", "torchvision", "timm", "nvidia", "tensorboardX", "triton", "matplotlib"}
HEAVY |= {"optuna"}


def unit(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, late: bool = True, node: ast.AST | None = None) -> Iterator[str]:
    """Full names imported by a file, or in one `node` of it; without `late`, only those that
    importing it imports."""
    for child in ast.iter_child_nodes(node or ast.parse(path.read_text())):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                parents = ("mpl_fast", *path.relative_to(PACKAGE).parts)[: -child.level]
                module = ".".join((*parents, module)).rstrip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in child.names)
        elif late or not (_is_function(child) or _is_type_checking(child)):
            yield from imports(path, late=late, node=child)


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def units_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imports(path))
    return {parts[1] for parts in names if parts[0] == "mpl_fast" and len(parts) > 1}


def relative(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    here = unit(path)
    if here == "__init__":
        assert not [name for name in imports(path, late=False) if name.startswith("mpl_fast")]
        return
    assert here in LEVEL, f"give {here} a place in LAYERS"
    for there in (units_imported(path) - {here, "__version__"}) & set(LEVEL):
        assert LEVEL[here] < LEVEL[there], f"{path.name} imports {there}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=relative)
def test_kernels_stand_alone(path: Path) -> None:
    ours = {name for name in imports(path) if name.startswith("mpl_fast")}
    assert all(name.startswith("mpl_fast.kernels") for name in ours)


@pytest.mark.parametrize("path", sorted((PACKAGE / "algorithms").glob("*.py")), ids=relative)
def test_algorithms_read_as_if_there_were_one_device(path: Path) -> None:
    """Precision, ranks and gradient averaging are the learner's, records are data's."""
    prefixes = tuple(f"{name}." for name in NEVER_IN_ALGORITHMS)
    assert not [name for name in imports(path) if f"{name}.".startswith(prefixes)]
    tree = ast.walk(ast.parse(path.read_text()))
    words = {node.attr for node in tree if isinstance(node, ast.Attribute)}
    assert not words & {"autocast", "all_reduce", "DistributedDataParallel"}


@pytest.mark.parametrize("name", LIGHT)
def test_command_lines_import_nothing_heavy(name: str) -> None:
    """Directly, or through what they import of this package at module level."""
    waiting, seen = [PACKAGE / f"{name}.py"], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for imported in imports(path, late=False):
            assert imported.split(".")[0] not in HEAVY, f"{relative(path)} imports {imported}"
            waiting += [file for file in files_of(imported) if file not in seen]


def files_of(module: str) -> list[Path]:
    """The files that importing a module of this package runs."""
    parts = module.split(".")
    if parts[0] != "mpl_fast":
        return []
    base = PACKAGE.joinpath(*parts[1:])
    places = [base.with_suffix(".py")] if len(parts) > 1 else []
    return [file for file in [*places, base / "__init__.py"] if file.exists()]


def test_the_reader_of_imports_finds_what_it_must() -> None:
    """A checker that finds nothing would pass everything."""
    assert "mpl_fast.kernels.reference" in set(imports(PACKAGE / "losses.py"))
    assert "mpl_fast.kernels.fused" in set(imports(PACKAGE / "losses.py"))
    assert "mpl_fast.kernels.fused" not in set(imports(PACKAGE / "losses.py", late=False))
    assert units_imported(PACKAGE / "losses.py") == {"errors", "kernels"}
    assert PACKAGE / "errors.py" in files_of("mpl_fast.errors")


@pytest.mark.parametrize("path", PARSERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_parser_takes_a_part_of_an_option_for_it(path: Path) -> None:
    """`--seed` of a command with `--seeds`; and a new option would change what a part means."""
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and re.search(r"Parser$|add_parser$", ast.unparse(call.func)):
            assert "allow_abbrev=False" in [ast.unparse(k).replace(" ", "") for k in call.keywords]
