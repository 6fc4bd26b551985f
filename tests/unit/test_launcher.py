"""Which process is the launcher, and which file it read: over invented processes."""

import importlib.util
import json
import os
import sys

import psutil
import pytest

from accel_moe import launcher
from accel_moe.launcher import accelerate_parallelism_keys, command_in, default_config_file, find_in, launch_arguments


class Process:
    """As much of psutil.Process as launcher.py asks; an exception given as an answer is raised."""

    pid = 1234

    def __init__(self, argv=("bash",), cwd="/", environ=None):
        self._answers = {"cmdline": argv, "cwd": cwd, "environ": {} if environ is None else environ}

    def _answer(self, question):
        answer = self._answers[question]
        if isinstance(answer, Exception):
            raise answer
        return list(answer) if question == "cmdline" else answer

    def cmdline(self):
        return self._answer("cmdline")

    def cwd(self):
        return str(self._answer("cwd"))

    def environ(self):
        return self._answer("environ")


def launch(*arguments, **process):
    return Process(["python", "/bin/accelerate", "launch", *map(str, arguments)], **process)


@pytest.fixture
def ep2(tmp_path):
    path = tmp_path / "ep2.yaml"
    path.write_text("distributed_type: FSDP\nparallelism_config: {moe_ep_degree: 2}\n")
    return path


# ---- Which process


@pytest.mark.parametrize(
    "before",
    [
        ["accelerate", "launch"],
        ["/usr/bin/python3.11", "/venv/bin/accelerate", "launch"],
        ["/usr/bin/python3", "-u", "-X", "dev", "/venv/bin/accelerate", "launch"],
        ["accelerate-launch"],
        ["python", "/venv/bin/accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-W", "ignore", "-m", "accelerate.commands.launch"],
        ["python", "/lib/site-packages/accelerate/commands/launch.py"],
        ["python", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["python", "/lib/site-packages/accelerate/commands/accelerate_cli.py", "launch"],
        ["python", "-m", "debugpy", "--listen", "5678", "-m", "accelerate.commands.launch"],
        ["timeout", "60", "accelerate", "launch"],
        ["C:\\venv\\Scripts\\accelerate.exe", "launch"],
        ["python.exe", "C:\\venv\\Scripts\\accelerate-launch-script.py"],
    ],
)
def test_a_launcher_is_known_by_its_command_line(before):
    rest = ["--config_file", "x.yaml", "train.py", "--lr", "1"]
    assert launch_arguments(before + rest) == rest


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["bash", "-c", "cd work && accelerate launch train.py"],
        ["accelerate", "config"],
        ["accelerate"],
        ["python", "train.py", "accelerate", "launch"],
        ["python", "train.py", "-m", "accelerate.commands.launch"],
        ["python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py"],
        ["python", "-c", "import os", "accelerate", "launch"],
        ["python", "/home/accelerate/launch.py"],
    ],
)
def test_any_other_process_is_not_a_launcher(argv):
    assert launch_arguments(argv) is None


def test_the_nearest_launcher_wins(ep2, tmp_path):
    outer = tmp_path / "outer.yaml"
    outer.write_text("distributed_type: 'NO'\n")
    ancestors = [
        Process(),
        launch("--config_file", ep2, "train.py"),
        launch("--config_file", outer, "sweep.py"),
    ]
    assert find_in(ancestors).path == str(ep2)


def test_without_a_launcher_among_the_ancestors_the_answer_is_no_launcher():
    assert find_in([Process(), Process(["/sbin/init"])]).status == "no_launcher"
    assert find_in([]).status == "no_launcher"


def test_ancestors_that_are_gone_or_not_ours_are_passed_over(ep2):
    ancestors = [
        Process(argv=psutil.NoSuchProcess(1)),
        Process(argv=psutil.AccessDenied(1)),
        Process(argv=psutil.ZombieProcess(1)),
        launch("--config_file", ep2, "train.py"),
    ]
    assert find_in(ancestors).path == str(ep2)


def test_a_walk_that_breaks_off_ends_in_no_launcher(monkeypatch):
    def gone():
        raise psutil.NoSuchProcess(os.getpid())

    monkeypatch.setattr(psutil, "Process", gone)
    assert find_in(launcher._ancestors()).status == "no_launcher"


def test_the_answer_is_looked_up_once_per_process(monkeypatch):
    walks = []
    monkeypatch.setattr(launcher, "_ancestors", lambda: walks.append(1) or iter(()))
    launcher.find_launcher_yaml.cache_clear()
    assert launcher.find_launcher_yaml() is launcher.find_launcher_yaml()
    assert len(walks) == 1
    launcher.find_launcher_yaml.cache_clear()


# ---- Which file


@pytest.mark.parametrize("spelling", ["--config_file {}", "--config_file={}", "--config-file {}"])
def test_the_given_file_is_read_however_the_option_is_spelt(ep2, spelling):
    found = find_in([launch(*spelling.format(ep2).split(), "train.py")])
    assert (found.status, found.path) == ("found", str(ep2))
    assert found.content["parallelism_config"] == {"moe_ep_degree": 2}


def test_a_relative_file_is_relative_to_the_launchers_directory(ep2):
    below = ep2.parent / "below"
    below.mkdir()
    assert find_in([launch("--config_file", "../ep2.yaml", "train.py", cwd=below)]).path == str(ep2)


def test_the_scripts_own_config_file_option_is_the_scripts(ep2):
    found = find_in([launch("--config_file", ep2, "train.py", "--config_file", "/script/own.yaml")])
    assert found.path == str(ep2)


def test_a_config_file_that_only_the_script_was_given_is_not_the_launchers(ep2, tmp_path):
    environ = {"HF_HOME": str(tmp_path / "empty")}
    assert find_in([launch("train.py", "--config_file", ep2, environ=environ)]).status == "no_file"


def test_without_the_option_it_is_the_default_file_of_the_launchers_own_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/set/by/the/training/script")
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    default.write_text("parallelism_config: {moe_ep_degree: 4}\n")
    found = find_in([launch("train.py", environ={"HF_HOME": str(tmp_path)})])
    assert (found.status, found.path) == ("found", str(default))


def test_a_launcher_whose_environment_is_hidden_is_taken_to_have_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    found = find_in([launch("train.py", environ=psutil.AccessDenied(1))])
    assert found.path == str(tmp_path / "accelerate" / "default_config.yaml")


def test_a_launcher_with_no_file_is_told_apart_from_no_launcher(tmp_path):
    found = find_in([launch("train.py", environ={"HF_HOME": str(tmp_path)})])
    assert (found.status, found.content) == ("no_file", {})


def test_under_cpu_accelerate_passes_over_the_default_file_and_so_do_we(tmp_path):
    default = tmp_path / "accelerate" / "default_config.yaml"
    default.parent.mkdir()
    default.write_text("parallelism_config: {moe_ep_degree: 4}\n")
    assert find_in([launch("--cpu", "train.py", environ={"HF_HOME": str(tmp_path)})]).status == "no_file"
    assert find_in([launch("--cpu", "--config_file", default, "train.py")]).status == "found"


@pytest.mark.parametrize(
    "environ",
    [{}, {"HF_HOME": "/hf"}, {"XDG_CACHE_HOME": "/xdg"}, {"HF_HOME": "~/hf", "XDG_CACHE_HOME": "/xdg"}],
)
def test_the_default_file_is_where_accelerate_looks(environ, monkeypatch):
    from accelerate.commands.config import config_args

    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patched:
        for name, value in environ.items():
            patched.setenv(name, value)
        spec = importlib.util.spec_from_file_location("accelerate.commands.config.copy", config_args.__file__)
        copy = importlib.util.module_from_spec(spec)
        patched.setitem(sys.modules, spec.name, copy)  # dataclasses look their module up
        spec.loader.exec_module(copy)  # a copy: its constants are made at import
    assert default_config_file(environ) == copy.default_config_file


def test_a_json_file_is_read_as_accelerate_reads_it(tmp_path):
    path = tmp_path / "ep2.json"
    path.write_text(json.dumps({"parallelism_config": {"moe_ep_degree": 2}}, indent="\t"))  # tabs: not YAML
    assert find_in([launch("--config_file", path, "train.py")]).content["parallelism_config"] == {"moe_ep_degree": 2}


TWICE = """
fsdp_config: &fsdp {fsdp_version: 2}
num_processes: 2
parallelism_config:
  moe_ep_degree: 2
  "moe_ep_degree": 1
num_processes: 4
fsdp_config:
  <<: *fsdp
  <<: *fsdp
  fsdp_version: 1
"""


def test_keys_that_the_file_gives_twice_are_named_and_the_last_of_them_counts_as_for_accelerate(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(TWICE)
    found = find_in([launch("--config_file", path, "train.py")])
    assert found.content["parallelism_config"] == {"moe_ep_degree": 1}
    assert found.repeated == ("fsdp_config", "num_processes", "parallelism_config.moe_ep_degree")


def test_keys_that_a_json_file_gives_twice_are_named(tmp_path):
    path = tmp_path / "twice.json"
    path.write_text('{"parallelism_config": {"moe_ep_degree": 2, "moe_ep_degree": 1}, "fsdp_config": {"a": [{}]}}')
    assert find_in([launch("--config_file", path, "train.py")]).repeated == ("parallelism_config.moe_ep_degree",)


def test_a_file_without_repetitions_has_none(ep2):
    assert find_in([launch("--config_file", ep2, "train.py")]).repeated == ()


# ---- What cannot be read is an error, never "off"


def test_a_given_file_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.yaml.*cannot be read.*Keep the file in place"):
        find_in([launch("--config_file", tmp_path / "gone.yaml", "train.py")])


@pytest.mark.parametrize("name, text", [("a.yaml", "a: [1"), ("a.json", "{"), ("b.yaml", "\x00")])
def test_a_file_that_does_not_parse_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        find_in([launch("--config_file", tmp_path / name, "train.py")])


@pytest.mark.parametrize("text, kind", [("", "NoneType"), ("- a", "list"), ("abc", "str")])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path, text, kind):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"holds a {kind}; expected a mapping"):
        find_in([launch("--config_file", tmp_path / "a.yaml", "train.py")])


def test_a_relative_file_of_a_launcher_whose_directory_is_hidden_is_an_error_with_the_mend(ep2):
    denied = psutil.AccessDenied(1)
    with pytest.raises(ValueError, match="Give --config_file an absolute path"):
        find_in([launch("--config_file", "ep2.yaml", "train.py", cwd=denied)])
    assert find_in([launch("--config_file", ep2, "train.py", cwd=denied)]).status == "found"


def test_a_command_line_that_accelerates_parser_refuses_is_an_error_and_not_an_exit(capsys):
    with pytest.raises(ValueError, match=r"one version of accelerate"):
        find_in([launch("--num_processes", "many", "train.py")])
    assert capsys.readouterr().err == ""


def test_the_keys_that_accelerate_reads_are_its_parsers():
    keys = accelerate_parallelism_keys()
    assert {"parallelism_config_dp_shard_size", "parallelism_config_tp_size"} <= keys
    assert all(key.startswith("parallelism_config_") for key in keys)


def test_the_command_of_a_script_is_that_of_the_launcher_that_was_given_its_words():
    script = ["train.py", "--output", "runs/mine"]
    launcher = ["python", "-m", "accelerate.commands.launch", "--config_file", "ep2.yaml", *script]
    assert command_in([Process(), Process(launcher), Process(["srun", *launcher])], script) == launcher
    assert command_in([Process(["bash", "job.sh"])], script) == [sys.executable, *script]
