"""4-bit and 8-bit experts in one process: the bytes, the dense weights, the refusals."""

from __future__ import annotations

import builtins
import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.multiprocessing.reductions import StorageWeakRef

import accel_moe
from accel_moe import hooks, in_accelerator
from accel_moe.experts import pack, packing
from accel_moe.experts.packing import KeptPacked, Packing
from accel_moe.experts.storage import STORAGES
from accel_moe.weights import place
from tests.distributed.quantised_runs import dequantised, int8, nf4
from tests.families import tiny_families
from tests.families.peft_runs import EXPERTS
from tests.tiny import batches, tiny_model

pytest.importorskip("bitsandbytes")
STACKS = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
SCHEMES = {"nf4": nf4, "int8": int8}
# The interpreter is slow: one layer, and few tokens, where one is enough.
ONE_LAYER = dict(num_hidden_layers=1)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    hooks.uninstall()


def prepared(scheme: str = "nf4", kernel: str = "scattermoe", frozen: bool = True, model=None):
    model = tiny_model() if model is None else model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or not (frozen and ".experts." in name))
    accel_moe.prepare(model, moe_kernel=kernel, moe_quantize_experts=scheme)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Accelerator(cpu=True).prepare(model, optimizer)


def loss_of(model) -> torch.Tensor:
    (batch,) = batches(1)
    return model(input_ids=batch, labels=batch).loss


# --- the bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48, 32), (3, 5), (64, 1), (1, 130), (7, 64)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dense_weights_are_those_of_the_oracle_to_the_bit(scheme, shape, dtype):
    weight = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[1] = 0
    weight[2, 0, 0] = 1000  # a large value costs its own block its precision, and no other
    how = Packing(scheme, weight.shape[1:], dtype)
    rows = torch.stack([how.pack(matrix) for matrix in weight])
    assert rows.dtype == torch.uint8 and rows.shape == (4, how.row_bytes)
    padded = torch.nn.functional.pad(weight.flatten(1).float(), (0, -weight[0].numel() % 64))
    expected = torch.stack([SCHEMES[scheme](row) if row.any() else row for row in padded])
    expected = expected[:, : weight[0].numel()].view(weight.shape)
    for to in (torch.float32, torch.bfloat16):
        assert torch.equal(how.dense(rows, to), expected.to(to))
        assert torch.equal(how.dense(rows[2:3], to), expected[2:3].to(to))
        assert how.dense(rows[:0], to).shape == (0, *shape)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_makes_the_same_dense_weights_of_the_same_bytes(scheme, dtype):
    weight = torch.randn(4, 48, 40, generator=torch.Generator().manual_seed(1))
    how = Packing(scheme, weight.shape[1:], weight.dtype)
    rows = torch.stack([how.pack(matrix) for matrix in weight])
    assert torch.equal(how.dense(rows.cuda(), dtype).cpu(), how.dense(rows, dtype))
    there = torch.stack([how.pack(matrix) for matrix in weight.cuda()])
    # a value halfway between two codes may go to either
    assert (there.cpu() != rows).float().mean() < 1e-2


def test_bytes_for_a_value():
    matrix = torch.Size([64, 128])
    assert Packing("nf4", matrix, torch.bfloat16).row_bytes * 8 / matrix.numel() == 4.5
    assert Packing("int8", matrix, torch.bfloat16).row_bytes * 8 / matrix.numel() == 8.5


# --- a model


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("nf4", "scattermoe"),
        pytest.param("nf4", "grouped_mm", marks=pytest.mark.core),
        ("int8", "grouped_mm"),
        ("nf4", "eager"),
        ("int8", "eager"),
        pytest.param("int8", "scattermoe", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_equal_those_of_the_dequantised_model(scheme, kernel):
    right = dequantised(tiny_model(**ONE_LAYER), scheme)
    right.set_experts_implementation("eager")
    expected = loss_of(right)
    expected.backward()
    model, _ = prepared(scheme, kernel, model=tiny_model(**ONE_LAYER))
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), right.named_parameters()):
        if ".experts." in name:
            assert ours.dtype == torch.uint8 and ours.grad is None
        else:  # another order of summation
            largest = theirs.grad.abs().max().item()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        ("gpt_oss", "grouped_mm"),
        ("nemotron_h", "grouped_mm"),
        ("longcat_flash", "grouped_mm"),
        ("gpt_oss", "scattermoe"),
        pytest.param("nemotron_h", "scattermoe", marks=pytest.mark.slow),
        pytest.param("longcat_flash", "scattermoe", marks=pytest.mark.slow),
    ],
)
def test_biases_transposed_weights_gateless_and_identity_experts_compute_the_same_bits(family, kernel):
    model, right = (tiny_families.tiny(family).build() for _ in range(2))
    right.load_state_dict(model.state_dict())
    stacks = [name for name, p in model.named_parameters() if name.endswith(STACKS) and p.dim() == 3]
    for name, parameter in right.named_parameters():
        if name in stacks:
            how = Packing("nf4", parameter.shape[1:], parameter.dtype)
            parameter.data = how.dense(torch.stack([how.pack(matrix) for matrix in parameter.data]), parameter.dtype)
    for name in stacks:
        model.get_parameter(name).requires_grad_(False)
    accel_moe.prepare(right, moe_kernel=kernel)
    accel_moe.prepare(model, moe_kernel=kernel, moe_quantize_experts="nf4")
    model = Accelerator(cpu=True).prepare(model)
    tokens = torch.arange(6).view(1, 6)
    for each in (model, right):
        each(input_ids=tokens, labels=tokens).loss.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), right.named_parameters()):
        assert (ours.dtype == torch.uint8) == (name in stacks), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("kernel", ["scattermoe", "grouped_mm", "eager"])
def test_no_dense_copy_of_the_experts_is_kept_for_backward(kernel, monkeypatch, adapted=False):
    made = []
    original = Packing.dense

    def watched(self, weight, dtype):
        dense = original(self, weight, dtype)
        made.append(StorageWeakRef(dense.untyped_storage()))
        return dense

    model = tiny_model(**ONE_LAYER)
    if adapted:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[], target_parameters=list(EXPERTS)))
    model, _ = prepared("int8", kernel, model=model)
    monkeypatch.setattr(Packing, "dense", watched)
    loss = loss_of(model)
    gc.collect()
    assert len(made) == 2
    assert all(memory.expired() for memory in made), "kept for backward"
    loss.backward()
    assert len(made) > 2


def test_our_kernels_keep_none_either_with_an_adapter_on_the_experts(monkeypatch):
    test_no_dense_copy_of_the_experts_is_kept_for_backward("scattermoe", monkeypatch, adapted=True)


def test_the_test_above_sees_a_copy_that_is_kept(monkeypatch):
    monkeypatch.setattr(KeptPacked, "_keep", lambda self, saved: saved)
    with pytest.raises(AssertionError, match="kept for backward"):
        with pytest.MonkeyPatch.context() as patched:
            test_no_dense_copy_of_the_experts_is_kept_for_backward("grouped_mm", patched)


def test_an_optimizer_that_was_made_before_holds_no_dense_experts():
    model, optimizer = prepared()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert sum(p.dtype == torch.uint8 for p in held) == 4


def test_the_layer_says_how_its_weights_are_stored():
    model, _ = prepared("int8")
    assert repr(model).count("weights=int8") == 1  # "(0-1): 2 x"
    assert "weights=" not in repr(accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm"))


# --- while they are read


def test_one_process_reads_and_packs_one_matrix_at_a_time(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setenv("ACCEL_MOE_QUANTIZE_EXPERTS", "nf4")
    monkeypatch.setenv("WORLD_SIZE", "1")
    dense, most = [], []
    original = place.Place.rows

    def watched(self, at, count, device=None):
        rows = original(self, at, count, device)
        if self.packing is not None and device is None:
            dense.append(weakref.ref(rows.local))
            most.append(sum(r().numel() for r in dense if r() is not None))
        return rows

    monkeypatch.setattr(place.Place, "rows", watched)
    loaded = accel_moe.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert all(p.is_meta for p in loaded.parameters())
    model, _ = prepared(model=loaded)
    assert len(most) == 2 * 2 * 8  # layers, weights, experts
    assert max(most) <= 4 * 48 * 32  # a matrix for each reading thread
    whole, _ = prepared(model=tiny_model())
    for (name, ours), (_, theirs) in zip(model.named_parameters(), whole.named_parameters()):
        assert torch.equal(ours, theirs), name


# --- refusals


def test_trained_experts_are_refused():
    with pytest.raises(ValueError, match=r"moe_quantize_experts=nf4 \(argument.*\) needs frozen experts, and "
                       r"model\.layers\.0\.mlp\.experts\.gate_up_proj is trained.*Train an adapter"):  # fmt: skip
        prepared(frozen=False)


def test_experts_that_are_no_floats_are_refused(monkeypatch):
    class Float8:
        def holds(self, weight):
            return weight.dtype == torch.float8_e4m3fn

        def dense(self, weight, dtype):
            return weight.to(dtype)

    monkeypatch.setitem(STORAGES, "float8", Float8())
    model = tiny_model()
    for layer in model.model.layers:
        down = layer.mlp.experts.down_proj
        layer.mlp.experts.down_proj = torch.nn.Parameter(down.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj is torch\.float8_e4m3fn already\. Give a dequantised base"):
        prepared("int8", "grouped_mm", model=model)


def test_a_forward_before_the_experts_are_quantised_is_refused():
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm", moe_quantize_experts="int8")
    with pytest.raises(RuntimeError, match=r"not quantised yet\. accelerator\.prepare"):
        loss_of(model)


def test_a_machine_without_bitsandbytes_is_told_so_and_int8_needs_none(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ValueError, match=r"needs bitsandbytes, and it is not there.*pip install 'accel_moe\[quantize\]"
    ):
        prepared("nf4")
    prepared("int8")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda codes, scales, dtype: 1 / 0, r"where it fails \(ZeroDivisionError: division by zero\)"),
        (lambda codes, scales, dtype: torch.zeros(codes.numel() * 2), "where it gives other values back"),
    ],
)
def test_a_library_that_does_not_run_on_the_device_is_told_at_start_up(broken, says, monkeypatch):
    monkeypatch.setattr(packing, "_from_nf4", broken)
    with pytest.raises(ValueError, match=f"needs bitsandbytes on cpu, {says}.*moe_quantize_experts: int8"):
        prepared("nf4")


@pytest.mark.parametrize(("kind", "says"), [("DEEPSPEED", "DEEPSPEED"), ("FSDP", "FSDP version 1")])
def test_deepspeed_and_fsdp1_are_refused(kind, says):
    model = accel_moe.prepare(tiny_model(), moe_kernel="grouped_mm", moe_quantize_experts="int8")
    other = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), is_fsdp2=False)
    with pytest.raises(ValueError, match=f"needs FSDP2, DDP or one process, but this Accelerator runs {says}"):
        in_accelerator._prepare_to_pack(other, model, model._accel_moe)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match=r"moe_quantize_experts.*none or nf4 or int8"):
        accel_moe.prepare(tiny_model(), moe_quantize_experts="fp4")


def test_adapters_merge_into_dense_experts_only():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=list(EXPERTS))
    model = peft.get_peft_model(tiny_model(), config)
    accel_moe.prepare(model, moe_kernel="grouped_mm", moe_quantize_experts="int8")
    model = Accelerator(cpu=True).prepare(model)
    with pytest.raises(ValueError, match=r"is packed \(moe_quantize_experts=int8\).*merge it into the dense base"):
        model.merge_adapter()
    loss_of(model).backward()


def test_packed_experts_are_not_saved_as_a_hub_model_and_an_adapter_is(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = prepared("int8")
    with pytest.raises(ValueError, match=r"experts are packed \(moe_quantize_experts=int8\).*Save the adapter"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    accel_moe.prepare(model, moe_kernel="grouped_mm", moe_quantize_experts="int8")
    Accelerator(cpu=True).prepare(model).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_an_adapter_that_came_after_the_packing_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=[], target_parameters=list(EXPERTS))
    model, _ = prepared("int8")
    with pytest.raises(ValueError, match=r"after accelerator.prepare\(\) had quantised it.*get_peft_model"):
        loss_of(peft.get_peft_model(model, config))


def test_a_base_that_is_quantised_already_is_told_of_the_option(tmp_path, monkeypatch):
    import json

    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    monkeypatch.setenv("ACCEL_MOE_QUANTIZE_EXPERTS", "nf4")
    with pytest.raises(ValueError, match=r"is quantised \(gptq\).*dequantised copy.*moe_quantize_experts"):
        accel_moe.from_pretrained(tmp_path)


def test_experts_that_are_packed_already_are_told_of_the_option():
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(8, 32, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised experts \(Qwen3MoeExperts\).*dequantised.*moe_quantize_experts"):
        accel_moe.prepare(model, moe_quantize_experts="nf4")


def test_a_second_preparation_packs_nothing_again():
    model, _ = prepared("int8")
    before = [p.clone() for p in model.parameters()]
    pack.pack_experts(model, model._accel_moe, torch.device("cpu"))
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before))
    assert not re.search("float32", str({p.dtype for n, p in model.named_parameters() if ".experts." in n}))


def test_old_fsdp_holds_packed_weights_too():
    """torch 2.11 makes its sharded parameter without saying that it needs no gradient."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    from accel_moe.experts import pack

    def init_sharded_param(self, param, device, shard_placement_fn):
        return _fsdp_param.nn.Parameter(param.detach())

    replaced = pack._init_sharded_param
    packed, dense = torch.zeros(2, dtype=torch.uint8), torch.zeros(2)
    with pytest.raises(RuntimeError, match="floating point"):
        init_sharded_param(None, packed, None, None)
    assert not replaced(init_sharded_param, None, packed, None, None).requires_grad
    assert replaced(init_sharded_param, None, dense, None, None).requires_grad
    assert _fsdp_param.nn is torch.nn


def test_old_fsdp_casts_no_packed_weights():
    """torch 2.11's mixed precision casts bytes as if they were numbers."""
    from types import SimpleNamespace

    from torch.distributed.fsdp import MixedPrecisionPolicy

    from accel_moe.experts import pack

    def init_dtype_attrs(self, mp_policy):
        self.param_dtype = mp_policy.param_dtype

    for dtype, want in ((torch.uint8, None), (torch.float32, torch.bfloat16)):
        held = SimpleNamespace(sharded_param=torch.zeros(2, dtype=dtype))
        pack._init_dtype_attrs(init_dtype_attrs, held, MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        assert held.param_dtype == want


def test_bytes_that_were_cast_are_refused():
    how = pack.Packing("int8", torch.Size([4, 16]), torch.float32)
    rows = how.pack(torch.randn(4, 16))[None]
    with pytest.raises(RuntimeError, match=r"torch\.uint8, and these became torch\.bfloat16"):
        how.dense(rows.to(torch.bfloat16), torch.float32)
