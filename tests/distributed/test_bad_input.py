"""What a user can get wrong, said clearly and on every rank, before any collective can hang."""

import pytest
import torch

import accel_moe
from tests.distributed.parity import Case, build, optimizer_of, prepared
from tests.ranks import run_ranks
from tests.tiny import tiny_model


def message_of(function) -> str:
    """The ValueError's text; the test fails on anything else."""
    with pytest.raises(ValueError) as caught:
        function()
    return str(caught.value)


def launch(case: Case, **accelerator_options) -> str:
    """What accelerator.prepare says to a model prepared for `case` under an Accelerator with these options."""
    from accelerate import Accelerator

    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = accel_moe.prepare(build(case), moe_ep_degree=case.ep)
    accelerator = Accelerator(**accelerator_options)
    return message_of(lambda: accelerator.prepare(model, optimizer_of(model, case)))


def on_every_rank(function, world, *args) -> str:
    messages = run_ranks(function, world, *args, timeout_s=60)
    assert len(set(messages)) == 1, messages
    return messages[0]


def ddp() -> str:
    return launch(Case(2, 2))


def fsdp1() -> str:
    from accelerate.utils import FullyShardedDataParallelPlugin

    return launch(Case(2, 2), fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=1))


def parallel(world: int, **sizes) -> str:
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    return launch(
        Case(world, 2),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
        parallelism_config=ParallelismConfig(**sizes),
    )


def attention_that_is_no_ring() -> str:
    return parallel(2, cp_size=2)


def tensor_parallel() -> str:
    return parallel(4, tp_size=2, dp_shard_size=2)


def sequence_parallel() -> str:
    return parallel(4, sp_size=2, dp_shard_size=2)


def fullgraph_with_context_parallel() -> str:
    return message_of(lambda: prepared(Case(2, 2, cp=2, compiled="fullgraph")))


def fp16() -> str:
    from accelerate.utils import FullyShardedDataParallelPlugin

    return launch(Case(2, 2), fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2), mixed_precision="fp16")


def offload_over_nccl_alone() -> str:
    from accelerate.utils import FullyShardedDataParallelPlugin

    if not torch.cuda.is_available():  # then it is gloo alone, which has all
        torch.distributed.get_backend_config = lambda: "cuda:nccl"
    return launch(Case(2, 2), fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True))


def fullgraph(ep: int, regional: bool) -> str:
    from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin

    return launch(
        Case(4, ep),
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
        dynamo_plugin=TorchDynamoPlugin(backend="aot_eager", fullgraph=True, use_regional_compilation=regional),
    )


def fullgraph_over_efsdp() -> str:
    return fullgraph(2, True)


def fullgraph_of_the_whole_model() -> str:
    return fullgraph(4, False)


def degree_that_does_not_divide_the_ranks() -> str:
    return message_of(lambda: prepared(Case(4, 8, mesh=False)))


def degree_that_does_not_divide_dp_shard_x_cp() -> str:
    return message_of(lambda: prepared(Case(4, 8, cp=2)))


def degree_that_does_not_divide_dp_shard() -> str:
    return message_of(lambda: prepared(Case(4, 4, dp_replicate=2)))


def different_degrees() -> str:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe.cpu

    accel_moe.cpu.enable()
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    model = accel_moe.prepare(tiny_model(), moe_ep_degree=1 + accelerator.process_index)
    return message_of(lambda: accelerator.prepare(model, torch.optim.SGD(model.parameters())))


def prepared_too_late() -> str:
    _, model, _ = prepared(Case(2, 1, ours=False))
    return message_of(lambda: accel_moe.prepare(model, moe_ep_degree=2))


@pytest.mark.core
@pytest.mark.parametrize(
    "function, world, says",
    [
        (ddp, 2, ["moe_ep_degree=2 (argument to prepare())", "needs FSDP2", "MULTI_", "fsdp_version: 2"]),
        (fsdp1, 2, ["needs FSDP2", "FSDP version 1"]),
        (attention_that_is_no_ring, 2, ["cp_size=2 needs attn_implementation='sdpa'", "'eager'", "cp_size: 1"]),
        (tensor_parallel, 4, ["tp_size=2 is not supported"]),
        (sequence_parallel, 4, ["sp_size=2 is not supported"]),
        (fullgraph_with_context_parallel, 2, ["dynamo_use_fullgraph: true is not supported with cp_size=2"]),
        (fp16, 2, ["mixed_precision: fp16 is not supported", "bf16"]),
        (offload_over_nccl_alone, 2, ["this one has cuda:nccl alone", 'backend="cuda:nccl,cpu:gloo"']),
        (fullgraph_over_efsdp, 4, ["dynamo_use_fullgraph: true is not supported", "dynamo_use_fullgraph: false"]),
        (fullgraph_of_the_whole_model, 4, ["dynamo_use_fullgraph: true needs dynamo_use_regional_compilation: true"]),
        (degree_that_does_not_divide_the_ranks, 4, ["moe_ep_degree=8 does not divide", "(4 ranks)", "1, 2, 4"]),
        (degree_that_does_not_divide_dp_shard_x_cp, 4, ["=8 does not divide dp_shard_size=2 x cp_size=2=4", "1, 2, 4"]),
        (degree_that_does_not_divide_dp_shard, 4, ["moe_ep_degree=4 does not divide dp_shard_size=2", "1, 2"]),
        (different_degrees, 2, ["moe_ep_degree", "1", "2"]),
        (prepared_too_late, 2, ["has been through accelerator.prepare()", "accel_moe.prepare(model) first"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_rank_says_what_was_found_what_was_expected_and_the_mend(function, world, says):
    message = on_every_rank(function, world)
    for words in says:
        assert words in message, message
