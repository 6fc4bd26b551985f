"""examples/slurm.sh with stand-ins for Slurm's commands: two nodes on this machine, of one rank each."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_examples import REPOSITORY, SMALL, environment
from tests.launch.test_examples import base as base  # a fixture

pytestmark = pytest.mark.launch

STEPS = 20
SRUN = """
import os, subprocess, sys
nodes = int(os.environ["SLURM_NNODES"])
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | {"SLURM_NODEID": str(node)}) for node in range(nodes)]
with open(os.environ["STAND_INS"] + "/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
sys.exit(max([task.wait() for task in tasks], key=abs))
"""
SCANCEL = """
import os, psutil, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
for task in open(os.environ["STAND_INS"] + "/tasks").read().split():
    for process in [psutil.Process(int(task)), *psutil.Process(int(task)).children(recursive=True)]:
        process.terminate()  # Slurm signals all processes of a step
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1", "other", sep="\\n")
else:
    open(os.environ["STAND_INS"] + "/requeued", "w").write(" ".join(sys.argv[1:]))
"""


@pytest.fixture
def cluster(tmp_path):
    """The environment of a job's batch script."""
    folder = tmp_path / "stand_ins"
    folder.mkdir()
    for name, code in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (folder / name).write_text(f"#!{sys.executable}\n{code}")
        (folder / name).chmod(0o755)
    path = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    return environment() | job | {"PATH": os.pathsep.join(path), "STAND_INS": str(folder)}


def script(cluster, *words):
    words = ["examples/slurm.sh", *map(str, words)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, cwd=REPOSITORY, env=cluster, **pipes)


def yaml_of_two_nodes(folder):
    text = (REPOSITORY / "accelerate_configs" / "ep2_cpu.yaml").read_text()
    (folder / "nodes.yaml").write_text(text.replace("num_machines: 1", "num_machines: 2"))
    return folder / "nodes.yaml"


@pytest.mark.slow
def test_a_job_saves_before_its_time_is_over_is_requeued_and_goes_on_to_the_end(cluster, base, tmp_path):
    every = ["--log-every", 1, "--eval-every", 1000, "--save-every", 1000, "--steps", STEPS]
    words = [yaml_of_two_nodes(tmp_path), tmp_path / "out", "examples/train.py", "--model", base, *SMALL, *every]
    job, output = script(cluster, *words), ""
    while not re.search(rf"\b[3-9]/{STEPS}\b", output):
        line = job.stdout.readline()
        assert line, output
        output += line
    job.send_signal(signal.SIGUSR1)
    output += job.communicate(timeout=120)[0]
    assert job.returncode == 0 and "is saved. To go on:" in output, output
    requeued = Path(cluster["STAND_INS"], "requeued")
    assert requeued.read_text() == f"requeue {cluster['SLURM_JOB_ID']}"
    (stopped,) = (tmp_path / "out").glob("checkpoint-*")
    assert 3 <= int(stopped.name.removeprefix("checkpoint-")) < STEPS
    requeued.unlink()
    job = script(cluster, *words)
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0 and f"resumed from {stopped}" in output, output
    assert (tmp_path / "out" / f"checkpoint-{STEPS}").is_dir() and not requeued.exists()


@pytest.mark.parametrize(
    "words, told",
    [
        (["accelerate_configs/ep2_cpu.yaml", "out", "train.py"], "has num_machines: 1, and the job has 2 nodes"),
        (["none.yaml", "out", "train.py"], "expected a YAML that exists"),
        (["accelerate_configs/hsdp_ep.yaml", "out"], "expected a YAML that exists, a folder and a script"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(cluster, words, told):
    job = script(cluster, *words)
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 2 and told in output and output.count("\n") == 1


def test_a_failure_is_not_requeued(cluster, tmp_path):
    job = script(cluster, yaml_of_two_nodes(tmp_path), tmp_path, tmp_path / "no_such_script.py")
    job.communicate(timeout=120)
    assert job.returncode != 0 and not Path(cluster["STAND_INS"], "requeued").exists()
