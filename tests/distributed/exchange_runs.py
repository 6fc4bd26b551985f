"""What the ranks of test_exchange.py do."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import psutil
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from accel_moe.mesh import set_timeout
from tests.distributed.parity import Case, build, clean, prepared, whole
from tests.tiny import batches


def own_batch(accelerator, step: int = 0) -> torch.Tensor:
    batch = batches(step + 1)[step]
    return batch.chunk(accelerator.num_processes)[accelerator.process_index].to(accelerator.device)


@contextlib.contextmanager
def watched_exchanges() -> Iterator[list[int]]:
    """The bytes of a row in each exchange of rows or slots, whichever dispatcher does it."""
    from accel_moe.dispatch import all_gather, all_to_all, symmetric

    widths = []

    def watched(original):
        def counted(*args):
            rows = next(arg for arg in args if isinstance(arg, torch.Tensor))
            widths.append(rows.shape[1] * rows.element_size())
            return original(*args)

        return counted

    with contextlib.ExitStack() as patches:
        shared = symmetric.SharedMemoryLink
        functions = [(all_to_all, "exchange_rows"), (all_gather, "gather_rows"), (all_gather, "sum_rows")]
        for owner, name in [*functions, (shared, "gather"), (shared, "sum")]:
            patches.enter_context(mock.patch.object(owner, name, watched(getattr(owner, name))))
        yield widths


def gradients_and_exchanges(case: Case, transformers_checkpointing: str = "") -> tuple[dict[str, torch.Tensor], int]:
    """One step: every gradient, and how often rows or slots were exchanged in forward and backward."""
    if transformers_checkpointing == "before":
        with mock.patch("tests.distributed.parity.build", checkpointed):
            accelerator, model, _ = prepared(case)
    else:
        accelerator, model, _ = prepared(case)
    if transformers_checkpointing == "after":
        model.gradient_checkpointing_enable()
    model.train()
    own = own_batch(accelerator)
    with watched_exchanges() as exchanges:
        accelerator.backward(model(input_ids=own, labels=own).loss)
    return {clean(n): whole(p.grad) for n, p in model.named_parameters()}, len(exchanges)


def gradients_with_dropout(case: Case) -> dict[str, torch.Tensor]:
    """Of one forward whose attention drops out half of its scores, the same ones for the same seed."""
    with mock.patch.dict("tests.tiny.COMMON", attention_dropout=0.5):
        accelerator, model, _ = prepared(case)
    model.train()
    own = own_batch(accelerator)
    torch.manual_seed(5 + accelerator.process_index)
    accelerator.backward(model(input_ids=own, labels=own).loss)
    return {clean(name): whole(p.grad) for name, p in model.named_parameters()}


def groups_after_each_model(case: Case, models: int) -> list[int]:
    """How many process groups there are after each of so many models was prepared in this process."""
    counts = []
    for _ in range(models):
        prepared(case)
        counts.append(len(dist.distributed_c10d._world.pg_map))
    return counts


def differentiate_twice(dispatcher: str) -> str:
    """What a second derivative through an exchange says."""
    from accel_moe.dispatch import base, make_dispatcher

    dist.init_process_group("gloo")
    exchange = make_dispatcher(dispatcher, dist.group.WORLD, 4)
    hidden = torch.randn(3, 8, requires_grad=True)
    sent = exchange.dispatch(base.RoutedTokens(hidden, torch.tensor([[0, 2], [1, 3], [0, 3]]), torch.rand(3, 2)))
    out = exchange.combine(sent.rows**2, sent)
    (gradient,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def counted_backward(case: Case, on: bool) -> dict[str, torch.Tensor]:
    """Gradients of a step of few tokens; rank 0 counts its backward's operations."""
    from torch.utils.flop_counter import FlopCounterMode

    accelerator, model, _ = prepared(case)
    own = own_batch(accelerator)[:, :8]
    loss = model(input_ids=own, labels=own).loss
    with FlopCounterMode(display=False) if on and dist.get_rank() == 0 else contextlib.nullcontext():
        accelerator.backward(loss)
    return {clean(n): whole(p.grad) for n, p in model.named_parameters()}


def checkpointed(case: Case):
    model = build(case)
    model.gradient_checkpointing_enable()
    return model


def backward_twice(case: Case) -> list[dict[str, torch.Tensor]]:
    """Gradients of one forward, taken twice: its layers are run again twice."""
    accelerator, model, _ = prepared(case)
    own = own_batch(accelerator)
    loss = model(input_ids=own, labels=own).loss
    found = []
    for again in (True, False):
        loss.backward(retain_graph=again)
        found.append({clean(n): whole(p.grad) for n, p in model.named_parameters()})
        model.zero_grad()
    return found


def crowded(case: Case, free: list[int]) -> tuple[str, bool]:
    """A forward where rank r has free[r] bytes left: (the error, whether the next one, with room, went through)."""
    from accel_moe.dispatch import memory

    accelerator, model, _ = prepared(case)
    own = own_batch(accelerator)
    text = ""
    with mock.patch.object(memory, "free_bytes", lambda device: free[dist.get_rank()]):
        try:
            model(input_ids=own)
        except torch.OutOfMemoryError as error:
            text = str(error)
    model(input_ids=own)
    return text, True


class Echo:
    """A toy dispatcher: every rank gathers every token, computes its own experts, and the sums are reduced."""

    def __init__(self, group, num_experts: int):
        self.group, self.rank = group, dist.get_rank(group)
        self.local = num_experts // dist.get_world_size(group)

    def dispatch(self, tokens, work):
        from torch.distributed.nn.functional import all_gather

        from accel_moe.dispatch.base import Dispatched

        hidden_states, top_k_index, top_k_weights = tokens
        rows = torch.cat(all_gather(hidden_states.contiguous(), group=self.group))
        index = [torch.empty_like(top_k_index) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(index, top_k_index.contiguous(), group=self.group)
        weights = torch.cat(all_gather(top_k_weights.contiguous(), group=self.group))
        index = torch.cat(index) - self.rank * self.local
        ours = (index >= 0) & (index < self.local)
        index, weights = torch.where(ours, index, self.local), torch.where(ours, weights, 0.0)
        return Dispatched(rows, index, weights, int(ours.sum()), handle=hidden_states.shape[0])

    def combine(self, rows, sent, work):
        from torch.distributed.nn.functional import all_reduce

        return all_reduce(rows, group=self.group).split(sent.handle)[self.rank]


def train_with_toy(case: Case):
    from accel_moe.dispatch import DISPATCHERS
    from tests.distributed.parity import train_on_rank

    DISPATCHERS["echo"] = Echo
    return train_on_rank(replace(case, options=(("moe_dispatcher", "echo"),)))


def live_bytes(case: Case, steps: int, after: int) -> tuple[int, int, int]:
    """Bytes of live tensors (on a GPU, of the allocator) after `after` steps and after all, with other tokens each; and
    what the process grew by meanwhile: autograd's graph can hold tensors that Python does not see."""
    accelerator, model, optimizer = prepared(case)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    found, resident = [], []
    for step in range(1, steps + 1):
        own = torch.randint(0, 64, (16, 32), generator=generator).to(accelerator.device)
        accelerator.backward(model(input_ids=own, labels=own).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (after, steps):
            resident.append(psutil.Process().memory_info().rss)
            gc.collect()
            found.append(allocated())
    return found[0], found[1], resident[1] - resident[0]


def allocated() -> int:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter):  # and no DTensor, nor a compiler's
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(storages.values())


def die_in_step(case: Case, how: str, before: str, timeout_s: float, folder: str) -> None:
    """Rank 1 stops, or is gone, before a function of the dispatcher in the second step; the others write down what they
    saw."""
    from accel_moe.dispatch import all_gather, all_to_all, host_all_gather, make_dispatcher, symmetric
    from accel_moe.mesh import build_mesh, plan_mesh

    accelerator, model, optimizer = prepared(case)
    rank = accelerator.process_index
    own = own_batch(accelerator)
    accelerator.backward(model(input_ids=own, labels=own).loss)  # what is slow the first time is done
    optimizer.step()
    optimizer.zero_grad()
    # as a job that was started with this timeout: the exchange is over groups made after it was known
    set_timeout(datetime.timedelta(seconds=timeout_s), dist.group.WORLD)
    mesh = build_mesh(plan_mesh(case.world, case.ep), accelerator.device.type)
    host_all_gather._boards.clear()
    symmetric._links.clear()
    for module in model.modules():
        if (state := getattr(module, "_accel_moe_layer", None)) is not None:
            name = state.prepared.config.moe_dispatcher
            state.dispatcher = make_dispatcher(name, mesh.get_group("ep"), state.num_experts)
    owners = (all_to_all, all_gather, all_gather.AllGatherDispatcher, symmetric.SharedMemoryLink)
    owner, name = next(o for o in owners if hasattr(o, before)), before
    send = getattr(owner, name)

    def last(*arguments, **options):
        if rank == 1:
            with open(os.path.join(folder, "lost"), "w") as file:
                file.write(str(time.time()))
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return send(*arguments, **options)

    dist.barrier()
    setattr(owner, name, last)
    try:
        accelerator.backward(model(input_ids=own, labels=own).loss)
    except BaseException as error:
        with open(os.path.join(folder, f"seen-{rank}"), "w") as file:
            file.write(f"{time.time()} {type(error).__name__}: {error}")
        raise


def layers_prefetched(case: Case) -> list[list[str]]:
    """For each decoder layer, the units whose weights its forward asks for."""
    _, model, _ = prepared(case)
    unit = {id(m._get_fsdp_state()): name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    states = [layer._get_fsdp_state() for layer in model.model.layers]
    return [[unit[id(ahead)] for ahead in state._states_to_forward_prefetch] for state in states]


def looks_at_positions(case: Case, steps: int) -> int:
    """How often masking looked, in so many forwards of one shape, at the positions that the model had counted."""
    import transformers.masking_utils as masking

    looks, original = [], masking.find_packed_sequence_indices

    def look(position_ids):
        looks.append(position_ids.shape)
        return original(position_ids)

    masking.find_packed_sequence_indices = look
    accelerator, model, _ = prepared(case)
    for _ in range(steps):
        model(input_ids=own_batch(accelerator))
    return len(looks)
