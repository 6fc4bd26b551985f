"""What routers compute beside the routing, over ranks and on one process: losses, logits, biases, noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.tiny import batches, decoder_layer_names, tiny_model

WORLD = 2


@dataclass(frozen=True)
class Case:
    """One model and loss.

    Attributes:
        options: config fields beside the tiny ones.
        aux, z: factors of the load-balancing loss (transformers') and of the z-loss (computed here from router_logits).
        bias: give DeepSeek's correction bias values that change which experts are chosen.
    """

    family: str
    options: tuple[tuple[str, object], ...] = ()
    aux: float = 0.0
    z: float = 0.0
    bias: bool = False
    ep: int = 2
    mixed_precision: str = "no"
    ours: bool = True

    @property
    def name(self) -> str:
        plain = Case(self.family)
        extras = [f"{k}={getattr(self, k)}" for k in self.__dataclass_fields__ if getattr(self, k) != getattr(plain, k)]
        return " ".join([self.family, *extras])


@dataclass(frozen=True)
class Run:
    """Per rank: loss, router logits per layer, and the dtypes of routing weights that experts functions saw."""

    losses: list[float]
    router_logits: list[torch.Tensor]
    weight_dtypes: list[str]
    gradients: dict[str, torch.Tensor]
    biases: dict[str, torch.Tensor]


def build(case: Case) -> nn.Module:
    options = dict(case.options)
    if case.aux:
        options["router_aux_loss_coef"] = case.aux
    model = tiny_model(case.family, **options)
    if case.bias:
        generator = torch.Generator().manual_seed(4)
        for tensor in biases_of(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
    if case.mixed_precision == "bf16":
        model = model.bfloat16()
    return model.train()


def biases_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [*model.named_buffers(), *model.named_parameters()]
    return {n.replace("_checkpoint_wrapped_module.", ""): t.data for n, t in named if n.endswith("correction_bias")}


def loss_of(model: nn.Module, case: Case, rank: int):
    """(loss of this rank's part, router logits of all layers [layers x tokens, experts] or None)."""
    torch.manual_seed(100 + rank)  # jitter
    own = batches(1)[0].chunk(WORLD)[rank]
    wanted = bool(case.aux or case.z)
    out = model(input_ids=own, labels=own, **({"output_router_logits": True} if wanted else {}))
    if not wanted:
        return out.loss, None
    logits = torch.cat([layer.float() for layer in out.router_logits if layer is not None])
    return out.loss + case.z * torch.logsumexp(logits, dim=-1).square().mean(), logits


def on_rank(case: Case) -> Run | None:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu
    from accel_moe.experts import layer as experts_layer

    accel_moe.cpu.enable()
    model = build(case)
    if case.ours:
        accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel="grouped_mm")
    else:
        model.set_experts_implementation("grouped_mm")
    seen: set[str] = set()
    original = experts_layer.experts_function

    def watching(kernel, module):
        function = original(kernel, module)

        def watched(view, rows, index, weights):
            seen.add(str(weights.dtype))
            return function(view, rows, index, weights)

        return watched

    experts_layer.experts_function = watching
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(model),
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision=case.mixed_precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    loss, logits = loss_of(model, case, accelerator.process_index)
    accelerator.backward(loss)
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    everyone: list = [None] * WORLD
    torch.distributed.all_gather_object(everyone, (loss.item(), None if logits is None else logits.detach()))
    losses, router_logits = [e[0] for e in everyone], [e[1] for e in everyone]
    biases = {n: whole(t) for n, t in biases_of(model).items()}
    run = Run(losses, router_logits, sorted(seen), gradients, biases)
    return run if accelerator.is_main_process else None


def on_one_process(case: Case) -> Run:
    """The oracle: each rank's part alone through the family's own loop (an aux loss is not linear in the batch)."""
    model = build(case)
    model.set_experts_implementation("eager")
    losses, router_logits = [], []
    for rank in range(WORLD):
        loss, logits = loss_of(model, case, rank)
        (loss / WORLD).backward()
        losses.append(loss.item())
        router_logits.append(None if logits is None else logits.detach())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return Run(losses, router_logits, [], gradients, biases_of(model))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()
