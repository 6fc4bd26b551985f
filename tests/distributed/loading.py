"""Both roads of a model into its shards, on one set of ranks: from_pretrained + prepare, and ours; then one step each.

A `Case` of parity.py says the layout; `Load` how the checkpoint is asked for. `compare_roads` runs on every rank and
returns the ways in which the two differ, [] if none. Every difference is looked for at 0.0: both roads read the same
bytes, cast them in the same order and run the same step on the same shards.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

import torch

from tests.distributed.parity import Case, accelerator_for, clean, optimizer_of
from tests.tiny import batches, tiny_model


@dataclass(frozen=True)
class Load:
    """How a checkpoint is loaded.

    Attributes:
        dtype: as given to from_pretrained.
        head: "CausalLM", or "SequenceClassification", whose head no checkpoint here has.
        frozen: train the experts alone.
        prepare: pass the model to accel_moe.prepare.
        accelerator_first: make the Accelerator before loading, as most scripts do.
    """

    dtype: str = "float32"
    mixed_precision: str = "no"
    head: str = "CausalLM"
    frozen: bool = False
    prepare: bool = True
    accelerator_first: bool = False

    @property
    def name(self) -> str:
        extras = [
            f"{k}={getattr(self, k)}" for k in self.__dataclass_fields__ if getattr(self, k) != getattr(Load(), k)
        ]
        return " ".join(extras) or "plain"


@dataclass
class Road:
    """What one road gave on this rank: its part of every tensor, and the optimizer's groups by name."""

    loaded: dict[str, torch.Tensor]
    loss: float
    stepped: dict[str, torch.Tensor]
    groups: list[list[str]]
    ties: set[tuple[str, str]]


def load(case: Case, how: Load, folder: str, ours: bool, seed: int = 5):
    import transformers

    import accel_moe
    from accel_moe.weights.plan import pending

    model_class = getattr(transformers, f"AutoModelFor{how.head}")
    torch.manual_seed(seed)
    options = dict(dtype=how.dtype, attn_implementation="eager")
    if how.head == "SequenceClassification":
        options |= dict(num_labels=3, pad_token_id=0)
    if ours:
        model = accel_moe.from_pretrained(folder, model_class=model_class, **options)
        assert pending(model) is not None and any(p.is_meta for p in model.parameters())
    else:
        model = model_class.from_pretrained(folder, **options)
        assert pending(model) is None
    if how.frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("experts" in name)
    if how.prepare:
        accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel=case.kernel)
    return model


def compare_roads(case: Case, how: Load, folder: str) -> list[str]:
    """The differences on this rank. A collective."""
    import os

    import accel_moe.cpu

    accel_moe.cpu.enable()
    os.environ["ACCELERATE_MIXED_PRECISION"] = how.mixed_precision
    accelerator = accelerator_for(case, tiny_model(case.family)) if how.accelerator_first else None
    model = load(case, how, folder, ours=True)
    accelerator = accelerator or accelerator_for(case, model)
    assert accelerator.mixed_precision == how.mixed_precision
    ours = follow(accelerator, model, case, how)
    plain = follow(accelerator, load(case, how, folder, ours=False), case, how)
    return differences(ours, plain)


def follow(accelerator, model, case: Case, how: Load) -> Road:
    optimizer = optimizer_of(model, case)
    count = [len(group["params"]) for group in optimizer.param_groups]
    model, optimizer = accelerator.prepare(model, optimizer)
    names = {id(p): clean(n) for n, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert [len(g) for g in groups] == count
    loaded = values(model)
    both = [(clean(n), p) for n, p in model.named_parameters(remove_duplicate=False)]
    ties = {(a, b) for a, p in both for b, q in both if p is q and a < b}
    loss = one_step(accelerator, model, optimizer, how)
    return Road(loaded, loss, values(model), groups, ties)


def values(model) -> dict[str, torch.Tensor]:
    """This rank's part of every parameter and buffer."""
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        assert not tensor.is_meta, name
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        found[clean(name)] = local.detach().clone()
    return found


def one_step(accelerator, model, optimizer, how: Load) -> float:
    (batch,) = batches(1)
    own = batch.chunk(accelerator.num_processes)[accelerator.process_index].to(accelerator.device)
    labels = own if how.head == "CausalLM" else own[:, 0] % 3
    model.train()
    loss = model(input_ids=own, labels=labels).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def differences(ours: Road, plain: Road) -> list[str]:
    wrong = []
    for moment in ("loaded", "stepped"):
        got, expected = getattr(ours, moment), getattr(plain, moment)
        if got.keys() != expected.keys():
            wrong.append(f"{moment}: {sorted(got.keys() ^ expected.keys())}")
            continue
        for name, value in expected.items():
            if got[name].dtype != value.dtype or got[name].shape != value.shape:
                wrong.append(
                    f"{moment}: {name} is {got[name].dtype} {got[name].shape}, not {value.dtype} {value.shape}"
                )
            elif not torch.equal(got[name], value):
                wrong.append(f"{moment}: {name} differs by {(got[name] - value).abs().max():.1e}")
    if all(torch.equal(a, b) for a, b in zip(plain.loaded.values(), plain.stepped.values())):
        wrong.append("the step changed nothing")
    for what in ("loss", "groups", "ties"):
        if getattr(ours, what) != getattr(plain, what):
            wrong.append(f"{what}: {getattr(ours, what)}, not {getattr(plain, what)}")
    return wrong


def compare_families(folders: dict[str, str], ep: int) -> dict[str, list[str]]:
    """The differences on this rank for each family, whose checkpoint lies in its folder. A collective."""
    import accel_moe.cpu

    accel_moe.cpu.enable()
    accelerator = accelerator_without_layers()
    found = {}
    for family, folder in folders.items():
        try:
            found[family] = compare_family(accelerator, family, folder, ep)
        except Exception:
            found[family] = [traceback.format_exc()[-1500:]]
    return found


def accelerator_without_layers():
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    return Accelerator(fsdp_plugin=plugin)


def compare_family(accelerator, family: str, folder: str, ep: int) -> list[str]:
    import accel_moe
    from accel_moe.experts import recognise
    from tests.families import over_ranks, tiny_families

    model_class = tiny_families.tiny(family).model_class
    roads = []
    for ours in (True, False):
        options = dict(dtype="float32", attn_implementation="eager")
        if ours:
            model = accel_moe.from_pretrained(folder, model_class=model_class, **options)
        else:
            model = model_class.from_pretrained(folder, **options)
        layers = recognise.find_experts(model).values()
        limited = any(recognise.refusal(m, kernel="grouped_mm", ep_degree=ep) for m in layers)
        accel_moe.prepare(model.train(), moe_ep_degree=1 if limited else ep)
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = over_ranks.layer_classes(model)
        accelerator.state.fsdp_plugin.auto_wrap_policy = "transformer_based_wrap"
        accelerator.state.fsdp_plugin.set_auto_wrap_policy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer = accelerator.prepare(model, optimizer)
        names = {id(p): clean(n) for n, p in model.named_parameters()}
        groups = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
        loaded = values(model)
        loss, _ = over_ranks.loss_and_output(model, accelerator.process_index, accelerator.num_processes)
        accelerator.backward(loss)
        optimizer.step()
        roads.append(Road(loaded, loss.item(), values(model), groups, set()))
    return differences(*roads)
