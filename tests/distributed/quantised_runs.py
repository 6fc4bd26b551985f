"""LoRA on quantised experts on ranks, and the same on one process whose base was quantised and made dense again.

The oracle's base does not come from this package: each expert's matrix goes through bitsandbytes' own function and its
table (nf4), or through the formula that the docs give (int8), and stock PEFT trains on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.families import peft_runs
from tests.families.peft_runs import Run, clean, optimizer_of, steps, trained, whole
from tests.tiny import batches, tiny_model

STACKS = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True)
class Case(peft_runs.Case):
    """One run.

    Attributes:
        scheme: moe_quantize_experts.
        fsdp: under FSDP2; else without sharding: one process, or DDP.
        from_files: the base comes from accel_moe.from_pretrained.
        ram_efficient: only rank 0's values are real.
        wrong_scale: the scale of one block of one expert is changed: the test must see it.
    """

    scheme: str = "nf4"
    fsdp: bool = True
    from_files: bool = False
    ram_efficient: bool = False
    wrong_scale: bool = False
    base: str = "none"
    """The base is quantised and made dense again, by this scheme, before anything sees it."""
    adapters: bool = True
    """False: attention trains itself, without PEFT, beside frozen experts."""

    @property
    def name(self) -> str:
        fields = self.__dataclass_fields__
        changed = [f"{k}={getattr(self, k)}" for k in fields if getattr(self, k) != fields[k].default]
        return " ".join([f"w{self.world} ep{self.ep}", *changed])


def nf4(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix through bitsandbytes' NF4, and back by its table of 16 numbers.

    bitsandbytes 0.50 dequantises a matrix wrongly on the CPU if a row is no multiple of a block, and a row of values
    rightly.
    """
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(matrix.flatten(), blocksize=64, quant_type="nf4", compress_statistics=False)
    numbers = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).long()
    return (state.code[numbers].view(-1, 64) * state.absmax[:, None]).view_as(matrix)


def int8(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix through int8 with one step for 64 values, and back: round(w / s) * s, s = max|w| / 127."""
    flat = matrix.float().flatten().split(64)
    steps = [block.abs().max() / 127 for block in flat]
    return torch.cat([(block / s).round() * s for block, s in zip(flat, steps)]).view_as(matrix)


@torch.no_grad()
def dequantised(base: torch.nn.Module, scheme: str) -> torch.nn.Module:
    """`base` with every expert's matrix quantised and made dense again."""
    if scheme == "none":
        return base
    there_and_back = {"nf4": nf4, "int8": int8}[scheme]
    for name, parameter in base.named_parameters():
        if name.endswith(STACKS):
            before = parameter.clone()
            for matrix in parameter:
                matrix.copy_(there_and_back(matrix))
            assert 1e-3 < (parameter - before).abs().max() / before.abs().max() < 0.2
    return base


def on_one_process(case: Case) -> Run:
    """Stock PEFT on the dequantised base: its own loop, the whole batch."""
    model = peft_runs.build(case, lambda base: dequantised(base, case.scheme))
    return peft_runs.train_on_one_process(model)


def build(case: Case, folder: str | None):
    """The PEFT model of a case, prepared."""
    import accel_moe

    def base_of(base):
        base = dequantised(base, case.base)
        return accel_moe.from_pretrained(folder, dtype="float32", attn_implementation="eager") if folder else base

    model = peft_runs.build(case, base_of) if case.adapters else base_of(tiny_model(case.family))
    if not case.adapters:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("self_attn" in name)
    options = dict(case.options)
    return accel_moe.prepare(
        model, moe_ep_degree=case.ep, moe_kernel=case.kernel, moe_quantize_experts=case.scheme, **options
    )


def accelerator_of(case: Case, model):
    from accelerate import Accelerator

    if not case.fsdp:
        return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=case.mixed_precision)
    return peft_runs.accelerator_of(case, model, case.ram_efficient)


def prepared(case: Case, folder: str | None = None):
    """(accelerator, model, optimizer) of a case on this rank."""
    import accel_moe.cpu

    if case.fsdp:
        accel_moe.cpu.enable()
    model = build(case, folder)
    accelerator = accelerator_of(case, model)
    if case.ram_efficient and accelerator.process_index:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
    optimizer = optimizer_of(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def on_rank(case: Case, folder: str | None = None) -> Run | None:
    """The run on this rank. A Run on rank 0, None elsewhere; `folder` has the base, where it is read from files."""
    accelerator, model, optimizer = prepared(case, folder)
    if case.wrong_scale:
        spoil_a_scale(model)
    packed = [p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    before = [whole(p) for p in packed]
    losses, norms, gradients = steps(accelerator, model, optimizer, batches(peft_runs.STEPS))
    weights = {clean(n): whole(p) for n, p in model.named_parameters() if p.requires_grad}
    facts = {
        "packed": sorted({(str(p.dtype), p.dim(), p.requires_grad) for p in packed}),
        "packed_changed": [not torch.equal(whole(p), was) for p, was in zip(packed, before)],
        "trained": len(trained(model)),
        "repr": repr(model),
    }
    return Run(losses, norms, gradients, weights, facts) if accelerator.process_index == 0 else None


def refused(case: Case) -> str:
    """The error of a case at accelerator.prepare, on this rank: its experts are to be trained."""
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = build(case, None)
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj"):
            parameter.requires_grad_()
    accelerator = accelerator_of(case, model)
    try:
        accelerator.prepare(model, optimizer_of(model))
    except ValueError as error:
        return str(error)
    return ""


def saved(case: Case, folder: str) -> tuple[list[float], list[str]]:
    """One step, save_state, two steps: their losses; and the names of the packed tensors. On this rank."""
    accelerator, model, optimizer = prepared(case)
    first, *rest = batches(3)
    steps(accelerator, model, optimizer, [first])
    accelerator.save_state(folder)
    losses, _, _ = steps(accelerator, model, optimizer, rest)
    return losses, [clean(n) for n, p in model.named_parameters() if p.dtype == torch.uint8]


def resumed(case: Case, folder: str) -> list[float] | str:
    """The losses of the same two steps after load_state, or the error's text. On this rank."""
    from accel_moe.errors import CheckpointError

    accelerator, model, optimizer = prepared(case)
    before = {n: whole(p) for n, p in model.named_parameters()}
    try:
        accelerator.load_state(folder)
    except CheckpointError as error:
        assert all(torch.equal(whole(p), before[n]) for n, p in model.named_parameters())
        return str(error)
    return steps(accelerator, model, optimizer, batches(3)[1:])[0]


@torch.no_grad()
def spoil_a_scale(model) -> None:
    """Double the scale of one block of each expert: the last four bytes of a row are a scale."""
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            scale = local[:, -4:].clone().view(torch.float32)
            local[:, -4:] = (scale * 2).view(torch.uint8)


def save_base(folder) -> str:
    tiny_model().save_pretrained(folder)
    return str(folder)
