"""What is decided before any rank exists: when loading waits, what is refused, what a damaged checkpoint says."""

import json
import os
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, Transpose

import accel_moe
from accel_moe import hooks
from accel_moe.weights import fill, load_groups, place, request, safetensors
from accel_moe.weights.plan import check_unchanged, pending
from tests.tiny import tiny_model


@pytest.fixture(autouse=True)
def put_back():
    yield
    hooks.uninstall()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_model().save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy to damage, and the first of its safetensors files."""
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    return folder, sorted(folder.glob("*.safetensors"))[0]


# --- when it waits


@pytest.mark.parametrize(
    ("environ", "waits"),
    [
        ({}, False),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, True),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, True),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_USE_MEGATRON_LM": "true", "WORLD_SIZE": "2"}, False),
    ],
    ids=str,
)
def test_loading_waits_for_prepare_where_fsdp2_may_come(environ, waits, monkeypatch):
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: False)
    assert request.deferred(environ) is waits


def test_one_process_loads_at_once_and_patches_nothing(checkpoint, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("accelerate.state.is_initialized", lambda: False)
    model = accel_moe.from_pretrained(checkpoint, dtype="float32")
    assert pending(model) is None and not any(p.is_meta for p in model.parameters())
    assert hooks.installed() == []


def test_a_planned_model_holds_no_weights_and_transformers_is_as_before(many_ranks, checkpoint, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    model = accel_moe.from_pretrained(checkpoint, dtype="bfloat16")
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_transformers_is_as_before_after_an_error(many_ranks, tmp_path):
    before = PreTrainedModel.__dict__["_load_pretrained_model"]
    with pytest.raises(OSError):
        accel_moe.from_pretrained(tmp_path / "nothing_here")
    assert PreTrainedModel.__dict__["_load_pretrained_model"] is before


def test_the_row_that_stops_the_reading_gives_its_reason_and_tested_versions():
    (row,) = hooks.LOAD_TABLE
    assert row.why.endswith(".") and "5.17" in row.tested and row.target not in hooks.installed()


def test_a_forward_before_prepare_says_what_to_call(many_ranks, checkpoint):
    model = accel_moe.from_pretrained(checkpoint)
    with pytest.raises(RuntimeError, match=r"no weights yet.*accelerator\.prepare\(model, optimizer\)"):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long))


def test_loading_info_and_random_numbers_are_those_of_from_pretrained(many_ranks, checkpoint):
    found = []
    for method in (AutoModelForSequenceClassification.from_pretrained, accel_moe.from_pretrained):
        torch.manual_seed(3)
        options = {}
        if method is accel_moe.from_pretrained:
            options["model_class"] = AutoModelForSequenceClassification
        model, info = method(checkpoint, num_labels=3, output_loading_info=True, **options)
        found.append((model.score.weight.detach().clone(), info, torch.rand(2)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    assert found[0][1] == found[1][1] and found[0][1]["missing_keys"] == {"score.weight"}


@pytest.mark.parametrize(("rank", "reports"), [("0", 1), ("1", 0)])
def test_missing_and_unexpected_weights_are_reported_by_rank_0_alone(rank, reports, many_ranks, damaged, monkeypatch):
    from transformers.testing_utils import CaptureLogger
    from transformers.utils import logging

    def change(state):
        del state["model.norm.weight"]
        state["model.surplus.weight"] = torch.zeros(1)

    rewrite(damaged[0], change)
    monkeypatch.setenv("RANK", rank)
    with CaptureLogger(logging.get_logger("transformers.modeling_utils")) as log:
        model = accel_moe.from_pretrained(damaged[0])
    assert log.out.count("LOAD REPORT") == log.out.count("surplus") == log.out.count("model.norm.weight") == reports
    assert pending(model).plan.missing == ("model.norm.weight",)
    assert torch.equal(model.model.norm.weight, torch.ones(32)), "not initialised as transformers does"


# --- what is refused


@pytest.mark.parametrize("argument", sorted(request.REFUSED_ARGUMENTS))
def test_an_argument_that_shards_cannot_honour_is_refused_by_name(argument, many_ranks, checkpoint):
    with pytest.raises(
        ValueError, match=rf"cannot load into shards with {argument}='x': .*accel_moe\.prepare\(model\)"
    ):
        accel_moe.from_pretrained(checkpoint, **{argument: "x"})


@pytest.mark.parametrize("method", ["mxfp4", "bitsandbytes", "fp8"])
def test_a_quantised_checkpoint_is_refused_with_what_to_do(method, many_ranks, damaged):
    folder, _ = damaged
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"is quantised \({method}\).*dequantised copy"):
        accel_moe.from_pretrained(folder)


def test_pickled_weights_are_refused_with_what_to_do(many_ranks, damaged):
    folder, _ = damaged
    state = {}
    for file in folder.glob("*.safetensors*"):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has pytorch_model\.bin.*save_pretrained\(\) it once"):
        accel_moe.from_pretrained(folder)


def rewrite(folder, change) -> None:
    """Write the checkpoint anew as one file, after `change(state)`."""
    state = {}
    for file in folder.glob("*.safetensors*"):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("count", "says"), [(6, "6 experts in the checkpoint, 8 in the config"), (10, "10 experts")])
def test_fewer_or_more_experts_than_the_config_says_are_refused(count, says, many_ranks, damaged):
    def change(state):
        for key in [k for k in state if ".experts.0." in k]:
            for expert in range(8, count):
                state[key.replace("experts.0", f"experts.{expert}")] = state[key].clone()
        for key in [k for k in state if (m := re.search(r"experts\.(\d+)", k)) and int(m[1]) >= count]:
            del state[key]

    rewrite(damaged[0], change)
    with pytest.raises(ValueError, match=rf"does not fit its config: .*experts.*{says}.*Give the config"):
        accel_moe.from_pretrained(damaged[0])


def test_larger_experts_than_the_config_says_are_refused(many_ranks, damaged):
    def change(state):
        for key in [k for k in state if "experts" in k and "down_proj" in k]:
            state[key] = torch.cat([state[key], state[key]], dim=1)

    rewrite(damaged[0], change)
    with pytest.raises(ValueError, match=r"down_proj has shape \(8, 32, 48\) in the checkpoint, \(8, 32, 24\) by the"):
        accel_moe.from_pretrained(damaged[0])


def test_an_expert_with_half_its_tensors_is_refused(many_ranks, damaged):
    rewrite(damaged[0], lambda state: state.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj cannot be put together"):
        accel_moe.from_pretrained(damaged[0])


# --- damaged files


def test_a_truncated_file_is_found_without_reading_it(many_ranks, damaged):
    folder, file = damaged
    size = file.stat().st_size
    os.truncate(file, size - 8)
    with pytest.raises(ValueError, match=rf"{file.name} is truncated: {size - 8} bytes, and its header says {size}"):
        accel_moe.from_pretrained(folder)


def test_a_missing_shard_is_found_without_reading_it(many_ranks, damaged):
    folder, file = damaged
    file.unlink()
    with pytest.raises((ValueError, OSError), match=file.name):
        accel_moe.from_pretrained(folder)


def test_a_file_that_is_no_safetensors_file_is_refused(many_ranks, damaged):
    folder, file = damaged
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="not a safetensors file"):
        accel_moe.from_pretrained(folder)


def test_a_header_whose_offsets_do_not_fit_the_shapes_is_refused(many_ranks, damaged):
    folder, file = damaged
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    key = next(k for k in header if not k.startswith("__"))
    header[key]["shape"] = [*header[key]["shape"], 2]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=f"the header gives {re.escape(key)}"):
        accel_moe.from_pretrained(folder)


def test_a_file_that_changes_before_prepare_is_refused(many_ranks, damaged):
    folder, file = damaged
    model = accel_moe.from_pretrained(folder)
    plan = pending(model).plan
    check_unchanged(model, plan)
    os.truncate(file, 8)
    with pytest.raises(ValueError, match=f"{file.name} is gone or has changed"):
        check_unchanged(model, plan)


def test_a_model_that_was_changed_before_prepare_is_refused(many_ranks, checkpoint):
    model = accel_moe.from_pretrained(checkpoint)
    model.extra = torch.nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match=r"extra\.weight was added on meta after"):
        check_unchanged(model, pending(model).plan)
    del model.extra
    model.lm_head = torch.nn.Linear(32, 65, bias=False, device="meta")
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \(65, 32\)"):
        check_unchanged(model, pending(model).plan)


# --- the other way


def test_prepare_says_what_from_pretrained_would_have_saved(many_ranks, checkpoint, caplog):
    with caplog.at_level("INFO", logger="accel_moe"):
        accel_moe.prepare(accel_moe.from_pretrained(checkpoint), moe_ep_degree=2, moe_kernel="grouped_mm")
        assert "holds the whole model" not in caplog.text
        accel_moe.prepare(tiny_model(), moe_ep_degree=1, moe_kernel="grouped_mm")
        assert "holds the whole model" not in caplog.text
        accel_moe.prepare(tiny_model(), moe_ep_degree=2, moe_kernel="grouped_mm")
    assert "each of 4 ranks holds the whole model in RAM (0.0 GB)" in caplog.text


# --- ties


@pytest.mark.parametrize("equal", [True, False])
def test_weights_that_are_stored_twice_are_tied_only_if_they_are_equal(equal, many_ranks, tmp_path):
    model = tiny_model(tie=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = accel_moe.from_pretrained(tmp_path)
    fill.fill(ours, torch.device("cpu"))
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) is equal
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is equal
    assert torch.equal(ours.lm_head.weight, plain.lm_head.weight)


# --- the arithmetic of rows


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 10, 64])
@pytest.mark.parametrize(("efsdp", "ep"), [(1, 1), (4, 1), (2, 2), (4, 2), (3, 2)])
def test_own_rows_are_those_of_ep_first_and_fsdp_over_what_is_left(rows, efsdp, ep):
    if rows % ep:
        pytest.skip("ep divides the experts")
    seen = []
    for i in range(efsdp):
        for j in range(ep):
            of_ep = torch.arange(rows).chunk(ep)[j]
            parts = of_ep.chunk(efsdp)
            expected = parts[i].tolist() if i < len(parts) else []
            placements = [Replicate(), _StridedShard(0, split_factor=ep), Shard(0)]
            first, count = place.own_rows(rows, placements, (2, efsdp, ep), (1, i, j))
            assert list(range(first, first + count)) == expected
            seen += expected
    assert sorted(seen) == list(range(rows))


def test_a_shard_on_another_dim_is_refused():
    with pytest.raises(ValueError, match="only dim 0"):
        place.own_rows(4, [Shard(1)], (2,), (0,))


# --- which rows a transform may be fed


def group_of(operations, sources, targets):
    from transformers.core_model_loading import WeightConverter

    converter = WeightConverter([*sources], [*targets], operations)
    stored = {
        pattern: tuple(safetensors.HubTensor(pattern, "F32", shape, "file", 0) for shape in shapes)
        for pattern, shapes in sources.items()
    }
    return load_groups.LoadGroup(next(iter(targets)), targets, stored, converter)


def method(operations, sources, targets):
    return load_groups.method_of(group_of(operations, sources, targets))


def test_stacked_experts_are_read_into_place_whichever_name_sorts_first():
    experts = [(6, 8)] * 16
    operations = [MergeModulelist(dim=0), Concatenate(dim=1)]
    sources = {"e.*.up.weight": experts, "e.*.gate.weight": experts}
    assert method(operations, sources, {"e.gate_up": (16, 12, 8)}) == "stack"
    assert method([MergeModulelist(dim=0)], {"e.*.down.weight": experts}, {"e.down": (16, 6, 8)}) == "stack"


def test_experts_that_are_turned_or_interleaved_are_converted_by_rows():
    experts = [(6, 8)] * 16
    operations = [MergeModulelist(dim=0), Transpose(1, 2)]
    assert method(operations, {"e.*.w.weight": experts}, {"e.w": (16, 8, 6)}) == "rows"
    assert method([Transpose(1, 2)], {"e.w": [(16, 6, 8)]}, {"e.w_t": (16, 8, 6)}) == "rows"
    assert method([Interleave(dim=1)], {"e.w": [(16, 6, 8)]}, {"e.v": (16, 6, 8)}) == "rows"
    assert method([Chunk(dim=1)], {"e.w": [(16, 12, 8)]}, {"e.a": (16, 6, 8), "e.b": (16, 6, 8)}) == "rows"


@pytest.mark.parametrize(
    ("operations", "sources", "targets"),
    [
        ([Chunk(dim=0)], {"qkv": [(24, 8)]}, {"q": (8, 8), "k": (8, 8), "v": (8, 8)}),
        ([Concatenate(dim=0)], {"q": [(8, 8)], "k": [(8, 8)]}, {"qk": (16, 8)}),
        ([Transpose(0, 1)], {"w": [(8, 8)]}, {"v": (8, 8)}),
        ([Interleave(dim=0)], {"w": [(8, 8)]}, {"v": (8, 8)}),
        ([MergeModulelist(dim=1)], {"e.*.w": [(8, 8)] * 8}, {"e.w": (8, 8, 8)}),
        ([Transpose(1, 2, check_dims=True)], {"e.w": [(16, 8, 8)]}, {"e.v": (16, 8, 8)}),
        (
            [MergeModulelist(dim=0), Concatenate(dim=0)],
            {"a.*.w": [(8, 8)] * 8, "b.*.w": [(8, 8)] * 8},
            {"c": (8, 8, 8)},
        ),
    ],
    ids=["chunk 0", "concatenate 0", "transpose 0", "interleave 0", "stack 1", "asks the model", "stacks end to end"],
)
def test_a_transform_that_mixes_rows_gets_whole_tensors(operations, sources, targets):
    assert method(operations, sources, targets) == "whole"
