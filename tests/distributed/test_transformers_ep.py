"""Our exchange under transformers' own expert parallelism: the same training as with its `all_to_all`.

Tolerance, float32: 1e-4 of each tensor's largest value, as in the parity table; sums over ranks are taken in another
order.
"""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.tiny import batches, tiny_model

parallel = pytest.importorskip("transformers.distributed.expert_parallel")
if not hasattr(parallel, "EPImplementationInterface"):
    pytest.skip("this transformers has no EPImplementationInterface", allow_module_level=True)


def train(folder: str, implementation: str, kernel: str, ep: int) -> tuple[float, dict[str, torch.Tensor], set[str]]:
    """One step of this rank's part of a batch: the mean loss, every gradient, and the exchanges that were used."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import accel_moe  # noqa: F401  # registers the name
    from tests.distributed.exchange_runs import watched_exchanges

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        experts_implementation=kernel,
        distributed_config=DistributedConfig(ep_size=ep, fsdp_size=world, ep_implementation=implementation),
    )
    own = batches(1)[0].chunk(world)[rank].to(model.device)
    with watched_exchanges() as exchanges:
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor().cpu() if hasattr(gradient, "full_tensor") else gradient.cpu()
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total.item() / world, gradients, bool(exchanges)


@pytest.mark.parametrize(
    "world, ep, kernel, interpret",
    [
        (2, 2, "grouped_mm", False),
        (4, 2, "grouped_mm", False),
        pytest.param(2, 2, "scattermoe", True, marks=pytest.mark.slow),
    ],
)
def test_training_is_as_with_transformers_all_to_all(world, ep, kernel, interpret, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    runs = [
        run_ranks(train, world, str(tmp_path), name, kernel, ep, interpret=interpret)[0]
        for name in ("all_to_all", "accel_moe")
    ]
    (wanted, right, theirs), (found, ours, used) = runs
    assert used and not theirs
    assert found == pytest.approx(wanted, rel=1e-5)
    assert ours.keys() == right.keys()
    for name, gradient in right.items():
        limit = 1e-4 * float(gradient.abs().max()) + 1e-9
        assert float((ours[name] - gradient).abs().max()) <= limit, name


def with_tensor_parallelism(folder: str) -> str:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import accel_moe  # noqa: F401

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    config = DistributedConfig(ep_size=2, tp_size=2, ep_implementation="accel_moe")
    try:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, distributed_config=config)
    except ValueError as error:
        return str(error)
    return ""


def test_a_shared_batch_is_refused_on_every_rank(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    for said in run_ranks(with_tensor_parallelism, 2, str(tmp_path)):
        assert "needs tp_size=1, and found 2" in said and "all_to_all" in said
