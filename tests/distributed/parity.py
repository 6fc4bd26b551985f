"""The parity table's machinery: one training run of a case on ranks, the same on one process, and the comparison.

The oracle is the model's own eager forward, one process, the whole batch, plain AdamW. A run is described by a
`Case` (picklable), done by `train_on_rank` on every rank, and judged by `compare`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import accel_moe
from tests.tiny import all_to_first_experts, batches, decoder_layer_names, tiny_model

STEPS = 3
LEARNING_RATE = 1e-3
MAX_NORM = 1.0


@dataclass(frozen=True)
class Case:
    """One row of the parity table."""

    world: int
    ep: int
    dp_replicate: int = 1
    family: str = "qwen3_moe"
    num_experts: int = 8
    layers: int = 2
    kernel: str = "auto"
    accumulation: int = 1
    tie: bool = False
    checkpointing: bool = False
    nothing_received: bool = False
    ram_efficient: bool | str = False
    """Of the ranks but the first, the values are NaN, or the parameters on "meta"."""
    two_groups: bool = False
    compiled: str = ""
    """By accelerate's dynamo plugin: the decoder layers ("regional", or each as one graph, "fullgraph" and
    "inductor"), or the "whole" model."""
    lengths: tuple[int, ...] = (6,) * STEPS
    """Tokens of a sequence, step by step. torch.compile takes sizes for constants until they change."""
    mesh: bool = True
    """Give accelerate a parallelism_config; without one it builds no mesh."""
    ours: bool = True
    """False: accelerate FSDP2 alone, the yardstick for the weights."""
    interpret: bool = False
    sabotage: str = ""
    cp: int = 1
    """Ranks that share a sequence. Above 1 attention is sdpa, and the oracle's, too."""
    masked: bool = False
    """Leave out the labels of some tokens: no two ranks then have the same number of labels."""
    reshard: bool = True
    """False: FSDP keeps what it gathered in forward until backward has used it."""
    offload: bool = False
    """Weights, gradients and the optimizer's state in host memory."""
    aux: float = 0.0
    """The load-balancing loss's factor."""
    options: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        plain = Case(self.world, self.ep)
        extras = [f"{k}={getattr(self, k)}" for k in self.__dataclass_fields__ if getattr(self, k) != getattr(plain, k)]
        return " ".join([f"w{self.world} ep{self.ep}", *extras])


@dataclass
class Run:
    """What one run produced. Gradients and weights are whole tensors by parameter name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]


def build(case: Case):
    more = dict(router_aux_loss_coef=case.aux, output_router_logits=True) if case.aux else {}
    if case.cp > 1 and torch.cuda.is_available():
        more["num_key_value_heads"] = 4  # no fused kernel of sdpa takes grouped heads in fp32
    model = tiny_model(case.family, num_experts=case.num_experts, tie=case.tie, num_hidden_layers=case.layers, **more)
    if case.cp > 1:
        model.set_attn_implementation("sdpa")
    if case.nothing_received:
        all_to_first_experts(model)
    return model


def optimizer_of(model, case: Case):
    if not case.two_groups:
        return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    experts = [p for n, p in model.named_parameters() if ".experts." in n]
    others = [p for n, p in model.named_parameters() if ".experts." not in n]
    groups = [{"params": experts, "lr": 2 * LEARNING_RATE, "weight_decay": 0.0}, {"params": others}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def batches_of(case: Case) -> list[torch.Tensor]:
    return [batches(STEPS, length=length)[step] for step, length in enumerate(case.lengths)]


def labels_of(case: Case, batch: torch.Tensor) -> torch.Tensor:
    """[N, L]: the tokens, or with `masked` only those behind the row's first third, and of every other row all."""
    labels = batch.clone()
    if case.masked:
        labels[::2, : batch.shape[1] // 3] = -100
    return labels


def train_on_one_process(case: Case) -> Run:
    """The oracle."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(case).to(device)
    model.set_experts_implementation("eager")
    start = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    optimizer = optimizer_of(model, case)
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches_of(case)):
        loss = model(input_ids=batch.to(device), labels=labels_of(case, batch).to(device)).loss
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.cpu().clone() for n, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {n: p.detach().cpu().clone() for n, p in model.named_parameters()}
    return Run(losses, norms, gradients, weights, start)


def accelerator_for(case: Case, model):
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, TorchDynamoPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=decoder_layer_names(model),
        activation_checkpointing=case.checkpointing,
        reshard_after_forward=case.reshard,
        cpu_offload=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if case.offload else OffloadPolicy(),
        cpu_ram_efficient_loading=case.ram_efficient,
        state_dict_type="SHARDED_STATE_DICT",
    )
    dynamo = None
    if case.compiled:
        dynamo = TorchDynamoPlugin(
            backend="inductor" if case.compiled == "inductor" else "aot_eager",
            use_regional_compilation=case.compiled != "whole",
            fullgraph=case.compiled in ("fullgraph", "inductor"),
        )
    mesh = None
    if case.mesh and case.world > 1:
        shard = case.world // case.dp_replicate // case.cp
        mesh = ParallelismConfig(dp_replicate_size=case.dp_replicate, dp_shard_size=shard, cp_size=case.cp)
    both = torch.cuda.is_available() and case.offload  # as `accelerate launch` does it for fsdp_offload_params
    accelerator = Accelerator(
        fsdp_plugin=plugin,
        parallelism_config=mesh,
        dynamo_plugin=dynamo,
        gradient_accumulation_steps=case.accumulation,
        kwargs_handlers=[InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if both else [],
    )
    torch.backends.cuda.matmul.allow_tf32 = False  # accelerate allows it where it compiles; the oracle is in fp32
    return accelerator


def prepared(case: Case):
    """(accelerator, model, optimizer) of a case, on this rank, after accelerator.prepare."""
    import accel_moe.cpu

    accel_moe.cpu.enable()
    model = build(case)
    if case.ours:
        accel_moe.prepare(model, moe_ep_degree=case.ep, moe_kernel=case.kernel, **dict(case.options))
    else:
        auto = "scattermoe" if torch.cuda.is_available() else "grouped_mm"  # what `auto` takes for us
        model.set_experts_implementation(auto if case.kernel == "auto" else case.kernel)
    accelerator = accelerator_for(case, model)
    if case.ram_efficient and accelerator.process_index:
        for module in model.modules():  # only rank 0's values are real
            for name, parameter in module.named_parameters(recurse=False):
                if case.ram_efficient == "meta":
                    module.register_parameter(name, torch.nn.Parameter(parameter.detach().to("meta")))
                else:
                    parameter.data.fill_(float("nan"))
    optimizer = optimizer_of(model, case)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()


def clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def train_on_rank(case: Case) -> Run | None:
    """STEPS steps of `case`. A Run on rank 0, None elsewhere."""
    accelerator, model, optimizer = prepared(case)
    if case.sabotage:
        globals()[f"sabotage_{case.sabotage}"]()
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    start = {clean(n): whole(p) for n, p in model.named_parameters()}
    losses, norms, gradients = [], [], {}
    for step, batch in enumerate(batches_of(case)):
        labels = labels_of(case, batch)
        items = (labels[:, 1:] != -100).sum().item() / world / case.accumulation
        groups = world // case.cp
        own, own_labels = (whole.chunk(groups)[rank // case.cp].to(device) for whole in (batch, labels))
        total = 0.0
        for part, part_labels in zip(own.chunk(case.accumulation), own_labels.chunk(case.accumulation)):
            with accelerator.accumulate(model):
                total += backward(case, accelerator, model, part, part_labels, items) / case.accumulation
                if accelerator.sync_gradients:
                    if step == 0:
                        gradients = {clean(n): whole(p.grad) for n, p in model.named_parameters()}
                        check_replicas_bit_equal(case, model, lambda p: p.grad)
                    norm = accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                    norms.append(float(whole(norm)))
                optimizer.step()
                optimizer.zero_grad()
        losses.append(accelerator.reduce(torch.tensor(total, device=device), "mean").item())
    if case.compiled:
        check_compiled(case)
    weights = {clean(n): whole(p) for n, p in model.named_parameters()}
    check_replicas_bit_equal(case, model, lambda p: p)
    same_on_every_rank = [None] * world
    if world > 1:
        torch.distributed.all_gather_object(same_on_every_rank, norms)
        assert all(n == norms for n in same_on_every_rank), same_on_every_rank
    return Run(losses, norms, gradients, weights, start) if rank == 0 else None


def backward(case: Case, accelerator, model, ids: torch.Tensor, labels: torch.Tensor, items: float) -> float:
    """Forward and backward of this rank's sequences [n, L], or of its part of them; its loss."""
    if case.cp == 1:
        loss = model(input_ids=ids, labels=labels).loss
        accelerator.backward(loss)
        return loss.item()
    batch, given = {"input_ids": ids, "labels": labels}, items if case.accumulation > 1 else None
    with accel_moe.context_parallel(accelerator, batch, given) as part:
        loss = model(**part).loss
        accelerator.backward(loss)
    return loss.item()


def check_compiled(case: Case) -> None:
    """Layers with experts were compiled: around the experts, or whole with one op for them."""
    counters = torch._dynamo.utils.counters
    broken = any("exchange tokens" in reason for reason in counters["graph_break"])
    if case.compiled in ("fullgraph", "inductor"):
        assert not counters["graph_break"] and counters["stats"]["unique_graphs"], counters
    elif case.ep < case.world:
        assert broken, "no layer with experts was compiled"


def check_replicas_bit_equal(case: Case, model, tensor_of) -> None:
    """Ranks that hold the same shard (HSDP's replicas) must hold the same bits: anything else drifts apart."""
    if case.dp_replicate == 1:
        return
    rank, size = torch.distributed.get_rank(), case.world // case.dp_replicate
    ours = {n: tensor_of(p).to_local().cpu() for n, p in model.named_parameters()}
    everyone = [None] * case.world
    torch.distributed.all_gather_object(everyone, ours)
    twin = everyone[(rank + size) % case.world]
    for name, tensor in ours.items():
        assert torch.equal(tensor, twin[name]), f"{name} differs between ranks {rank} and {(rank + size) % case.world}"


def differences(run: Run, oracle: Run) -> list[str]:
    """Every way in which a run leaves the tolerances; [] if none. See the test module for the reasons."""
    wrong = []
    assert run.gradients.keys() == oracle.gradients.keys(), run.gradients.keys() ^ oracle.gradients.keys()
    for name, expected in oracle.gradients.items():
        gap = (run.gradients[name] - expected).abs().max().item()
        largest = expected.abs().max().item()
        if not (gap <= 1e-6 and gap <= 1e-4 * largest + 1e-12):
            wrong.append(f"gradient of {name}: off by {gap:.2e}, largest {largest:.2e}")
    for step, (loss, expected) in enumerate(zip(run.losses, oracle.losses)):
        if not abs(loss - expected) <= 1e-5:
            wrong.append(f"loss of step {step}: {loss} for {expected}")
    if not abs(run.norms[0] - oracle.norms[0]) <= 1e-5 * oracle.norms[0]:
        wrong.append(f"norm: {run.norms[0]} for {oracle.norms[0]}")
    return wrong


def weight_distance(run: Run, oracle: Run) -> float:
    """How far the weights are from the oracle's after the last step: the root of the summed squares."""
    return sum((run.weights[n] - w).double().square().sum().item() for n, w in oracle.weights.items()) ** 0.5


def sabotage_no_ep_scale() -> None:
    """The predecessor's fault: expert gradients ep times too large."""
    from accel_moe.experts import work

    def unscaled(ctx, *gradients):
        return None, *gradients

    work._ScaleWeightGradients.backward = staticmethod(unscaled)


def sabotage_router_gradient() -> None:
    """Rank 1 loses the routing weights' gradient."""
    from accel_moe.dispatch import all_gather, all_to_all

    for function in (all_to_all._SendOut, all_gather._Gathered):

        def dropped(ctx, *gradients, original=function.backward):
            hidden, weights, *rest = original(ctx, *gradients)
            return (hidden, weights * (torch.distributed.get_rank() != 1), *rest)

        function.backward = staticmethod(dropped)
