"""`--dry-run` prints its estimate and writes nothing; the numbers follow by hand."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from mpl_fast import train
from mpl_fast.config import ModelConfig, MPLConfig, RunConfig, UDAConfig
from mpl_fast.config.command_line import as_yaml, dry_run_of, parse
from mpl_fast.config.dry_run import DryRunConfig
from mpl_fast.dry_run.estimate import Memory
from mpl_fast.dry_run.network import NetworkCost
from mpl_fast.dry_run.remedies import remedies
from mpl_fast.dry_run.table import Plan, table
from mpl_fast.errors import ConfigError
from mpl_fast.training.rows import StepRows
from tests.tiny_run import arguments, command, environment

HERE = ["--run-dir", "r", "--data.root", "d"]
NAMES = [
    "recipe", "network", "ranks", "a step", "its passes", "length", "operations", "memory",
    "checkpoint", "time", "decoding",
]  # fmt: skip
OF_A_CARD = [*NAMES, "a step takes", "cost"]


def paragraphs(text: str) -> dict[str, str]:
    """The text after each name, as one line."""
    joined = re.sub(r"\n {2,}", " ", text)
    lines = [line for line in joined.splitlines() if line[:14].strip() in OF_A_CARD]
    return {line[:14].strip(): line[14:] for line in lines}


def dry_run(given: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Runs the command in this process: exit code, stdout, stderr."""
    argv = mock.patch("sys.argv", ["train.py", *given, "--dry-run"])
    with argv, pytest.raises(SystemExit) as ended:
        train.main()
    return int(ended.value.code or 0), *capfd.readouterr()


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_prints_once_and_leaves_nothing(
    ranks: int,
    tiny_rec: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "deep" / "run"
    given, printed = [*arguments(folder, tiny_rec), "--precision=fp32"], []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in range(ranks):  # ranks do not communicate
        monkeypatch.setenv("RANK", str(rank))
        code, out, err = dry_run(given, capfd)
        assert code == 0, err
        printed.append(out)
    out, *others = printed
    assert not any(others)
    found = paragraphs(out)
    assert list(found) == NAMES
    assert out.count("nothing is trained or written") == 1
    assert not folder.exists() and len(list(folder.parent.iterdir())) == 1  # the config
    share = {1: "4 + 8", 2: "2 + 4"}[ranks]
    assert found["a step"] == f"4 labeled + 8 unlabeled images, {share} on a rank"
    assert found["its passes"].startswith(f"on a rank {36 // ranks} images forward")
    assert found["length"] == "6 steps, 0.8 passes over 60 unlabeled images"
    assert found["ranks"] == f"{ranks} x cpu, float32, compile off"


def test_it_refuses_what_training_would(
    tiny_rec: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path / "run", tiny_rec)
    code, _, err = dry_run([*given, "--labeled-batch=4000"], capfd)
    assert code == 2
    assert "labeled_batch 4000 is larger than the 20 labeled images" in err
    assert "Traceback" not in err
    code, _, err = dry_run([*given, "--model.name=convlarge", "--data.image_size=8"], capfd)
    assert code == 2 and "set data.image_size 32" in err and err.count("\n") == 1


@pytest.mark.slow
def test_no_library_warns_of_a_gpu_that_nobody_asked_for(tiny_rec: Path, tmp_path: Path) -> None:
    """As torch's compilation of extensions does, where CUDA is installed and no GPU."""
    line = command([*arguments(tmp_path / "run", tiny_rec), "--dry-run"])
    without_gpu = environment() | {"CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, capture_output=True, text=True, env=without_gpu, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here(
    tiny_rec: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = arguments(tmp_path / "run", tiny_rec)
    code, out, err = dry_run([*given, "--device=cuda"], capfd)
    assert code == 0, err
    found = paragraphs(out)
    assert found["ranks"].startswith("1 x a GPU that this machine does not have, bfloat16")
    assert found["time"].startswith("unknown")


def test_the_option_is_the_parsers_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run_of([*HERE, "--dry-run"]) == dry_run_of(["--dry_run"]) == DryRunConfig()
    assert dry_run_of(HERE) is None
    assert parse([*HERE, "--dry-run"]) == parse(HERE)
    assert "dry_run" not in as_yaml(parse([*HERE, "--dry-run"]))
    with pytest.raises(SystemExit):
        parse([*HERE, "--dry-run", "--print_config"])
    assert "dry_run" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="dry_run"):
        parse([*HERE, "--dry-run=maybe"])
    (tmp_path / "c.yaml").write_text("dry_run: true\n")
    with pytest.raises(ConfigError, match=r"c.yaml:1: unknown key dry_run"):
        parse(["--config", str(tmp_path / "c.yaml"), *HERE])


CARD = ["--device=h100", "--ranks=8"]
RECORDS = "labeled=128116,unlabeled=1153051,val=50000,classes=10"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--device=h100"], "--device h100 is for a dry run: give --dry-run as well"),
        (["--price-per-gpu-hour=2"], "--price-per-gpu-hour is for a dry run"),
        (["--dry-run", "--device=h1000"], "device must be auto, cuda, cpu, a100-40, .* not h1000"),
        (["--dry-run", *CARD, "--nodes=3"], "nodes 3 cannot share 8 ranks .* a multiple of 3"),
        (
            ["--dry-run", "--device=h100", "--nodes=2"],
            "nodes 2 needs ranks: set ranks to a multiple of 2",
        ),
        (["--dry-run", "--nodes=0"], "nodes must be at least 1, not 0"),
        (["--dry-run", "--network-gbps=0"], "network_gbps must be above 0"),
        (["--dry-run", "--price-per-gpu-hour=much"], "price_per_gpu_hour must be a number"),
        (["--dry-run", "--price-per-gpu-hour=2"], "--price-per-gpu-hour needs .* --device as a100"),
        (["--dry-run", "--device=cpu", "--network-gbps=9"], "--network-gbps needs a GPU: give"),
        (["--dry-run", f"--records={RECORDS}", "--data.root=rec"], "--records is in place of --d"),
        (["--dry-run", "--records=labeled=5"], "records must be labeled=N,unlabeled=N,val=N,class"),
        (["--dry-run", f"--records={RECORDS},val=5"], "records must be"),
        (["--dry-run", f"--records={RECORDS.replace('128116', '0')}"], "records must be"),
    ],
)
def test_a_wrong_option_of_a_dry_run_is_one_line(given: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error) as raised:
        parse([*HERE, *given])
    assert str(raised.value).count("\n") == 0


def test_options_of_a_dry_run_change_no_config() -> None:
    typed = ["--dry-run", *CARD, "--nodes=2", "--network-gbps=100", "--price-per-gpu-hour", "2.5"]
    assert parse([*HERE, *typed]) == parse([*HERE, "--device=cuda"])
    found = dry_run_of([*typed, "--records", RECORDS])
    assert found == DryRunConfig(
        card="h100",
        ranks=8,
        nodes=2,
        network_gbps=100.0,
        price_per_gpu_hour=2.5,
        records=RECORDS,
    )
    assert dry_run_of(["--dry-run", "--device=H100"]) == DryRunConfig(card="h100")
    counts = {"labeled": 128_116, "unlabeled": 1_153_051, "val": 50_000, "classes": 10}
    assert found and found.counts == counts
    assert parse(["--dry-run", *CARD, "--records", RECORDS]).data.root == ""
    with pytest.raises(ConfigError, match=r"data\.root is missing: .* also takes --records"):
        parse(["--dry-run", *CARD])
    with pytest.raises(ConfigError, match="run_dir is missing"):
        parse(["--data.root=d"])


def amounts(text: str) -> list[float]:
    """The numbers in a text, without commas."""
    return [float(number) for number in re.findall(r"\d+\.?\d*", text.replace(",", ""))]


SMALL = [
    "--model.name=wrn_10_1", "--data.image-size=32", "--labeled-batch=512",
    "--unlabeled-batch=3584", "--records", RECORDS,
]  # fmt: skip


def test_a_card_that_is_not_here(capfd: pytest.CaptureFixture[str]) -> None:
    given = [*SMALL, *CARD, "--nodes=2", "--steps=700000", "--price-per-gpu-hour=3"]
    code, out, err = dry_run(given, capfd)
    assert code == 0, err
    found = paragraphs(out)
    assert list(found) == OF_A_CARD
    assert found["ranks"].startswith("8 x H100 SXM on 2 nodes, bfloat16")
    assert found["length"] == "700,000 steps, 2,176 passes over 1,153,051 unlabeled images"
    assert "of 75 GB at the peak" in found["memory"] and "TOO MUCH" not in found["memory"]
    assert "for which 5 GB are assumed" in found["memory"]
    assert "computed and not measured" in found["time"]
    hours, days, money = (amounts(part) for part in re.split("GPU-hours|days", found["cost"]))
    assert money[2] == 3
    for low_or_high in range(2):
        assert money[low_or_high] == pytest.approx(3 * hours[low_or_high], rel=0.02)
        assert days[low_or_high] == pytest.approx(hours[low_or_high] / 8 / 24, rel=0.02)
    free = paragraphs(dry_run([*SMALL, *CARD], capfd)[1])
    assert free["cost"].endswith("days")
    short = paragraphs(dry_run([*SMALL, *CARD, "--steps=1"], capfd)[1])
    assert re.fullmatch(r"0\.\d+ (to 0\.\d+ )?GPU-hours in 0\.\d+ (to 0\.\d+ )?days", short["cost"])
    # The options that are auto are those of GPUs: in one node a step is a graph, launched once.
    assert free["ranks"].endswith("compile default")
    assert free["a step takes"].endswith("in parallel 0.005 ms to 0.015 ms")


def test_norms_over_all_ranks_take_time(capfd: pytest.CaptureFixture[str]) -> None:
    """WRN-10-1's 7 norms in 4 passes forward and 2 backward take 6 us each at least."""
    alone, over_ranks = (
        paragraphs(dry_run([*SMALL, *CARD, f"--model.norm={norm}"], capfd)[1])["a step takes"]
        for norm in ("batch", "sync")
    )
    before, after = (
        float(re.findall(r"exchange.*? ([\d.]+) ms", text)[0]) for text in (alone, over_ranks)
    )
    assert after - before == pytest.approx(7 * 6 * 0.006, rel=0.1)


def test_what_would_fit_fits(capfd: pytest.CaptureFixture[str]) -> None:
    """Every remedy that is printed: the dry run with it finds no fault, and the same memory."""
    given = [*SMALL, "--device=a100-40", "--labeled-batch=16384", "--unlabeled-batch=114688"]
    found = paragraphs(dry_run([*given, "--ranks=1"], capfd)[1])["memory"]
    assert "TOO MUCH: --algorithm.teacher_graph recompute" in found
    options, ranks = found.partition("TOO MUCH: ")[2].split("; ")
    changes, _, size = options.partition(" takes ")
    again = paragraphs(dry_run([*given, "--ranks=1", *changes.split()], capfd)[1])["memory"]
    assert "TOO MUCH" not in again and again.startswith(size)
    number, size = re.findall(r"(\d+) ranks take (.*) each", ranks)[0]
    again = paragraphs(dry_run([*given, f"--ranks={number}"], capfd)[1])["memory"]
    assert "TOO MUCH" not in again and again.startswith(size)
    half = paragraphs(dry_run([*given, f"--ranks={int(number) // 2}"], capfd)[1])["memory"]
    assert "TOO MUCH" in half  # it is the smallest number


def test_nothing_is_suggested_that_training_would_refuse() -> None:
    """Parts of a batch are not for `ddp`, and two ranks do not divide seven images."""
    config = RunConfig(
        algorithm=UDAConfig(), run_dir="r", labeled_batch=7, unlabeled_batch=49, grad_sync="ddp"
    )

    def memory(changed: RunConfig, ranks: int) -> float:
        if changed.labeled_batch % ranks:
            raise ConfigError("not divisible")
        return 10e9 / ranks / changed.microbatches

    assert remedies(config, 1, memory, have=int(6e9)) == ()
    config = replace(config, labeled_batch=8, unlabeled_batch=56)
    assert remedies(config, 1, memory, have=int(6e9)) == ("2 ranks take 5 GB each",)
    config = replace(config, grad_sync="allreduce")
    halved = remedies(config, 1, memory, have=int(3e9))
    assert halved == ("--microbatches 4 takes 2.5 GB", "4 ranks take 2.5 GB each")


def plan(rate: float, device_bytes: int = 0, device: str = "cpu") -> Plan:
    """Two ranks, each with 8 GFLOP a step."""
    model, batches = ModelConfig(name="resnet50"), {"labeled_batch": 4, "unlabeled_batch": 28}
    config = RunConfig(algorithm=MPLConfig(), model=model, steps=101, eval_every=50, **batches)  # type: ignore[arg-type]
    return Plan(
        config=config,
        world=2,
        device=device,
        device_bytes=device_bytes,
        bf16=False,
        cost=NetworkCost(25_600_000, 4, 4, 1_000_000_000, 2_000_000_000, 1.0, 1.0, 1.0),
        rows=StepRows(forward=6, backward=1, largest=5),
        memory=Memory(1e9, 2e9, 0, 0, 0, 0, 4e9, 0),
        checkpoint=123_000_000,
        records=280,
        validation=1000,
        rate=rate,
        timed=5,
    )


def test_time_and_rate_follow_from_the_measured_rate() -> None:
    found = paragraphs(table(plan(rate=16e9)))
    # 0.5 s a step and 31.25 s for each of 3 evaluations of 500 images on a rank.
    expected = "roughly 0.5 s a step, 2:24 with evaluations, if all went at the 16 GFLOP/s"
    assert found["time"].startswith(expected)
    assert found["decoding"].startswith("64 images/s (32 on a rank) at that speed;")
    # 8 forward passes on each rank for 2 labeled images there.
    assert found["operations"].startswith("16 GFLOP a step, 4.0 forward passes (1 GFLOP each)")
    assert found["operations"].endswith("1.62 TFLOP in all")
    assert found["network"].startswith("2 x resnet50, 25.6 M trained parameters each")
    assert found["length"] == "101 steps, 10.1 passes over 280 unlabeled images"
    assert found["checkpoint"] == "123 MB each, 2 are kept"
    assert all(len(line) <= 100 for line in table(plan(rate=16e9)).splitlines())


def test_memory_names_its_parts_and_what_does_not_fit() -> None:
    unknown, fits, small = (
        paragraphs(table(plan(1.0, size)))["memory"] for size in (0, 8_000_000_000, 6_000_000_000)
    )
    parts = "weights 1 GB, gradients 2 GB, activations 4 GB"
    assert unknown.startswith(f"7 GB on a rank at the peak ({parts})")
    assert fits.endswith("besides what Python, PyTorch and DALI take")
    for gpu in ("", "H100"):
        found = paragraphs(table(plan(1.0, device=gpu)))["memory"]
        assert found.endswith("besides what CUDA, NCCL and DALI take")
    assert small.startswith("7 GB on a rank of 6 GB") and "TOO MUCH: lower the batches" in small


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5e-6, "0.005 ms"), (0.0994, "99 ms"), (0.0996, "0.1 s"), (9.96, "10 s"), (1234, "1,234 s")],
)
def test_seconds_of_a_step(seconds: float, text: str) -> None:
    found = paragraphs(table(plan(rate=8e9 / seconds)))["time"]
    assert found.startswith(f"roughly {text} a step")


def test_without_a_device_no_time_is_invented() -> None:
    found = paragraphs(table(plan(rate=0.0)))
    assert found["time"].startswith("unknown")
    assert found["decoding"].startswith("32 images a step")
