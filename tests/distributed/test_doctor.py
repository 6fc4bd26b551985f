"""The doctor finds planted faults, and finds none where there is none."""

from __future__ import annotations

import errno
import itertools
import json
import operator
import os
import pathlib
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from accel_moe import doctor
from accel_moe.config import MoEConfig
from accel_moe.diagnosis import disk, kernels, launch, machine, model, report, settings, shrink, training
from accel_moe.kernels.activations import ACTIVATIONS
from accel_moe.mesh import plan_mesh
from tests.distributed import parity
from tests.ranks import run_ranks

YAML = """
distributed_type: FSDP
num_processes: 2
fsdp_config:
  fsdp_version: 2
parallelism_config:
  parallelism_config_dp_shard_size: 2
  moe_ep_degree: 2
"""


def crosses(lines) -> dict[str, str]:
    return {line.subject: line.finding + " " + line.mend for line in lines if line.mark == report.FAILED}


def qwen(**more):
    return transformers.Qwen3MoeConfig(num_hidden_layers=6, architectures=["Qwen3MoeForCausalLM"], **more)


# ---- The accelerate config


def settings_of(tmp_path, text: str):
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    return settings.read(str(path), 2)


def test_a_right_file_has_no_cross_and_gives_the_mesh(tmp_path):
    lines, in_force = settings_of(tmp_path, YAML)
    assert not crosses(lines) and in_force.plan == plan_mesh(2, 2) and in_force.options.moe_ep_degree == 2


def test_context_parallelism_is_in_the_mesh_and_left_out_of_the_training(tmp_path):
    cp = "parallelism_config_dp_shard_size: 1\n  parallelism_config_cp_size: 2"
    lines, in_force = settings_of(tmp_path, YAML.replace("parallelism_config_dp_shard_size: 2", cp))
    assert not crosses(lines) and in_force.plan == plan_mesh(2, 2, dp_shard=1, cp=2)
    small, changes = settings.on_this_machine(in_force, "cpu")
    assert small.plan == plan_mesh(2, 2) and changes == ["cp_size 2 is left out: each rank trains on whole sequences"]


@pytest.mark.parametrize(
    "right, wrong, told",
    [
        ("  moe_ep_degree: 2", "  ep_degree: 2", "Did you mean moe_ep_degree"),
        ("  parallelism_config_dp_shard_size: 2", "  dp_shard_size: 2", "Write `parallelism_config_dp_shard_size: 2`"),
        ("num_processes: 2", "num_processes: 2\nmoe_ep_degree: 2", "Move it into parallelism_config"),
        ("  moe_ep_degree: 2", "  moe_ep_degree: 3", "Use one of 1, 2"),
        ("num_processes: 2", "num_processes: 4", "Make the product equal to num_processes"),
        ("num_processes: 2", "num_processes: 2\nnum_procs: 2", "num_procs"),
        ("num_processes: 2", "num_processes: -2", "expected a whole number above 0"),
    ],
)
def test_a_trap_of_the_file_is_a_cross_with_its_mend(tmp_path, right, wrong, told):
    lines, in_force = settings_of(tmp_path, YAML.replace(right, wrong))
    assert in_force is None and any(told in text for text in crosses(lines).values()), lines


@pytest.mark.parametrize(
    "right, wrong, told",
    [
        ("  fsdp_version: 2", "  fsdp_version: 1", "needs FSDP2, but this Accelerator runs FSDP version 1"),
        ("num_processes: 4", "num_processes: 4\nmixed_precision: fp16", "with mixed_precision: fp16 is not supported"),
        ("  moe_ep_degree: 2", "  parallelism_config_tp_size: 2\n  moe_ep_degree: 2", "together with tp_size=2"),
        ("  parallelism_config_dp_shard_size: 2", "  parallelism_config_sp_size: 2", "mutually exclusive"),
        ("_dp_shard_size: 2", "_dp_replicate_size: 2", "cannot be used with pure data parallelism"),
        (
            "fsdp_config:",
            "dynamo_config:\n  dynamo_backend: INDUCTOR\n  dynamo_use_fullgraph: true\nfsdp_config:",
            "dynamo_use_fullgraph: true is not supported with cp_size=2",
        ),
    ],
)
def test_settings_that_training_refuses_with_context_parallelism_are_a_cross(tmp_path, right, wrong, told):
    text = YAML.replace("num_processes: 2", "num_processes: 4") + "  parallelism_config_cp_size: 2\n"
    lines, in_force = settings_of(tmp_path, text)
    assert not crosses(lines) and in_force.plan == plan_mesh(4, 2, dp_shard=2, cp=2)
    lines, in_force = settings_of(tmp_path, text.replace(right, wrong))
    assert in_force is None and told in crosses(lines)["settings of accelerate"], lines


@pytest.mark.parametrize(
    "ranks, ep, replicate, expected",
    [(2, 2, 1, (1, 1, 2)), (8, 8, 1, (1, 1, 4)), (8, 4, 1, (1, 2, 2)), (16, 8, 2, (2, 1, 2)), (8, 1, 1, (1, 4, 1)),
     (6, 3, 1, (1, 2, 2)), (3, 3, 1, (1, 1, 3)), (64, 2, 1, (1, 2, 2))],
)  # fmt: skip
def test_a_mesh_is_cut_to_four_ranks_with_the_same_axes(ranks, ep, replicate, expected):
    plan = settings.cut(plan_mesh(ranks, ep, dp_replicate=replicate))
    assert (plan.dp_replicate, plan.efsdp, plan.ep) == expected


# ---- Bad input


def test_an_ep_degree_that_does_not_divide_the_experts_is_a_cross():
    config = qwen(num_experts=10)
    in_force = settings.Settings(MoEConfig(moe_ep_degree=4), plan_mesh(4, 4), False)
    with torch.device("meta"):
        built = transformers.Qwen3MoeForCausalLM(config)
    found = model.Model(config, model.recognise.find_experts(built), 1)
    assert "moe_ep_degree=4 does not divide num_experts=10" in crosses(model.lines(found, in_force))["model"]


def test_a_model_without_a_ring_is_a_cross_with_context_parallelism(tmp_path):
    qwen(use_sliding_window=True, sliding_window=4, max_window_layers=0).save_pretrained(tmp_path)
    found = model.read(str(tmp_path))
    of = {cp: settings.Settings(MoEConfig(moe_ep_degree=2), plan_mesh(4, 2, cp=cp), False) for cp in (1, 2)}
    assert model.refused(found, of[1]) is None
    told = crosses(model.lines(found, of[2]))["model"]
    assert "parallelism_config_cp_size=2: Qwen3MoeForCausalLM has layers of sliding_attention" in told


def test_what_context_parallelism_needs_is_said_where_it_is_not_tried(tmp_path):
    qwen().save_pretrained(tmp_path)
    in_force = settings.Settings(MoEConfig(moe_ep_degree=2), plan_mesh(4, 2, cp=2), False, "no")
    lines = model.lines(model.read(str(tmp_path)), in_force)
    (told,) = (line for line in itertools.islice(lines, 2) if line.subject == "context parallelism")
    assert told.mark == report.SKIPPED and "attn_implementation='sdpa'" in told.finding
    assert "in fp32 a GPU needs a multiple of 128" in told.finding


def folder_of(tmp_path, kind: str) -> list[str]:
    if kind == "dense":
        transformers.LlamaConfig(num_hidden_layers=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    elif kind == "a size that is no number":
        (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "hidden_size": "large"}')
    elif kind == "unknown family":
        (tmp_path / "config.json").write_text('{"model_type": "no_such"}')
    elif kind == "broken YAML":
        (tmp_path / "broken.yaml").write_text("parallelism_config: [")
        return ["--config_file", str(tmp_path / "broken.yaml")]
    elif kind == "no YAML":
        return ["--config_file", str(tmp_path / "none.yaml")]
    return [str(tmp_path)]


@pytest.mark.parametrize(
    "kind, told",
    [
        ("dense", "found no experts layer in LlamaForCausalLM"),
        ("unknown family", "no_such"),
        ("a size that is no number", "'hidden_size'"),
        ("empty folder", "Give a folder with a config.json"),
        ("broken YAML", "broken.yaml"),
        ("no YAML", "is no file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, kind, told):
    assert doctor.main(folder_of(tmp_path, kind)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and told in err


# ---- Folders


def test_a_folder_that_works_has_no_cross_and_nothing_is_left_in_it(tmp_path):
    line = disk.folder_line("checkpoint folder", tmp_path / "runs" / "mine")
    assert line.mark == report.PASSED, line
    assert not list(tmp_path.iterdir())


def test_a_folder_without_rename_is_a_cross(tmp_path, monkeypatch):
    def refused(self, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(pathlib.Path, "rename", refused)
    text = crosses([disk.folder_line("checkpoint folder", tmp_path)])["checkpoint folder"]
    assert "Operation not permitted" in text and "save elsewhere" in text
    assert not list(tmp_path.iterdir())


def test_an_output_inside_a_folder_that_may_not_be_read_is_a_cross(tmp_path, monkeypatch):
    locked, stat, mkdir = str(tmp_path), os.stat, os.mkdir

    def guarded(function):
        def call(path, *args, **kwargs):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(locked + os.sep):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "stat", guarded(stat))
    monkeypatch.setattr(os, "mkdir", guarded(mkdir))
    text = crosses([disk.folder_line("checkpoint folder", tmp_path / "runs")])["checkpoint folder"]
    assert f"{locked} cannot be written (Permission denied)" in text


def test_a_rename_that_copies_is_a_cross(tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "rename", lambda self, target: shutil.copytree(self, target))
    text = crosses([disk.folder_line("checkpoint folder", tmp_path)])["checkpoint folder"]
    assert "keeps its old name" in text and "another file system" in text


def test_a_refused_fsync_is_a_cross(tmp_path, monkeypatch):
    def refused(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    assert "Invalid argument" in crosses([disk.folder_line("checkpoint folder", tmp_path)])["checkpoint folder"]


# ---- Kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
def test_a_kernel_with_a_wrong_gate_is_found(monkeypatch):
    small = shrink.shrunk(qwen())
    assert kernels.faults(small, own_sizes=False) == {"float32": None}
    monkeypatch.setitem(ACTIVATIONS, "silu", replace(ACTIVATIONS["silu"], triton=ACTIVATIONS["gelu"].triton))
    assert "its gate: silu gate" in kernels.faults(small, own_sizes=False)["float32"]


def test_a_stale_kernel_cannot_come_from_triton_s_cache(tmp_path):
    """Its key holds the gate's repr, which holds the hash of the formula's source: another source, another key."""
    source = """
import triton
@triton.jit
def silu(x, alpha):
    return x * {factor}, x
"""
    probe = """
import importlib.util, sys
from accel_moe.kernels import activation
from accel_moe.kernels.glu import Glu
for path in [None, *sys.argv[1:]]:
    if path is not None:
        spec = importlib.util.spec_from_file_location("formula", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        activation.silu = module.silu
    print(repr(Glu("silu", True)))
"""
    paths = []
    for i, factor in enumerate((1, 2, 2)):
        paths.append(tmp_path / f"formula{i}.py")
        paths[-1].write_text(source.format(factor=factor))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", probe, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ours, first, second, again = done.stdout.splitlines()
    assert len({ours, first, second}) == 3 and second == again


# ---- Ranks


def train(request: training.Request, folder: str, faults: tuple[str, ...]) -> None:
    """On a rank: training.on_ranks with planted faults."""
    for fault in {"no_ep_scale", "router_gradient"} & set(faults):
        getattr(parity, f"sabotage_{fault}")()
    if "no resume" in faults:
        prepared = training._prepared

        def without_loading(request):
            accelerator, *others = prepared(request)
            accelerator.load_state = lambda folder: None
            return accelerator, *others

        training._prepared = without_loading
    if "drift" in faults:
        own = training.unequal_replicas

        def drifted(model):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.to_local().add_(1e-7 * torch.distributed.get_rank())
            return own(model)

        training.unequal_replicas = drifted
    training.on_ranks(request, Path(folder))


def crosses_of_ranks(tmp_path, *faults: str, world: int = 2, replicate: int = 1) -> dict[str, str]:
    plan = plan_mesh(world, 2, dp_replicate=replicate)
    options = vars(MoEConfig(moe_ep_degree=plan.ep, moe_kernel="grouped_mm"))
    request = training.Request(shrink.shrunk(qwen()), plan, options)
    run_ranks(train, world, request, str(tmp_path), faults)
    run, resumed = (torch.load(tmp_path / name, weights_only=False) for name in ("trained.pt", "resumed.pt"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    oracle = training.in_one_process(request.config, world, device)
    return crosses([*model.parity_lines(run, oracle, device), model.resumed_line(resumed)])


def test_ranks_without_a_fault_have_no_cross(tmp_path):
    assert crosses_of_ranks(tmp_path) == {}


def test_the_missing_scale_of_ep_and_a_checkpoint_that_does_not_come_back_are_found(tmp_path):
    found = crosses_of_ranks(tmp_path, "no_ep_scale", "no resume")
    assert ".experts." in found["gradients"] and "about 2 times the right one" in found["gradients"]
    assert list(found) == ["gradients", "gradient norm", "save and resume"]
    assert "did not come back" in found["save and resume"]


def test_a_dropped_gradient_of_the_router_is_found(tmp_path):
    found = crosses_of_ranks(tmp_path, "router_gradient")
    assert ".gate." in found["gradients"] and "loss" not in found and "save and resume" not in found


@pytest.mark.slow
def test_a_parameter_that_no_forward_uses_hinders_nothing():
    config = transformers.DeepseekV32Config(architectures=["DeepseekV32ForCausalLM"])
    with torch.device("meta"):
        built = transformers.DeepseekV32ForCausalLM(config)
    found = model.Model(config, model.recognise.find_experts(built), 1)
    in_force = settings.Settings(MoEConfig(moe_ep_degree=2), plan_mesh(2, 2), False)
    lines = list(model.lines(found, in_force))
    assert not crosses(lines) and lines[-1].subject == "from_pretrained"


def unequal(gap: float) -> list[str]:
    """On a rank: the names of a small module's parameters that differ, if rank 1 has its bias shifted by `gap`."""
    torch.distributed.init_process_group("gloo")
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.constant_(layer.bias, 1 + gap * torch.distributed.get_rank())
    return training.unequal_replicas(layer)


def test_replicas_that_differ_in_one_bit_are_found():
    assert run_ranks(unequal, 2, 1.2e-7) == [["bias"], ["bias"]]
    assert run_ranks(unequal, 2, 0.0) == [[], []]


@pytest.mark.slow
def test_sharded_replicas_that_drift_are_found(tmp_path):
    assert "differ between ranks" in crosses_of_ranks(tmp_path, "drift", world=4, replicate=2)["replicas"]


# ---- Processes of their own


def measure(folder: str) -> None:
    machine.measure_link(1 << 10, Path(folder))


def test_a_link_is_measured(tmp_path):
    run_ranks(measure, 2, str(tmp_path))
    found = json.loads((tmp_path / "link.json").read_text())
    assert found["symmetric"] and found["gb_per_s"] > 0


def test_a_rank_s_traceback_comes_back(tmp_path):
    failure = launch.run_ranks(operator.truediv, 1, tmp_path, ranks=1, device="cpu", timeout_s=120)
    assert failure.startswith("Traceback") and "unsupported operand" in launch.last_line(failure)


def test_ranks_that_hang_are_ended(tmp_path):
    failure = launch.run_ranks(machine.measure_link, 1 << 10, tmp_path, ranks=2, device="cpu", timeout_s=0.2)
    assert launch.last_line(failure) == "TimeoutError: still running after 0 s"


def on_the_path(tmp_path, monkeypatch, code: str) -> None:
    """Lets every Python that starts from now on run `code` first."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"), prepend=os.pathsep)


def run_doctor(tmp_path, config, capsys) -> tuple[int, str]:
    config.save_pretrained(tmp_path / "model")
    (tmp_path / "accelerate.yaml").write_text(YAML)
    arguments = ["--config_file", str(tmp_path / "accelerate.yaml"), "--output", str(tmp_path)]
    return doctor.main([str(tmp_path / "model"), *arguments]), capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_the_whole_command_finds_nothing_where_nothing_is_wrong(tmp_path, capsys, family):
    config = transformers.CONFIG_MAPPING[family](dtype="bfloat16")
    if family == "gpt_oss":  # as on the Hub
        config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    code, out = run_doctor(tmp_path, config, capsys)
    assert code == 0 and "✗" not in out and out.endswith("All is well.\n"), out
    assert "✓ from_pretrained" in out


@pytest.mark.slow
def test_the_whole_command_finds_what_is_planted_on_the_path_of_its_processes(tmp_path, capsys, monkeypatch):
    code = """
import sys
if "accel_moe.diagnosis.rank" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    from accel_moe.experts import work
    work._ScaleWeightGradients.backward = staticmethod(lambda ctx, *gradients: (None, *gradients))
    from accel_moe.kernels.activations import ACTIVATIONS
    import dataclasses
    ACTIVATIONS["silu"] = dataclasses.replace(ACTIVATIONS["silu"], triton=ACTIVATIONS["gelu"].triton)
"""
    on_the_path(tmp_path, monkeypatch, code)
    exit_code, out = run_doctor(tmp_path, qwen(), capsys)
    found = [line.split()[1] for line in out.splitlines() if "✗" in line]
    assert exit_code == 1 and found == ["Triton", "gradients", "gradient"], out
