"""The examples as a user starts them: `accelerate launch` on two gloo ranks, with a stop and a resume."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launch

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ep2_cpu.yaml"]
SMALL = ["--max-megabytes", "0.2", "--seq-len", "32", "--batch-size", "2", "--eval-sequences", "6"]
SMALL += ["--lr", "3e-3", "--warmup", "1"]


def environment():
    """This process's, without what pytest and accelerate set."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCEL", "PYTEST", "TRITON"))}
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return inherited | settings | {"PYTHONPATH": path}


def python(*words):
    """Run this Python on `words` from the repository's root, as the README does; its output."""
    done = started(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def started(*words):
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    size = ["--layers", "2", "--hidden-size", "32", "--vocab-size", "400", "--max-megabytes", "0.2"]
    python("examples/make_base.py", folder, *size)
    return folder


def train(base, output, steps, *more):
    """examples/train.py; {metric: {step: value}} of its metrics.jsonl."""
    every = ["--log-every", "1", "--eval-every", "2", "--save-every", "2", "--steps", steps]
    python(*LAUNCH, "examples/train.py", "--model", base, "--output", output, *SMALL, *every, *more)
    metrics = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        step = values.pop("step")
        for name, value in values.items():
            metrics.setdefault(name, {})[step] = value
    return metrics


@pytest.mark.slow  # an adapter's run is resumed below
def test_train_resumed_goes_on_with_the_losses_of_the_run_that_never_stopped(base, tmp_path):
    whole = train(base, tmp_path / "whole", 4, "--gradient-accumulation", "2")
    train(base, tmp_path / "halves", 2, "--gradient-accumulation", "2")
    halves = train(base, tmp_path / "halves", 4, "--gradient-accumulation", "2", "--resume")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        # the same sums on the same ranks in the same order, from state restored to the bit
        assert halves[name] == pytest.approx(whole[name], abs=1e-6), name
    assert whole["eval/loss"][4] < whole["eval/loss"][0]
    assert all(1 / 8 <= share <= 1 for share in whole["expert_load/busiest_share"].values())


def test_train_trainer_trains_evaluates_saves_and_resumes(base, tmp_path):
    script = [*LAUNCH, "examples/train_trainer.py", "--model", base, "--output", tmp_path, *SMALL]
    every = ["--log-every", "1", "--eval-every", "2", "--save-every", "2"]
    python(*script, *every, "--steps", "2")
    python(*script, *every, "--steps", "4", "--resume")
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = {line["step"]: line["loss"] for line in history if "loss" in line}
    assert sorted(losses) == [1, 2, 3, 4] and all(math.isfinite(loss) for loss in losses.values())
    assert [line["step"] for line in history if "eval_loss" in line] == [2, 4]
    assert all(1 / 8 <= line["expert_load/busiest_share"] <= 1 for line in history if "loss" in line)


def test_lora_trains_resumes_from_the_newest_whole_checkpoint_and_is_merged_into_its_base(base, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from accel_moe import consolidate

    options = ["--lora", "4", "--lora-experts"]
    train(base, tmp_path, 2, *options)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-30")
    (tmp_path / "checkpoint-30" / "accel_moe_manifest.json").unlink()  # as of a copy that was cut short
    metrics = train(base, tmp_path, 4, *options, "--resume")
    # tests/distributed/test_checkpoint_adapter.py compares the losses after a resume with those of an unbroken run
    assert sorted(metrics["train/loss"]) == [1, 2, 3, 4] and all(map(math.isfinite, metrics["train/loss"].values()))
    assert metrics["eval/loss"][4] != metrics["eval/loss"][0]  # an adapter begins at nothing, and has learned little
    checkpoint = tmp_path / "checkpoint-4"
    assert consolidate.main(["--adapter", str(checkpoint), str(tmp_path / "adapter")]) == 0
    python("-m", "accel_moe.consolidate", "--verify", checkpoint, tmp_path / "merged", base)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    # a merged weight is rounded once more than two products that are added: fp32 noise
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())


@pytest.mark.slow
def test_train_trainer_trains_an_adapter(base, tmp_path):
    pytest.importorskip("peft")
    script = [*LAUNCH, "examples/train_trainer.py", "--model", base, "--output", tmp_path, *SMALL, "--lora", "4"]
    python(*script, "--log-every", "1", "--eval-every", "2", "--save-every", "2", "--steps", "2")
    manifest = json.loads((tmp_path / "checkpoint-2" / "accel_moe_manifest.json").read_text())["body"]
    assert all(".lora_" in name for name in manifest["tensors"]["pytorch_model_fsdp_0"])


TRL_METHODS = {
    "sft": (["--method", "sft"], "mean_token_accuracy"),
    "sft packed": (["--method", "sft", "--packing"], "mean_token_accuracy"),
    "dpo": (["--method", "dpo"], "rewards/margins"),
    "dpo without its adapter": (["--method", "dpo", "--lora", "4", "--lora-experts"], "rewards/margins"),
    "grpo": (["--method", "grpo"], "reward"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "sft" else pytest.mark.slow) for n in TRL_METHODS])
def test_train_trl_trains_and_saves(base, tmp_path, name):
    pytest.importorskip("trl")
    method, metric = TRL_METHODS[name]
    script = [*LAUNCH, "examples/train_trl.py", "--model", base, "--output", tmp_path, *SMALL, *method]
    script += ["--max-megabytes", "0.1", "--log-every", "1", "--eval-every", "2", "--save-every", "2"]
    python(*script, "--steps", "2")
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logged = [line for line in history if "loss" in line]
    assert [line["step"] for line in logged] == [1, 2] and all(math.isfinite(line["loss"]) for line in logged)
    assert all(metric in line for line in logged)


@pytest.mark.slow
def test_quickstart_learns_and_consolidates_what_it_trained(tmp_path):
    output = python("examples/quickstart.py", "--output", tmp_path / "quickstart")
    assert "held-out loss of the reloaded model" in output


def test_train_long_context_splits_its_sequences_and_saves(base, tmp_path):
    launch = [*LAUNCH[:-1], "accelerate_configs/ep2_cp2_cpu.yaml"]
    script = ["examples/train_long_context.py", "--model", base, "--output", tmp_path, "--max-megabytes", "0.2"]
    output = python(*launch, *script, "--steps", "6", "--lr", "3e-3", "--gradient-accumulation", "2")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1, losses
    assert (tmp_path / "checkpoint-6" / "accel_moe_manifest.json").exists(), output


MISTAKES = {
    "no such option value": (["--batch-size", "0"], "argument --batch-size: 0, expected 1 or more"),
    "no such folder of text": (["--data", "nowhere"], "nowhere is no folder. Give --data a folder of text files"),
    "experts without an adapter": (["--lora-experts"], "--lora-experts without --lora, expected a rank"),
    "no such format": (["--quantize", "int3"], "moe_quantize_experts='int3' (argument to prepare()) is not none or"),
    "no checkpoint": (["--resume"], "has no finished checkpoint: expected folders checkpoint-<number>, found nothing"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) for n in MISTAKES])
def test_a_mistake_on_two_ranks_is_one_line_that_the_launcher_repeats_at_its_end(base, tmp_path, name):
    words, told = MISTAKES[name]
    done = started(*LAUNCH, "examples/train.py", "--model", base, "--output", tmp_path, *SMALL, *words)
    assert_told_in_one_line(done, told)


OTHERS = ["train_trainer.py", "train_trl.py", "train_long_context.py"]


@pytest.mark.parametrize("script", ["train.py", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_model_that_is_not_there_is_told_in_one_line(script, tmp_path):
    if script == "train_trl.py":
        pytest.importorskip("trl")
    launch = LAUNCH if script == "train.py" else []  # the others in one process: it is the same line
    method = ["--method", "sft"] if script == "train_trl.py" else []
    words = ["--model", tmp_path / "nowhere", "--output", tmp_path, *method]
    assert_told_in_one_line(
        started(*launch, f"examples/{script}", *words), f"{tmp_path}/nowhere", launched=bool(launch)
    )


def test_every_script_tells_its_mistakes_in_one_line():
    texts = {path.name: path.read_text() for path in (REPOSITORY / "examples").glob("*.py")}
    scripts = {name: text for name, text in texts.items() if "__main__" in text}
    assert {"make_base.py", "quickstart.py", "train.py", *OTHERS} == set(scripts)
    assert all("with told_in_one_line():" in text.partition("__main__")[2] for text in scripts.values())


def test_debug_shows_the_traceback_of_a_mistake(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    mistakes = importlib.import_module("mistakes")
    with pytest.raises(SystemExit, match=r"^error: a mistake in two lines$"), mistakes.told_in_one_line():
        raise ValueError("a mistake\n in two lines")
    monkeypatch.setenv("ACCELERATE_DEBUG_MODE", "true")
    with pytest.raises(ValueError, match="in two lines"), mistakes.told_in_one_line():
        raise ValueError("a mistake\n in two lines")


def assert_told_in_one_line(done, told, launched=True):
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1 and told in lines[0], done.stderr
    scripts_own = done.stderr.partition("Traceback")  # torch's launcher has one of its own
    assert bool(scripts_own[1]) == launched and lines[0] in scripts_own[0], done.stderr
    assert not launched or lines[0] in done.stderr.rpartition("Root Cause")[2], done.stderr
