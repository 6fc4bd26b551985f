"""A LoRA run on ranks and the same on one process with stock PEFT on the model's own loop."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

from tests.tiny import batches, decoder_layer_names, tiny_model

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
STEPS = 3


@dataclass(frozen=True)
class Case:
    """One LoRA run.

    Attributes:
        modules, parameters: LoraConfig's target_modules and target_parameters.
        kernel: moe_kernel.
        mixed_precision: accelerate's; the model is then made in bf16.
    """

    world: int = 2
    ep: int = 2
    family: str = "qwen3_moe"
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    parameters: tuple[str, ...] = ()
    r: int = 4
    alpha: int = 12
    rslora: bool = False
    kernel: str = "grouped_mm"
    interpret: bool = False
    checkpointing: bool = False
    compiled: str = ""
    """The backend that gets each decoder layer as one graph."""
    mixed_precision: str = "no"
    prepared_first: bool = False
    """accel_moe.prepare on the bare model, before PEFT wraps it."""
    dp_replicate: int = 1
    adapters: int = 1
    """How many are active, and trained, together."""
    options: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        changed = [
            f"{k}={getattr(self, k)}" for k in self.__dataclass_fields__ if getattr(self, k) != getattr(Case(), k)
        ]
        return " ".join([f"w{self.world} ep{self.ep}", *changed])


@dataclass(frozen=True)
class Run:
    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    facts: dict[str, object]


def build(case: Case, on_base=lambda base: base):
    """A PEFT model whose lora_A and lora_B are both random: with B zero, as PEFT starts, A has no gradient."""
    from peft import LoraConfig, get_peft_model

    base = base_of(case.family)
    base.name_or_path = f"tiny-{case.family}"
    if case.mixed_precision == "bf16":
        base = base.bfloat16()
    config = LoraConfig(
        r=case.r,
        lora_alpha=case.alpha,
        use_rslora=case.rslora,
        target_modules=list(case.modules) or [],
        target_parameters=list(case.parameters) or None,
        lora_dropout=0.0,
    )
    model = get_peft_model(on_base(base), config)
    names = ["default", *(f"adapter {i}" for i in range(1, case.adapters))]
    for name in names[1:]:
        model.add_adapter(name, replace(config, lora_alpha=3 * case.alpha))
    if case.adapters > 1:
        model.base_model.set_adapter(names)
    randomise_adapter(model)
    return model


def base_of(family: str) -> nn.Module:
    from tests.families import tiny_families

    return tiny_model(family) if family == "qwen3_moe" else tiny_families.tiny(family).build()


@torch.no_grad()
def randomise_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def on_one_process(case: Case) -> Run:
    """Stock PEFT, the family's own loop, the whole batch."""
    return train_on_one_process(build(case))


def train_on_one_process(model: nn.Module) -> Run:
    model.base_model.model.set_experts_implementation("eager")
    optimizer = optimizer_of(model)
    losses, norms, gradients = [], [], {}
    for batch in batches(STEPS):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained(model), 1e6)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return Run(losses, norms, gradients, weights, {})


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def accelerator_of(case: Case, model, ram_efficient: bool = False):
    """FSDP2 around the decoder layers of a model, or of the base of a PEFT model."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin, TorchDynamoPlugin

    base = model.base_model.model if hasattr(model, "peft_config") else model
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(base),
        activation_checkpointing=case.checkpointing,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=ram_efficient,
    )
    mesh = None
    if case.dp_replicate > 1:
        mesh = ParallelismConfig(dp_replicate_size=case.dp_replicate, dp_shard_size=case.world // case.dp_replicate)
    dynamo = None
    if case.compiled:
        dynamo = TorchDynamoPlugin(backend=case.compiled, use_regional_compilation=True, fullgraph=True)
    return Accelerator(
        fsdp_plugin=plugin, mixed_precision=case.mixed_precision, parallelism_config=mesh, dynamo_plugin=dynamo
    )


def steps(accelerator, model, optimizer, some) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, norms, and the first step's gradients."""
    rank, world = accelerator.process_index, accelerator.num_processes
    losses, norms, gradients = [], [], {}
    for batch in some:
        own = batch.chunk(world)[rank]
        loss = model(input_ids=own, labels=own).loss
        accelerator.backward(loss)
        if not gradients:
            gradients = {clean(n): whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norms.append(float(whole(accelerator.clip_grad_norm_(model.parameters(), 1e6))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return losses, norms, gradients


def on_rank(case: Case, folder: str | None = None) -> Run | None:
    """The run on this rank under FSDP2. A Run on rank 0, None elsewhere; the adapter is saved in `folder`."""
    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()

    def prepare(model):
        return accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel=case.kernel, **dict(case.options))

    model = build(case, prepare) if case.prepared_first else prepare(build(case))
    accelerator = accelerator_of(case, model)
    optimizer = optimizer_of(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    losses, norms, gradients = steps(accelerator, model, optimizer, batches(STEPS))
    weights = {clean(n): whole(p) for n, p in model.named_parameters() if p.requires_grad}
    if folder is not None:
        save_adapter(accelerator, model, folder)
    evaluate = functools.partial(mean_loss, accelerator, model)
    with model.disable_adapter():
        without = evaluate()
    separate = evaluate()
    model.merge_adapter()
    merged = evaluate()
    model.unmerge_adapter()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    facts = {
        "frozen_with_gradient": [n for n, p in model.named_parameters() if n in frozen and p.grad is not None],
        "frozen_dtypes": sorted({str(p.dtype) for n, p in model.named_parameters() if not p.requires_grad}),
        "trained_dtypes": sorted({str(p.dtype) for n, p in model.named_parameters() if p.requires_grad}),
        "optimizer_state": len(optimizer.state),
        "loss_without_adapter": without,
        "losses_around_merging": [separate, merged, evaluate()],
        "trained": len(trained(model)),
    }
    return Run(losses, norms, gradients, weights, facts) if accelerator.is_main_process else None


@torch.no_grad()
def mean_loss(accelerator, model: nn.Module) -> float:
    """Of the first batch, over all ranks. A collective."""
    own = batches(1)[0].chunk(accelerator.num_processes)[accelerator.process_index]
    return accelerator.reduce(model(input_ids=own, labels=own).loss, "mean").item()


def wrapped_after_sharding() -> float:
    """The loss of a model that PEFT wraps only after accelerator.prepare has sharded its experts."""
    from peft import LoraConfig, get_peft_model

    import accel_moe
    import accel_moe.cpu
    from tests.distributed.parity import Case as Plain
    from tests.distributed.parity import accelerator_for

    accel_moe.cpu.enable()
    model = accel_moe.prepare(tiny_model(), moe_ep_degree=2)
    accelerator = accelerator_for(Plain(2, 2), model)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    model = get_peft_model(model, LoraConfig(r=4, target_modules=[], target_parameters=list(EXPERTS)))
    randomise_adapter(model)
    return mean_loss(accelerator, model)


def save_adapter(accelerator, model: nn.Module, folder: str) -> None:
    """As a PEFT script under FSDP2 does: gather the whole adapter, rank 0 writes it."""
    state = {clean(n): whole(p) for n, p in model.named_parameters() if "lora_" in n}
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state, is_main_process=True)
    accelerator.wait_for_everyone()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def clean(name: str) -> str:
    plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
    return plain.removeprefix("module.")  # DDP's


def differences(run: Run, oracle: Run, relative: float = 1e-4) -> list[str]:
    """Every loss, norm, gradient and weight that is not the oracle's."""
    wrong = [f"only one side has {n}" for n in sorted(run.gradients.keys() ^ oracle.gradients.keys())]
    for what in ("gradients", "weights"):
        ours, right = getattr(run, what), getattr(oracle, what)
        for name in sorted(ours.keys() & right.keys()):
            gap, largest = (ours[name] - right[name]).abs().max().item(), right[name].abs().max().item()
            if not gap <= relative * largest + 1e-9:
                wrong.append(f"{what[:-1]} of {name}: off by {gap:.1e}, largest {largest:.1e}")
    for what in ("losses", "norms"):
        for ours, right in zip(getattr(run, what), getattr(oracle, what)):
            if not abs(ours - right) <= relative * abs(right):
                wrong.append(f"{what}: {ours} for {right}")
    return wrong
