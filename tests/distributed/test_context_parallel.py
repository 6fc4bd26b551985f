"""Context parallelism: cp ranks share each sequence, and the numbers are those of one process on the whole of it.

On a CPU the attention is cpu_attention.py's, inside of torch's own split; on GPUs it is torch's ring attention. The
comparison and its tolerances are those of test_parity.py; the yardstick for the weights is accelerate FSDP2 with the
same cp.
"""

import functools
from dataclasses import replace

import pytest
import torch

from tests.adapters import EXPERTS, randomised
from tests.distributed.parity import Case, clean, whole
from tests.distributed.test_parity import check, run_case
from tests.distributed.trainer_parity import evaluate_in_one_process, evaluate_with_trainer, train_with_trainer
from tests.ranks import run_ranks
from tests.tiny import batches, decoder_layer_names, tiny_model

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# on GPUs fp32 takes sdpa's efficient kernel, which tells its sums in blocks of 32 tokens: each of 2 x cp chunks is one
TOKENS = 256 if torch.cuda.is_available() else 8
LENGTHS = (TOKENS,) * 3
TABLE = [
    Case(2, 2, cp=2, lengths=LENGTHS, masked=True, aux=0.5),
    Case(2, 2, cp=2, lengths=LENGTHS, checkpointing=True, nothing_received=True),
    Case(4, 4, cp=2, lengths=LENGTHS, masked=True, accumulation=2),
    slow(Case(4, 2, cp=2, lengths=LENGTHS, masked=True)),
    slow(Case(4, 2, cp=2, lengths=LENGTHS, checkpointing=True, nothing_received=True)),
    slow(Case(4, 4, cp=4, lengths=LENGTHS, masked=True, options=(("moe_dispatcher", "symmetric"),))),
    slow(Case(8, 2, cp=2, dp_replicate=2, lengths=LENGTHS, masked=True)),
    slow(Case(2, 2, cp=2, lengths=LENGTHS, compiled="regional")),
]


@pytest.mark.core
@pytest.mark.parametrize("case", TABLE, ids=lambda case: getattr(case, "name", None))
def test_training_equals_one_process_on_whole_sequences(case):
    check(run_case(case), case)


@pytest.mark.core
def test_training_with_trainer_equals_one_process_on_whole_sequences():
    case = Case(2, 2, cp=2, lengths=LENGTHS, masked=True)
    check(run_case(case, train_with_trainer), case)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Trainer and the oracle are compared on one kind of device")
@pytest.mark.parametrize("world", [2, slow(4)])
def test_evaluation_with_trainer_equals_that_of_whole_sequences(world):
    """The last batch has one row. accelerate fills it up where several batches are read at a time, also without cp:
    four ranks are compared with two that share no sequence."""
    case = Case(world, 2, cp=2, lengths=LENGTHS, masked=True)
    without = replace(case, world=2, cp=1)
    loss, tokens = evaluate_in_one_process(case) if world == 2 else run_ranks(evaluate_with_trainer, 2, without)[0]
    for found, counts in run_ranks(evaluate_with_trainer, world, case):
        assert abs(found - loss) <= 1e-5  # of a loss near 4.5, in fp32
        assert counts.keys() == tokens.keys() and all(torch.equal(counts[name], tokens[name]) for name in tokens)


def adapter_on_rank(cp: int, scheme: str) -> dict[str, torch.Tensor]:
    """Gradients of a LoRA adapter on attention and packed experts, and the loss, of two sequences on two ranks."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from peft import LoraConfig, get_peft_model

    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = tiny_model(num_key_value_heads=4, attn_implementation="sdpa")
    layers = decoder_layer_names(model)
    lora = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = randomised(get_peft_model(model, lora))
    accel_moe.prepare(model, moe_ep_degree=2, moe_quantize_experts=scheme)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers
    )
    accelerator = Accelerator(
        fsdp_plugin=plugin, parallelism_config=ParallelismConfig(cp_size=cp, dp_shard_size=2 // cp)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(trained))
    ids = batches(1, sequences=2, length=TOKENS)[0].chunk(2 // cp)[accelerator.process_index // cp]
    with accel_moe.context_parallel(accelerator, {"input_ids": ids, "labels": ids}) as part:
        loss = model(**part).loss
        accelerator.backward(loss)
    found = {clean(n): whole(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return {**found, "loss": accelerator.reduce(loss.detach(), "mean").cpu()}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "nf4"])
def test_an_adapter_on_split_sequences_has_the_gradients_of_whole_ones(scheme):
    """Whole sequences on ranks are compared with one process in tests/families and test_quantised.py."""
    pytest.importorskip("peft")
    if scheme != "none":
        pytest.importorskip("bitsandbytes")
    split, unsplit = (run_ranks(adapter_on_rank, 2, cp, scheme)[0] for cp in (2, 1))
    assert any("experts" in name for name in split) and split.keys() == unsplit.keys()
    for name, expected in unsplit.items():
        # fp32, sums in another order: test_parity.py's tolerance
        torch.testing.assert_close(split[name], expected, rtol=0, atol=1e-4 * expected.abs().max().item(), msg=name)


LENGTH = 2048


def long_model():
    """Heads in groups of two, and of a size that flash attention takes."""
    return tiny_model(head_dim=64, max_position_embeddings=LENGTH)


def gradients_on_rank() -> dict[str, torch.Tensor]:
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = long_model()
    model.set_attn_implementation("sdpa")
    accel_moe.prepare(model, moe_ep_degree=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(model),
    )
    mesh = ParallelismConfig(cp_size=2)
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin, parallelism_config=mesh)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    ids = batches(1, sequences=1, length=LENGTH)[0]
    with accel_moe.context_parallel(accelerator, {"input_ids": ids, "labels": ids}) as part:
        accelerator.backward(model(**part).loss)
    return {clean(name): whole(p.grad).float() for name, p in model.named_parameters()}


def gradients_of_one_process(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = long_model().to(device, dtype)
    ids = batches(1, sequences=1, length=LENGTH)[0].to(device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.float().cpu() for name, p in model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], words: str) -> float:
    """Relative, of all gradients whose names hold `words` as one vector."""
    some = [name for name in other if words in name]
    assert some
    gap = sum((one[name] - other[name]).square().sum() for name in some) ** 0.5
    return float(gap / sum(other[name].square().sum() for name in some) ** 0.5)


@pytest.mark.gpu
def test_the_ring_in_bf16_is_as_near_to_fp32_as_one_process_in_bf16():
    found = run_ranks(gradients_on_rank, 2)[0]
    exact, rounded = (run_ranks(gradients_of_one_process, 1, dtype)[0] for dtype in (torch.float32, torch.bfloat16))
    for words in ("self_attn", "experts", "embed", "lm_head"):
        # bf16 turns some tokens to other experts, here other ones than there: as far off, and not less
        assert distance(found, exact, words) <= 1.5 * distance(rounded, exact, words) + 1e-3, words
