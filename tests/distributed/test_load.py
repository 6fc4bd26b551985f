"""Weights read straight into the shards: the same bits as from_pretrained + prepare, and the same step after."""

import functools

import pytest
import torch

from tests.distributed.loading import Load, compare_families, compare_roads
from tests.distributed.parity import Case
from tests.ranks import run_ranks
from tests.tiny import tiny_model

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
LAYOUTS = [
    (Case(2, 1), Load()),
    (Case(2, 2), Load()),
    (Case(4, 1, two_groups=True), Load()),
    (Case(4, 2), Load()),
    (Case(4, 4), Load()),
    slow(Case(4, 1, dp_replicate=2), Load()),
    (Case(4, 2, dp_replicate=2, tie=True), Load()),
    (Case(4, 2, num_experts=6), Load()),
    (Case(2, 2, mesh=False), Load()),
    (Case(2, 2, ram_efficient=True), Load()),
    (Case(2, 1, ram_efficient=True, tie=True), Load()),
    (Case(2, 2, ram_efficient=True), Load(accelerator_first=True, head="SequenceClassification")),
    (Case(2, 2, checkpointing=True, tie=True), Load()),
    (Case(2, 1), Load(prepare=False)),
    (Case(2, 2), Load(mixed_precision="bf16")),
    (Case(2, 2), Load(dtype="bfloat16", mixed_precision="bf16")),
    slow(Case(4, 2, num_experts=6), Load(dtype="bfloat16")),
    (Case(2, 2), Load(frozen=True, dtype="bfloat16", mixed_precision="bf16")),
    slow(Case(4, 2, dp_replicate=2), Load(head="SequenceClassification")),
    (Case(2, 2, family="mixtral"), Load()),
    slow(Case(2, 2, family="olmoe"), Load()),  # stored as Mixtral and DeepSeek are, under other names
    (Case(2, 2, family="granitemoe"), Load()),
    (Case(2, 2, family="deepseek_v3"), Load(dtype="auto")),
    slow(Case(2, 2, family="glm4_moe"), Load()),
]


def save(case: Case, folder, **options) -> str:
    tiny_model(case.family, num_experts=case.num_experts, tie=case.tie).save_pretrained(folder, **options)
    return str(folder)


def check(case: Case, how: Load, folder: str, function=compare_roads) -> None:
    for rank, wrong in enumerate(run_ranks(function, case.world, case, how, folder)):
        assert not wrong, f"rank {rank}: " + "\n".join(wrong[:8])


@pytest.mark.core
@pytest.mark.parametrize(("case", "how"), LAYOUTS, ids=lambda x: x.name)
def test_shards_and_a_step_equal_those_of_plain_from_pretrained(case, how, tmp_path):
    check(case, how, save(case, tmp_path))


def test_one_process_under_fsdp2_reads_into_its_shards_too(tmp_path):
    case, launched = Case(1, 1), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    (wrong,) = run_ranks(compare_roads, 1, case, Load(), save(case, tmp_path), env=launched)
    assert not wrong, wrong


@pytest.mark.core
def test_an_optimizer_with_two_groups_survives_where_ranks_own_no_expert(tmp_path):
    case = Case(8, 2, num_experts=4, two_groups=True)  # 2 experts per ep rank on efsdp 4
    check(case, Load(), save(case, tmp_path))


@pytest.mark.parametrize("layout", ["sharded index", "fused", "bf16", "fp16"])
def test_every_layout_on_disk_is_read_alike(layout, tmp_path):
    case = Case(2, 2)
    model = tiny_model(case.family)
    options = {"sharded index": dict(max_shard_size="20KB"), "fused": dict(save_original_format=False)}.get(layout, {})
    if layout in ("bf16", "fp16"):
        model = model.to({"bf16": torch.bfloat16, "fp16": torch.float16}[layout])
    model.save_pretrained(tmp_path, **options)
    check(case, Load(), str(tmp_path))


def roads_of_families(folders: dict[str, str], ep: int) -> dict[str, list[str]]:
    return compare_families(folders, ep)


def families() -> list[str]:
    from tests.families import tiny_families

    return [source.name for source in tiny_families.families()]


@pytest.mark.slow  # tests/unit/test_load_families.py loads each of them on one process
@pytest.mark.parametrize("part", range(4))
def test_every_family_is_loaded_alike_at_ep_2(part, tmp_path):
    from tests.families import tiny_families

    folders = {}
    for family in families()[part::4]:
        try:
            tiny = tiny_families.tiny(family)
        except ValueError:  # the sweep says why it cannot be built
            continue
        folders[family] = str(tmp_path / family)
        tiny.build().save_pretrained(folders[family])
    for rank, found in enumerate(run_ranks(roads_of_families, 2, folders, 2)):
        wrong = {family: lines[:3] for family, lines in found.items() if lines}
        assert not wrong, f"rank {rank}: {wrong}"


def compare_with_seeds_of_their_own(case: Case, how: Load, folder: str) -> list[str]:
    """Values of the head, which no file has, by rank; whole."""
    import accel_moe.cpu
    from tests.distributed.loading import load
    from tests.distributed.parity import accelerator_for, optimizer_of, whole

    accel_moe.cpu.enable()
    import os

    model = load(case, how, folder, ours=True, seed=int(os.environ["RANK"]))
    accelerator = accelerator_for(case, model)
    model, _ = accelerator.prepare(model, optimizer_of(model, case))
    return whole(model.score.weight).tolist(), model.score.weight.to_local().tolist()


def test_a_head_that_no_file_has_is_rank_0_s_though_seeds_differ(tmp_path):
    case, how = Case(4, 2, dp_replicate=2), Load(head="SequenceClassification")
    results = run_ranks(compare_with_seeds_of_their_own, case.world, case, how, save(case, tmp_path))
    torch.manual_seed(0)
    from transformers import AutoModelForSequenceClassification

    options = dict(num_labels=3, pad_token_id=0, dtype="float32")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).score.weight.tolist()
    assert all(whole == expected for whole, _ in results)
    assert results[0][1] == results[2][1] and results[1][1] == results[3][1], "replicas differ"


def unreadable_on_rank_1(case: Case, how: Load, folder: str) -> str:
    import os

    import accel_moe.cpu
    from accel_moe.weights.safetensors import Reader
    from tests.distributed.loading import load
    from tests.distributed.parity import accelerator_for, optimizer_of

    accel_moe.cpu.enable()
    model = load(case, how, folder, ours=True)
    accelerator = accelerator_for(case, model)
    if os.environ["RANK"] == "1":

        def broken(*_):
            raise OSError("the disk is gone")

        Reader.into = broken
    try:
        accelerator.prepare(model, optimizer_of(model, case))
    except RuntimeError as error:
        return str(error)
    return "nothing raised"


def test_a_rank_that_cannot_read_makes_every_rank_raise(tmp_path):
    case = Case(2, 2)
    for message in run_ranks(unreadable_on_rank_1, 2, case, Load(), save(case, tmp_path)):
        assert "Loading the weights failed on rank 1 of 2: OSError: the disk is gone" in message


def off_the_fsdp2_road(case: Case, how: Load, folder: str) -> list[str]:
    """Plain data parallelism: nothing is sharded, and the planned model is loaded whole."""
    import transformers
    from accelerate import Accelerator

    from tests.distributed.loading import load, values

    model = load(case, how, folder, ours=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(model.parameters())
    prepared, optimizer = accelerator.prepare(model, optimizer)
    assert type(prepared).__name__ == "DistributedDataParallel"
    expected = values(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=how.dtype))
    wrong = [n for n, v in values(prepared.module).items() if not torch.equal(v.cpu(), expected[n].cpu())]
    mine = {id(p) for p in prepared.parameters()}
    return wrong + ["the optimizer lost a parameter"] * any(
        id(p) not in mine for p in optimizer.param_groups[0]["params"]
    )


def test_a_model_that_comes_to_ddp_is_loaded_whole(tmp_path):
    case = Case(2, 1, tie=True)
    check(case, Load(), save(case, tmp_path), off_the_fsdp2_road)


def with_trainer(case: Case, how: Load, folder: str) -> list[str]:
    from transformers import Trainer

    import accel_moe.cpu
    from tests.distributed.loading import load, values
    from tests.distributed.trainer_parity import InOrder, trainer_arguments
    from tests.tiny import tiny_model

    accel_moe.cpu.enable()
    found, losses = [], []
    for ours in (True, False):
        arguments = trainer_arguments(case, folder + "/out", tiny_model(case.family))
        model = load(case, how, folder, ours)
        trainer = Trainer(model=model, args=arguments, train_dataset=InOrder())
        trainer.train()
        found.append(values(trainer.model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    wrong = [n for n, v in found[1].items() if not torch.equal(v, found[0][n])]
    return wrong + ([] if losses[0] == losses[1] and len(losses[0]) == 3 else [f"losses {losses}"])


@pytest.mark.core
@pytest.mark.parametrize("case", [Case(2, 2), slow(Case(2, 1)), Case(2, 2, ram_efficient=True)], ids=lambda c: c.name)
def test_trainer_trains_it_like_a_model_of_plain_from_pretrained(case, tmp_path):
    check(case, Load(), save(case, tmp_path), with_trainer)


def sabotaged(case: Case, how: Load, folder: str) -> list[str]:
    """The rows of a rank are off by one shard: the comparison must see it."""
    from accel_moe.weights import place

    original = place.own_rows

    def wrong_rows(rows, placements, mesh_shape, coordinate):
        return original(rows, placements, mesh_shape, [size - 1 - at for size, at in zip(mesh_shape, coordinate)])

    place.own_rows = wrong_rows
    return compare_roads(case, how, folder)


def test_the_comparison_catches_wrong_rows(tmp_path):
    case = Case(2, 2)
    for wrong in run_ranks(sabotaged, 2, case, Load(), save(case, tmp_path)):
        assert any("loaded" in line and "experts" in line for line in wrong)
        assert any("stepped" in line for line in wrong)
