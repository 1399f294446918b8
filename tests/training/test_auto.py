"""What `auto` becomes, by recipe, device, processor and number of machines."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpl_fast.config import RECIPES, RunConfig, problems
from mpl_fast.config.command_line import as_yaml, parse
from mpl_fast.errors import ConfigError
from mpl_fast.inference.trained import load
from mpl_fast.training import auto
from mpl_fast.training.auto import PLAIN, plain, resolve, uses_bf16
from mpl_fast.training.run import Run
from tests.tiny_run import arguments, final_state, replace_state, run_in_turn, train_here

HERE = ["--run-dir=r", "--data.root=d"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

# Options; machines; grad_sync, compile and cuda_graphs on CUDA; words of the line that is printed.
TABLE = """\
 | 1 | allreduce default step | grad_sync allreduce, compile default, cuda_graphs step
recipe=supervised .mixup=1 | 1 | allreduce default step |
recipe=uda | 1 | allreduce default step |
recipe=fixmatch | 1 | allreduce default step |
recipe=mpl_roleplay | 1 | allreduce default step |
recipe=smpl | 1 | allreduce default step |
recipe=metasemi | 1 | allreduce default off | off (recipe metasemi draws the same dropout twice)
recipe=smpl .feedback=exact | 1 | allreduce default off | off (feedback exact draws the same
.feedback=exact | 1 | allreduce default off | off (feedback exact draws the same dropout twice)
.teacher-graph=recompute | 1 | allreduce default off | off (teacher_graph recompute draws
.student.optimizer-backend=apex | 1 | allreduce default off | .student.optimizer_backend apex reads
microbatches=2 | 1 | allreduce default step |
deterministic=true | 1 | allreduce default step |
model.norm=sync | 1 | allreduce default step | grad_sync allreduce, compile default
model.norm=sync | 2 | allreduce default step | (DDP's pieces of a network cannot contain
model.norm=sync grad-sync=ddp | 2 | ddp off off | off (model.norm sync cannot be compiled with
 | 2 | ddp default off | off (the buckets of grad_sync ddp cannot be captured)
.feedback=exact | 2 | ddp default off | grad_sync ddp
microbatches=2 | 2 | allreduce default step | allreduce (DDP would exchange after each
cuda-graphs=step | 2 | allreduce default step | allreduce (DDP's buckets cannot be captured
cuda-graphs=off | 1 | allreduce default off | grad_sync allreduce, compile default
cuda-graphs=model | 1 | allreduce default model |
compile=off | 1 | allreduce off step | grad_sync allreduce, cuda_graphs step
compile=max-autotune | 2 | ddp max-autotune off |
grad-sync=allreduce | 2 | allreduce default step |
grad-sync=ddp | 1 | ddp default off |
grad-sync=ddp compile=off cuda-graphs=off | 1 | ddp off off |
"""


def whole(text: str) -> str:
    """The text with the section's name before a dot at its beginning."""
    return f"algorithm{text}" if text.startswith(".") else text


def config(options: str) -> RunConfig:
    given = [f"--{whole(option)}" for option in options.split()]
    return parse([*HERE, *given])


def choices(chosen: RunConfig) -> str:
    return " ".join((chosen.grad_sync, chosen.compile, chosen.cuda_graphs))


@pytest.mark.parametrize("row", TABLE.splitlines())
def test_on_cuda(row: str) -> None:
    options, machines, expected, words = (part.strip() for part in row.split("|"))
    given = config(options)
    chosen, line = resolve(given, CUDA, int(machines))
    assert choices(chosen) == expected
    assert whole(words) in line
    typed = [name for name in PLAIN if getattr(given, name) != "auto"]
    assert not any(f"{name} " in line.split("(")[0] for name in typed)
    assert not problems(chosen)  # as a user could have written it
    assert resolve(chosen, CUDA, int(machines)) == (chosen, "")


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("machines", [1, 2])
def test_on_a_cpu_all_is_off(recipe: str, machines: int) -> None:
    given = RunConfig(algorithm=RECIPES[recipe]())
    chosen, line = resolve(given, CPU, machines)
    assert (choices(chosen), line) == ("allreduce off off", "")


def test_what_is_typed_stays_on_a_cpu_and_in_evaluation() -> None:
    given = config("compile=max-autotune cuda-graphs=step grad-sync=allreduce")
    assert plain(given) == resolve(given, CPU, 2)[0] == given


def test_without_triton_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "has_triton_package", lambda: False)
    chosen, line = resolve(config(""), CUDA, 1)
    assert choices(chosen) == "allreduce off step"
    assert "compile off (Triton is not installed)" in line


def test_graphs_of_networks_that_cannot_be_compiled_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = config("model.norm=sync grad-sync=ddp cuda-graphs=model")
    with pytest.raises(ConfigError, match=r"but model.norm sync cannot .*: set cuda_graphs auto"):
        resolve(given, CUDA, 1)
    monkeypatch.setattr(auto, "has_triton_package", lambda: False)
    with pytest.raises(ConfigError, match="but Triton is not installed: set cuda_graphs auto"):
        resolve(config("cuda-graphs=model"), CUDA, 1)


def test_the_config_of_a_run_keeps_what_was_given(tiny_rec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = train_here(*arguments(folder, tiny_rec, recipe="supervised"), "--stop-at=1")
    assert done.returncode == 0, done.stderr
    written = parse(["--config", str(folder / "config.yaml")])
    assert choices(written) == "auto auto auto"
    assert written.precision == "auto"


def test_a_run_with_graphs_of_a_gpu_is_evaluated_on_a_cpu(tiny_rec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = train_here(*arguments(folder, tiny_rec, recipe="supervised"))
    assert first.returncode == 0, first.stderr
    written = parse(["--config", str(folder / "config.yaml"), "--cuda-graphs=step"])
    (folder / "config.yaml").write_text(as_yaml(written))
    done = run_in_turn(["evaluate", str(folder)])
    assert done.returncode == 0 and "of 50 images" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "options", "bf16"),
    [
        ("avx512_bf16 amx_bf16 amx_tile", "model.name=wrn_10_1", True),
        ("avx512_bf16 amx_bf16 amx_tile", "model.name=mobilenetv3_small_050", False),
        ("avx512_bf16 amx_bf16 amx_tile", "model.name=wrn_10_1 precision=fp32", False),
        ("avx512_bf16", "model.name=wrn_10_1", False),
        ("avx512_bf16", "model.name=wrn_10_1 precision=bf16", True),
        (None, "model.name=wrn_10_1", False),
    ],
)
def test_a_cpu_takes_bf16_where_it_is_faster(
    flags: str | None, options: str, bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} serialize\n")
    monkeypatch.setattr(auto, "CPUINFO", file)
    auto._has_amx.cache_clear()
    try:
        assert uses_bf16(config(options), CPU) is bf16
        assert uses_bf16(config("precision=auto"), CUDA)
    finally:
        auto._has_amx.cache_clear()


@pytest.mark.parametrize("first", [True, False])
def test_a_run_keeps_its_precision_on_another_processor(
    first: bool, tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (arguments(tmp_path / name, tiny_rec) for name in ("whole", "parts"))
    monkeypatch.setattr(auto, "_has_amx", lambda: first)
    name = "bf16" if first else "fp32"
    begun = train_here(*parts, "--stop-at=4")
    assert train_here(*whole).returncode == 0
    monkeypatch.setattr(auto, "_has_amx", lambda: not first)
    resumed = train_here(*parts)
    for done in (begun, resumed):
        assert f"mpl on 1 x cpu in {name}: " in done.stdout, done.stderr
    a, b = (final_state(tmp_path / folder) for folder in ("whole", "parts"))
    assert a["precision"] == b["precision"] == name
    for key, value in a["learners"]["student"]["network"].items():
        assert torch.equal(value, b["learners"]["student"]["network"][key]), key


def test_a_checkpoint_of_an_older_version_goes_on_in_fp32(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = arguments(tmp_path / "run", tiny_rec, recipe="supervised")
    monkeypatch.setattr(auto, "_has_amx", lambda: True)
    assert "in bf16: " in train_here(*run, "--stop-at=2").stdout
    state = final_state(tmp_path / "run", 2)
    del state["precision"]
    replace_state(tmp_path / "run/checkpoints/step_00000002/state.pt", state)
    assert "in fp32: " in train_here(*run).stdout


def test_a_checkpoint_is_evaluated_in_its_own_precision_or_a_higher_one(
    tiny_rec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for amx, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        folder = tmp_path / str(amx)
        monkeypatch.setattr(auto, "_has_amx", lambda amx=amx: amx)
        done = train_here(*arguments(folder, tiny_rec, recipe="supervised"), "--steps=1")
        assert done.returncode == 0, done.stderr
        monkeypatch.setattr(auto, "_has_amx", lambda: True)
        assert load(folder, device="cpu").dtype == dtype
        monkeypatch.setattr(auto, "_has_amx", lambda: False)
        assert load(folder, device="cpu").dtype == torch.float32


def test_ranks_on_different_processors_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rank: Any = SimpleNamespace(
        config=config("model.name=wrn_10_1"), dist_env=SimpleNamespace(device=CPU), checkpoint=None
    )
    monkeypatch.setattr(auto, "_has_amx", lambda: True)
    assert Run._precision(rank) == "bf16"
    monkeypatch.setattr("mpl_fast.distributed.all_gather_object", lambda value: [value, False])
    assert Run._precision(rank) == "fp32"
