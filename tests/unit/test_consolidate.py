"""consolidate: a DCP checkpoint becomes what save_pretrained would have written, or a one-line error."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_moe import consolidate
from accel_moe.checkpoint import export_out, export_write, opened
from accel_moe.checkpoint.export_plan import plan_export
from accel_moe.checkpoint.export_write import write_export
from accel_moe.errors import CheckpointError, HubFormatError
from accel_moe.weights.base_model import open_base
from accel_moe.weights.safetensors import safetensors_files
from tests.exports import (
    assert_same_tensors,
    interrupt_writes,
    make_trained,
    offer_on_hub,
    one_line_error,
    read_weights,
    run,
    write_checkpoint,
    write_manifest_of,
)
from tests.tiny import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FAMILIES = ["qwen3_moe", "mixtral", "granitemoe", "olmoe", "deepseek_v3", "glm4_moe"]


@pytest.fixture
def trained(tmp_path):
    """(checkpoint, base, weights) of a tiny Qwen3-MoE. The base differs from the trained model in every value."""
    return make_trained(tmp_path, "qwen3_moe")


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_equals_save_pretrained_tensor_for_tensor(tmp_path, family):
    checkpoint, base, expected = make_trained(tmp_path, family)
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


@pytest.mark.core
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "granitemoe"])
def test_the_result_loads_with_no_missing_or_unexpected_key(tmp_path, family):
    from transformers import AutoModelForCausalLM

    checkpoint, base, _ = make_trained(tmp_path, family, tie=family == "granitemoe")
    assert run(checkpoint, tmp_path / "out", base) == 0
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    trained = tiny_model(family, seed=5, tie=family == "granitemoe").state_dict()
    assert_same_tensors(dict(loaded.state_dict()), dict(trained))


def test_the_result_has_the_files_and_index_of_the_base(tmp_path, trained):
    checkpoint, base, _ = trained
    assert run(checkpoint, tmp_path / "out", base) == 0
    out = tmp_path / "out"
    assert safetensors_files(out) == safetensors_files(base)
    for file in safetensors_files(base):
        assert set(load_file(out / file)) == set(load_file(base / file))
    theirs, ours = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (base, out))
    assert ours == theirs
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists() and (out / "generation_config.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_tied_weights_are_left_out_when_the_base_leaves_them_out(tmp_path):
    checkpoint, base, expected = make_trained(tmp_path, "qwen3_moe", tie=True)
    assert "lm_head.weight" not in expected
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_every_tensor_takes_the_dtype_that_it_has_in_the_base(tmp_path, trained):
    checkpoint, base, expected = trained
    for file in safetensors_files(base):
        mixed = {k: t if k.endswith("gate.weight") else t.bfloat16() for k, t in load_file(base / file).items()}
        save_file(mixed, base / file, metadata={"format": "pt"})
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    wanted = {k: t if k.endswith("gate.weight") else t.bfloat16() for k, t in expected.items()}
    assert_same_tensors(read_weights(tmp_path / "out"), wanted)


def test_dtype_replaces_the_main_dtype_and_tells_the_config(tmp_path, trained):
    checkpoint, base, expected = trained
    assert run("--verify", "--dtype", "bfloat16", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), {k: t.bfloat16() for k, t in expected.items()})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_max_shard_size_replaces_the_layout_of_the_base(tmp_path, trained):
    checkpoint, base, expected = trained
    assert run("--max-shard-size", "55KB", checkpoint, tmp_path / "out", base) == 0
    files = safetensors_files(tmp_path / "out")
    assert files != safetensors_files(base) and len(files) > 2
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    assert run("--max-shard-size", "1GB", checkpoint, tmp_path / "one", base) == 0
    assert safetensors_files(tmp_path / "one") == ["model.safetensors"]
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()


def test_two_workers_write_the_same_result(tmp_path, trained):
    checkpoint, base, expected = trained
    assert run("--workers", "2", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_killed_worker_is_told_and_the_next_run_goes_on(tmp_path, trained, monkeypatch, capsys):
    checkpoint, base, expected = trained
    real = export_write._GroupWriter.write
    parent = os.getpid()

    def dies(self, index):
        if os.getpid() != parent and index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    monkeypatch.setattr(export_write._GroupWriter, "write", dies)
    assert "fewer --workers" in one_line_error(capsys, "--workers", "2", checkpoint, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(export_write._GroupWriter, "write", real)
    assert run("--verify", "--workers", "2", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_a_full_disk_is_told_in_one_line_and_the_next_run_goes_on(tmp_path, trained, monkeypatch, capsys):
    checkpoint, base, expected = trained
    real = os.pwrite
    left = [20]

    def pwrite(*args):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "No space left on device" in one_line_error(capsys, checkpoint, tmp_path / "out", base)
    monkeypatch.setattr(os, "pwrite", real)
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_base_keys_without_a_counterpart_are_named_and_copied_only_when_asked(tmp_path, trained, capsys):
    checkpoint, base, expected = trained
    extra = {"mtp.layers.0.proj.weight": torch.arange(12.0).reshape(3, 4)}
    save_file(extra, base / "mtp.safetensors", metadata={"format": "pt"})
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {key: "mtp.safetensors" for key in extra}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("--verify", checkpoint, tmp_path / "without", base) == 0
    assert "mtp.layers.0.proj.weight" in capsys.readouterr().err
    assert_same_tensors(read_weights(tmp_path / "without"), expected)
    assert run("--verify", "--keep-extra", checkpoint, tmp_path / "with", base) == 0
    assert_same_tensors(read_weights(tmp_path / "with"), expected | extra)


def test_a_base_saved_from_the_bare_model_keeps_its_keys_without_prefix(tmp_path):
    model = tiny_model("qwen3_moe", seed=0)
    model.model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"architectures": ["Qwen3MoeModel"]}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    trained = tiny_model("qwen3_moe", seed=5).model
    trained.save_pretrained(tmp_path / "expected")
    write_checkpoint(trained, tmp_path / "checkpoint")
    assert run("--verify", tmp_path / "checkpoint", tmp_path / "out", tmp_path / "base") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), read_weights(tmp_path / "expected"))


def test_an_interrupted_export_goes_on_where_it_stopped(tmp_path, trained, monkeypatch):
    checkpoint, base, expected = trained
    plan = plan_export(opened.open_checkpoint([checkpoint]), open_base(str(base)))
    monkeypatch.setattr(export_write, "_SYNC_BYTES", 1)
    stopped = [7]
    calls = interrupt_writes(monkeypatch, lambda index, calls: len(calls) in stopped)
    with pytest.raises(KeyboardInterrupt):
        write_export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists() and calls == list(range(7))
    first, resumed = list(calls), []
    stopped.clear()
    write_export(plan, tmp_path / "out", on_resume=resumed.append)
    assert calls[7:] == list(range(7, len(plan.groups)))
    assert resumed == [sum(plan.group_bytes(plan.groups[i]) for i in first)]
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_nothing_is_written_of_a_damaged_checkpoint(tmp_path, trained, capsys, workers):
    checkpoint, base, _ = trained
    write_manifest_of(checkpoint)
    data = next((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    line = one_line_error(capsys, "--workers", workers, checkpoint, tmp_path / "out", base)
    assert "checkpoint is damaged: " in line and data.name in line and "checksum" in line
    assert not list(tmp_path.glob("out*"))


def test_an_export_goes_on_only_after_a_check_of_the_same_kind(tmp_path, trained):
    checkpoint, base, expected = trained
    plan = plan_export(opened.open_checkpoint([checkpoint]), open_base(str(base)))

    def stop(_):
        raise KeyboardInterrupt

    def resumed(**options):
        seen = []
        with pytest.raises(KeyboardInterrupt):
            write_export(plan, tmp_path / "out", on_resume=seen.append, before_commit=stop, **options)
        return bool(seen)

    assert [resumed(verified_by=kind) for kind in ("sizes", "checksums", "checksums")] == [False, False, True]
    write_export(plan, tmp_path / "out", verified_by="checksums")
    assert_same_tensors(read_weights(tmp_path / "out"), expected)


def test_an_interrupted_export_of_another_checkpoint_is_not_resumed(tmp_path, trained, monkeypatch):
    checkpoint, base, _ = trained
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / export_out.JOURNAL).write_text("another plan\n0 1 2 3.\n")
    (tmp_path / "out.tmp" / "stray.safetensors").write_text("x")
    assert run("--verify", checkpoint, tmp_path / "out", base) == 0
    assert not (tmp_path / "out" / "stray.safetensors").exists()


def test_two_exports_into_one_folder_do_not_mix(tmp_path, trained, capsys):
    checkpoint, base, _ = trained
    plan = plan_export(opened.open_checkpoint([checkpoint]), open_base(str(base)))

    def second(_):
        with pytest.raises(CheckpointError, match="another process"):
            write_export(plan, tmp_path / "out")

    write_export(plan, tmp_path / "out", before_commit=second)


def test_verify_notices_a_result_that_differs_from_the_checkpoint(tmp_path, trained, monkeypatch, capsys):
    checkpoint, base, _ = trained
    real = export_write._GroupWriter._write_at

    def flip(self, output, data):
        if output.key == "model.layers.1.mlp.experts.3.up_proj.weight":
            data = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
        real(self, output, data)

    monkeypatch.setattr(export_write._GroupWriter, "_write_at", flip)
    assert run("--verify", checkpoint, tmp_path / "out", base) == 1
    assert "model.layers.1.mlp.experts.gate_up_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stock_checkpoint_is_consolidated_with_a_warning_that_nothing_vouches_for_it(tmp_path, trained, capsys):
    checkpoint, base, _ = trained
    assert run(checkpoint / "pytorch_model_fsdp_0", tmp_path / "out", base) == 0
    assert "no manifest" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path, trained, capsys):
    checkpoint, base, _ = trained
    shutil.rmtree(base)
    tiny_model("qwen3_moe", num_experts=4).save_pretrained(base)
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert "not a checkpoint of" in line and "experts" in line and "(8," in line and "(4," in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "no metadata", "garbage metadata"])
def test_a_damaged_stock_checkpoint_is_refused(tmp_path, trained, capsys, damage):
    checkpoint, base, _ = trained
    data = checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp"
    metadata = data.with_name(".metadata")
    if damage == "missing":
        data.unlink()
    elif damage == "truncated":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "empty":
        data.write_bytes(b"")
    elif damage == "no metadata":
        metadata.unlink()
    else:
        metadata.write_bytes(b"nonsense")
    line = one_line_error(capsys, checkpoint, tmp_path / "out", base)
    assert (".metadata" if "metadata" in damage else "__0_0.distcp") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "paths, found",
    [
        (["nowhere", "out", "base"], "nowhere is not a folder"),
        (["base", "out", "base"], "expected pytorch_model_fsdp_0/"),
        (["checkpoint", "out", "./nowhere"], "is not a folder"),
        (["checkpoint", "out", "checkpoint"], "is not a base model"),
        (["checkpoint", "expected", "base"], "exists and is not empty"),
        (["tmp-0-abcdefghijkl.checkpoint-3", "out", "base"], "never committed"),
    ],
)
def test_wrong_paths_are_told_apart_in_one_line(tmp_path, trained, capsys, monkeypatch, paths, found):
    (tmp_path / "tmp-0-abcdefghijkl.checkpoint-3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert found in one_line_error(capsys, *paths)


def test_a_hub_id_without_a_network_asks_for_a_local_folder(tmp_path, trained, capsys, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    line = one_line_error(capsys, trained[0], tmp_path / "out", "some/model")
    assert "some/model is not a local folder" in line and "local copy" in line


def test_from_a_hub_id_only_small_files_and_headers_are_fetched(tmp_path, trained, monkeypatch):
    checkpoint, base, expected = trained
    fetched = offer_on_hub(base, tmp_path / "cache", monkeypatch)
    assert run(checkpoint, tmp_path / "out", "some/model") == 0
    assert_same_tensors(read_weights(tmp_path / "out"), expected)
    assert fetched == []


def test_a_quantised_base_is_refused(tmp_path, trained):
    checkpoint, base, _ = trained
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubFormatError, match="quantised \\(fp8\\)"):
        plan_export(opened.open_checkpoint([checkpoint]), open_base(str(base)))


def test_inspect_tells_what_a_checkpoint_holds_without_reading_tensors(tmp_path, trained, capsys, monkeypatch):
    checkpoint, _, _ = trained
    monkeypatch.setattr(opened.TensorReader, "read", None)
    assert run("--inspect", checkpoint) == 0
    told = capsys.readouterr().out
    assert "model.embed_tokens.weight [64, 32]" in told and "no manifest" in told


def test_wrong_usage_exits_with_2(tmp_path, capsys):
    for args in (["a", "b"], ["--workers", "0", "a", "b", "c"], ["--dtype", "int8", "a", "b", "c"]):
        with pytest.raises(SystemExit) as stopped:
            consolidate.main(args)
        assert stopped.value.code == 2
