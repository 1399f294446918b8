"""Runs by the files in tools/cluster and by the commands in docs/cluster.md, on two "machines" that
are this one: stopped, killed and started again, they end bit for bit like a run that was not."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.algorithms.problems import assert_same
from tests.tiny_run import (
    ROOT,
    arguments,
    environment,
    final_state,
    free_port,
    rows,
    train_here,
)

SLURM = ROOT / "tools" / "cluster" / "slurm.sh"
PYTORCHJOB = ROOT / "tools" / "cluster" / "pytorchjob.yaml"
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
ENDLESS = ["--steps", "1000000"]  # on no machine such a run ends before it is stopped
STAND_INS = {
    # A task on each of two nodes; like SLURM's, it kills them when it is itself asked to end.
    "srun": """while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
  SLURM_NODEID=$node "$@" & tasks+=($!)
done
echo "${tasks[@]}" > "$CLUSTER/tasks"
trap 'kill -KILL "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "${code:-0}"
""",
    "scancel": """[[ $* == "--signal=TERM 7" ]] && kill -TERM $(cat "$CLUSTER/tasks")
""",
    "scontrol": """[[ $1 == requeue ]] && echo "$*" >> "$CLUSTER/requeued"
[[ "$*" == "show hostnames nodes" ]] && printf 'localhost\\nother\\n'
""",
    "squeue": """echo "${STATE:-RUNNING}"
""",
}


WAITS = """trap 'kill $!; exit 1' TERM
sleep 99 & touch $CLUSTER/ready.$SLURM_NODEID
wait"""


class Ended(NamedTuple):
    """A run that was interrupted after a checkpoint, resumed, and paused three steps later."""

    folder: Path
    step: int
    out: str


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    """After a failed test, processes may still wait for each other."""
    yield
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def start(command: list[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        env={**environment(), **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


def interrupt(
    processes: list[subprocess.Popen[str]], number: signal.Signals, folder: Path
) -> tuple[int, str]:
    """Sends a signal to the last process after a checkpoint; all end with 1, but for a killed one.

    Returns the step of the newest checkpoint, and what they printed.
    """
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/step_*")):
        assert all(one.poll() is None for one in processes) and time.monotonic() < deadline
        time.sleep(0.002)
    processes[-1].send_signal(number)
    out = "".join(one.communicate(timeout=600)[0] for one in processes)
    killed = number == signal.SIGKILL
    codes = [1] * (len(processes) - killed) + [-number] * killed
    assert [one.returncode for one in processes] == codes, out
    return max(int(path.name[5:]) for path in folder.glob("checkpoints/step_*")), out


def complete(processes: list[subprocess.Popen[str]]) -> str:
    """What processes printed that all end with 0."""
    out = "".join(one.communicate(timeout=600)[0] for one in processes)
    assert [one.returncode for one in processes] == [0] * len(processes), out
    return out


def slurm_environment(cluster: Path) -> dict[str, str]:
    """Of a batch script with two nodes, and stand-ins for the commands of SLURM on its PATH."""
    (cluster / "bin").mkdir(parents=True)
    for name, text in STAND_INS.items():
        (cluster / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (cluster / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}",
        "CLUSTER": str(cluster),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "name",
        "SLURM_JOB_NODELIST": "nodes",
        "SLURM_NNODES": "2",
        "RUN": str(cluster / "run"),
    }


def by_slurm(config: Path, rec: Path, cluster: Path) -> Ended:
    """SIGTERM to the batch script, as before the end of its time."""
    env = slurm_environment(cluster) | {"RANKS": "1", "TORCHRUN": TORCHRUN, "REC": str(rec)}
    env |= {"CONFIG": str(config), "MASTER_PORT": free_port()}
    job = ["bash", str(SLURM), *ENDLESS]
    step, out = interrupt([start(job, env)], signal.SIGTERM, cluster / "run")
    assert f"stopped by a signal after step {step}, saved: the same command resumes" in out
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    out += complete([start([*job, "--stop-at", str(step + 3)], env)])
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    return Ended(cluster / "run", step, out)


def by_kubernetes(config: Path, rec: Path, folder: Path) -> None:
    """Two pods, never interrupted, train to the end."""
    spec = yaml.safe_load(PYTORCHJOB.read_text())["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert 30 < int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"] == 2
    env |= {"CONFIG": str(config), "REC": str(rec), "RUN": str(folder)}
    command = [re.sub(r"\$\((\w+)\)", lambda name: env[name[1]], x) for x in container["command"]]
    # As the operator sets them (v1.9, pkg/controller.v1/pytorch/envvar.go and elastic.go).
    env |= {
        "PYTHONUNBUFFERED": "1",
        "PET_NPROC_PER_NODE": str(int(spec["nprocPerNode"]) // 8),
        "PET_RDZV_ENDPOINT": f"localhost:{free_port()}",
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PATH": f"{Path(TORCHRUN).parent}:{os.environ['PATH']}",
    }
    complete([start(command, env) for _ in range(2)])


def by_torchrun(config: Path, rec: Path, cluster: Path) -> Ended:
    """SIGKILL to torchrun on one machine: its ranks end with it, the others by themselves."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(r"^    (torchrun --nnodes=2(?:.*\\\n)*.*)$", page, re.MULTILINE)
    env = {
        "CONFIG": str(config),
        "REC": str(rec),
        "RUN": str(cluster / "run"),
        "FIRST": "localhost",
    }
    for here, there in (
        ("torchrun", TORCHRUN),
        ("--nproc-per-node=8", "--nproc-per-node=1"),
        ("--master-port=29500", f"--master-port={free_port()}"),
    ):
        assert command.count(here) == 1
        command = command.replace(here, there)

    def pair(options: list[str]) -> list[subprocess.Popen[str]]:
        typed = ["bash", "-c", f'exec {command} "$@"', "torchrun", *options]
        return [start(typed, env | {"NODE": str(node)}) for node in range(2)]

    step, out = interrupt(pair(ENDLESS), signal.SIGKILL, cluster / "run")
    return Ended(
        cluster / "run", step, out + complete(pair([*ENDLESS, "--stop-at", str(step + 3)]))
    )


WAYS = {"slurm": by_slurm, "torchrun": by_torchrun}


class Runs(NamedTuple):
    """By their names in WAYS, and one of two pods that was never interrupted."""

    interrupted: dict[str, Ended]
    straight: Path


@pytest.fixture(scope="module")
def runs(tiny_rec: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("cluster")
    straight = folder / "straight"
    arguments(straight, tiny_rec)
    config = folder / "mpl.yaml"
    interrupted = {name: way(config, tiny_rec, folder / name) for name, way in WAYS.items()}
    last = max(one.step for one in interrupted.values()) + 3
    text = re.sub(
        r"steps: .*", f"steps: {ENDLESS[1]}\nstop_at: {last}", config.read_text(), count=1
    )
    text = re.sub(r"checkpoint_every: .*", f"checkpoint_every: 1\ncheckpoint_keep: {last}", text)
    config.write_text(text)
    by_kubernetes(config, tiny_rec, straight)
    return Runs(interrupted, straight)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_interrupted_on_two_machines_it_ends_as_uninterrupted(way: str, runs: Runs) -> None:
    run = runs.interrupted[way]
    assert f"resuming after step {run.step} from {run.folder}" in run.out
    end = run.step + 3
    state, expected = final_state(run.folder, end), final_state(runs.straight, end)
    assert_same(state, expected, way, ignore=("seconds",))


def ranks_of(agent: subprocess.Popen[str]) -> dict[int, int]:
    """Process numbers of a torchrun's ranks, by rank."""
    found = dict[int, int]()
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    for child in map(int, children):
        environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(e[5:]): child for e in environ if e.startswith(b"RANK=")}
    return found


@pytest.mark.nightly
@pytest.mark.slow
def test_a_frozen_machine_is_noticed_and_the_others_go_on(tiny_rec: Path, tmp_path: Path) -> None:
    """By the watchdog of a rank that waits for it; with fewer ranks, from the newest checkpoint."""
    run = tmp_path / "run"
    options = [*ENDLESS, "--hang-timeout", "5", "--checkpoint-every", "0", "--eval-every", "0"]
    begun = train_here(*arguments(run, tiny_rec), *options, "--stop-at", "4")
    assert begun.returncode == 0, begun.stderr
    page = (ROOT / "docs" / "cluster.md").read_text()
    (command,) = re.findall(
        r"^    (export TORCH_DIS.*\n    torchrun (?:.*\\\n)*.*)$", page, re.MULTILINE
    )
    port = free_port()
    for here, there in (
        ("torchrun", f"exec {TORCHRUN}"),
        ("--nproc-per-node=8", "--nproc-per-node=1 --rdzv-conf=last_call_timeout=1"),
        (":29500", f":{port}"),
    ):
        assert command.count(here) == 1
        command = command.replace(here, there)
    env = {"CONFIG": str(tmp_path / "mpl.yaml"), "REC": str(tiny_rec), "RUN": str(run)}
    env |= {"FIRST": "localhost"}
    typed = ["bash", "-c", f'{command} "$@"', "torchrun", *options]
    deadline = time.monotonic() + 600
    first = start(typed, env)
    with socket.socket() as one:  # the first has torchrun's store, and, by its number, rank 0
        while one.connect_ex(("localhost", int(port))):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    second = start(typed, env)

    def trained(step: int) -> int:
        """Waits for a row of metrics after a step; returns the number of the file's inode."""
        while rows(run)[-1]["step"] <= step:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        return (run / "metrics.jsonl").stat().st_ino

    before = trained(8)
    if 0 not in ranks_of(first):
        pytest.skip("process numbers began anew between the two")
    frozen = [*ranks_of(second).values(), second.pid]
    for process in frozen:
        os.kill(process, signal.SIGSTOP)
    while trained(4) == before:  # resumed, it is a new file
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=600)
    for process in frozen:
        os.kill(process, signal.SIGKILL)
    assert re.search(r"exitcode\s*: 7", out), out
    report = (run / "hang/rank_0.txt").read_text()
    assert "rank 0 of 2 on " in report and "distributed.py" in report
    assert {path.name for path in run.glob("hang/*")} == {"rank_0.txt", "gloo_trace_rank_0"}
    exchanges = pickle.loads((run / "hang/gloo_trace_rank_0").read_bytes())["entries"]
    assert "gloo:all_reduce" in {exchange["profiling_name"] for exchange in exchanges}
    assert out.count("resuming after step 4") == 2
    assert out.count("ranks: 1 when it was written, now 2: all networks") == 1
    assert "stopped by a signal after step" in out


@pytest.mark.parametrize(
    ("ranks", "state", "queued"),
    [
        ("exit 0", "RUNNING", False),
        ("exit 1", "RUNNING", False),  # a wrong option
        ("mkdir -p $RUN/checkpoints/step_00000002; exit 1", "RUNNING", True),
        ("mkdir -p $RUN/checkpoints/step_00000002; exit 1", "COMPLETING", False),  # canceled
        (WAITS, "RUNNING", True),
    ],
)
def test_a_job_is_queued_again_if_stopped_or_further(
    ranks: str, state: str, queued: bool, tmp_path: Path
) -> None:
    env = slurm_environment(tmp_path) | {"STATE": state, "TORCHRUN": str(tmp_path / "torchrun")}
    (tmp_path / "torchrun").write_text(f"#!/usr/bin/env bash\n{ranks}\n")
    (tmp_path / "torchrun").chmod(0o755)
    job = start(["bash", str(SLURM)], env)
    if ranks == WAITS:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("ready.*"))) < 2:
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == (0 if ranks == "exit 0" else 1), out
    assert (tmp_path / "requeued").exists() == queued
