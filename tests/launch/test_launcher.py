"""Real launches of a small script: each way to start it finds its YAML. No model, no process group.

The script prints what launcher.py found and what config.py made of it, one line of JSON for each process.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent  # where accelerate and accelerate-launch are installed
PROBE = """
import json, warnings
from accel_moe.config import resolve
from accel_moe.launcher import find_launcher_yaml

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found, resolved = find_launcher_yaml(), resolve()
report = {"status": found.status, "path": found.path, "degree": resolved.config.moe_ep_degree}
report["warning"] = "".join(str(w.message) for w in caught if "accelerate launch" in str(w.message))
print("\\nPROBE " + json.dumps(report), flush=True)
"""


@pytest.fixture
def place(tmp_path):
    """A folder with the script, a YAML of degree 2 for one process, and an empty folder below."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "below").mkdir()
    write_yaml(tmp_path / "ep2.yaml", degree=2)
    return tmp_path


def write_yaml(path, degree, **other):
    settings = {"distributed_type": "NO", "num_processes": 1, "use_cpu": True, "num_machines": 1}
    settings |= {"parallelism_config": {"moe_ep_degree": degree}, **other}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))  # JSON is YAML


def start(place, command, cwd=None):
    """Run `command` in `cwd`, by default `place`, and give the reports of its processes."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST" and not k.startswith("ACCEL")}
    inherited |= {"PYTHONPATH": str(REPOSITORY), "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd or place,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("PROBE ")]


def found(place, degree=2, name="ep2.yaml"):
    return [{"status": "found", "path": str(place / name), "degree": degree, "warning": ""}]


def test_accelerate_launch_with_an_absolute_path_and_a_script_with_a_config_file_option_of_its_own(place):
    write_yaml(place / "own.yaml", degree=7)
    launcher = [SCRIPTS / "accelerate", "launch", "--config_file", place / "ep2.yaml"]
    command = [*launcher, place / "probe.py", "--config_file", place / "own.yaml"]
    assert start(place, command, cwd=place / "below") == found(place)


@pytest.mark.slow
def test_accelerate_dash_launch_with_an_equals_sign(place):
    command = [SCRIPTS / "accelerate-launch", f"--config_file={place / 'ep2.yaml'}", "probe.py"]
    assert start(place, command) == found(place)


@pytest.mark.slow  # test_examples.py starts all its launches so
def test_the_launcher_as_a_module_with_a_relative_path(place):
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    command = [*launcher, "--config_file", "../ep2.yaml", "../probe.py"]
    assert start(place, command, cwd=place / "below") == found(place)


@pytest.mark.slow
def test_bash_wrappers_that_change_directory_before_and_after_the_launcher(place):
    launcher = shlex.quote(str(SCRIPTS / "accelerate"))
    (place / "inner.sh").write_text(f"cd below\n{shlex.quote(sys.executable)} ../probe.py\n")
    (place / "outer.sh").write_text(f"cd ..\n{launcher} launch --config_file ep2.yaml --no_python bash inner.sh\n")
    assert start(place, ["bash", "../outer.sh"], cwd=place / "below") == found(place)


def test_no_config_file_takes_accelerates_default_file(place):
    write_yaml(place / "hf" / "accelerate" / "default_config.yaml", degree=4)
    reports = start(place, [SCRIPTS / "accelerate", "launch", "probe.py"])
    assert reports == found(place, degree=4, name="hf/accelerate/default_config.yaml")


def test_no_config_file_and_no_default_file_is_a_launcher_without_a_file(place):
    [report] = start(place, [SCRIPTS / "accelerate", "launch", "--num_processes", "1", "--cpu", "probe.py"])
    assert (report["status"], report["degree"], report["warning"]) == ("no_file", 1, "")


def test_every_process_of_an_fsdp_launch_finds_the_file_and_accelerate_accepts_our_key(place):
    fsdp = {"distributed_type": "FSDP", "num_processes": 2, "use_cpu": False, "main_process_port": 0}
    sizes = {"parallelism_config_dp_shard_size": 2, "moe_ep_degree": 2}
    write_yaml(place / "ep2.yaml", 2, **fsdp, fsdp_config={"fsdp_version": 2}, parallelism_config=sizes)
    command = [SCRIPTS / "accelerate", "launch", "--config_file", "ep2.yaml", "probe.py"]
    assert start(place, command) == found(place) * 2


def test_no_launcher_and_one_process_is_silent(place):
    [report] = start(place, [sys.executable, "probe.py"])
    assert report == {"status": "no_launcher", "path": None, "degree": 1, "warning": ""}


def test_no_launcher_and_two_ranks_is_one_warning_that_names_the_variable(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    reports = start(place, [*torchrun, "probe.py"])
    assert [report["status"] for report in reports] == ["no_launcher"] * 2
    [warning] = [report["warning"] for report in reports if report["warning"]]
    assert "2 ranks" in warning and "ACCEL_MOE_EP_DEGREE" in warning
