"""Context parallelism: cp ranks share each sequence, and each of them computes on a part of its tokens.

accelerate splits a batch's sequences and replaces the attention by torch's ring attention, inside of
`Accelerator.maybe_context_parallel`. Experts see tokens and no sequences, so they need nothing of it. Around it stands:

    before the split    ring_limits.py: models, lengths, padding and packed sequences that the ring cannot take
    the split           maybe_context_parallel: cp ranks must hold the same batch; on the CPU another attention
    the model           positions are given, not counted from 0 on each rank; one load-balancing loss for all parts
    the loss            context_parallel: labels are shifted before the split, and every token counts alike
    Trainer             trainer_parts.py

torch gives rank r of cp the chunks r and 2 cp - 1 - r of 2 cp equal chunks, so that causal attention is equal work for
all. Parts are therefore no prefix and no contiguous run of a sequence.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel_moe import cpu_attention, patching, whereabouts
from accel_moe.patching import ACCELERATE, TRANSFORMERS, Patch, patch
from accel_moe.ring_limits import (
    COUNTED,
    check_batch,
    check_buffers,
    check_call,
    check_length,
    check_media,
    check_names,
    takes_media,
    text_positions,
)

IGNORED = -100
"""The label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Split:
    """How sequences are split at the moment: over the ranks of `group`, of which this one is number `rank`."""

    group: dist.ProcessGroup
    size: int
    rank: int


_running: Split | None = None
"""Not by thread: backward runs checkpointed forwards again in autograd's threads."""
_sdpa: Callable[..., Tensor] | None = None
"""The attention of the context that is open now."""
OUTSIDE = (
    "Backward runs outside of context_parallel(), where attention is each rank's own. Call accelerator.backward(loss) "
    "inside of the with block."
)
FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""The kernels of sdpa that torch's ring has a form of."""
_compared: weakref.WeakSet[Any] = weakref.WeakSet()
"""The Accelerators whose cp ranks were seen to hold the same batch."""


def running() -> Split | None:
    """The split of the context that is open now; None outside of one."""
    return _running


def cp_size(accelerator: Any) -> int:
    parallelism = accelerator.parallelism_config
    return 1 if parallelism is None else parallelism.cp_size or 1


# ---- The loop of a script


@contextmanager
def context_parallel(
    accelerator: Any, batch: Mapping[str, Tensor], num_items_in_batch: Tensor | float | None = None
) -> Iterator[dict[str, Tensor | float]]:
    """Within it, each rank holds its part of `batch`'s sequences, as arguments for a causal language model.

        with accel_moe.context_parallel(accelerator, batch) as part:
            loss = model(**part, use_cache=False).loss
            accelerator.backward(loss)

    Backward belongs inside: the ring of the attention's backward is torch's only there. The mean of the loss over all
    ranks, and all gradients, are then those of one process on the whole batch: every label counts alike. Without
    context parallelism (cp_size 1) nothing is split, and the loss is normalised in the same way. A collective.

    Args:
        batch: input_ids and labels [B, L] int64, unshifted; or shift_labels in their place. L is a multiple of 2 x cp.
            Padding on the right is allowed (attention_mask [B, L]). position_ids [B, L] are counted if not given; of
            a model with images, [3, B, L] for batches of text.
        num_items_in_batch: what the sum of this rank's losses is divided by. None is the labels of this batch on all
            ranks, divided by the number of ranks. To weight every token alike over accumulated batches too, give the
            labels of all of them on all ranks, divided by the ranks and by the accumulation steps.

    Raises:
        ValueError: the batch cannot be split; on every rank that shares it, before any collective.
        RuntimeError: backward runs outside.
    """
    size = cp_size(accelerator)
    with refusing(accelerator):
        part = _arguments(batch, accelerator.device, size)
        check_batch(part, size)
    buffers = list(part.values())
    split = accelerator.maybe_context_parallel(buffers, [1] * len(buffers), set(buffers)) if size > 1 else nullcontext()
    with split:
        if num_items_in_batch is None:
            count = (part["shift_labels"] != IGNORED).sum().float()  # and not double, which the loss would become
            num_items_in_batch = accelerator.reduce(count, "mean")
        # the model asks for labels to return a loss; its loss uses shift_labels
        yield {**part, "labels": part["shift_labels"], "num_items_in_batch": num_items_in_batch}  # pyright: ignore


def _arguments(batch: Mapping[str, Tensor], device: torch.device, size: int) -> dict[str, Tensor]:
    """Copies, for the split is in place: labels are shifted, positions counted, a mask without zeros is dropped."""
    check_names(batch, "context_parallel()")
    if "input_ids" not in batch or not {"labels", "shift_labels"} & set(batch):
        raise ValueError(f"context_parallel() needs input_ids and labels, and got {', '.join(sorted(batch))}.")
    part = {name: tensor.to(device, copy=True) for name, tensor in batch.items() if tensor is not None}
    labels = part.pop("labels", None)
    if labels is not None and "shift_labels" not in part:
        part["shift_labels"] = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()
    ids = part["input_ids"]
    if size > 1 and "position_ids" in part:
        part["position_ids"] = text_positions(part["position_ids"], size)
    elif size > 1:  # else the model counts them itself
        part["position_ids"] = torch.arange(ids.shape[1], device=device).repeat(ids.shape[0], 1)
        setattr(part["position_ids"], COUNTED, True)
    if "attention_mask" in part and bool((part["attention_mask"] == 1).all()):
        del part["attention_mask"]
    return part


@contextmanager
def refusing(accelerator: Any) -> Iterator[None]:
    """A ValueError within it also says which ranks do not see it, and is noted for them: they wait in a collective."""
    try:
        yield
    except ValueError as error:
        whereabouts.note_refusal(error)
        size, ranks = cp_size(accelerator), dist.get_world_size() if dist.is_initialized() else 1
        if 1 < size < ranks:
            error.args = (
                f"{error} The {size} ranks that share this batch stop here. The other {ranks - size} wait for them, "
                "until the launcher ends this process and then them, or until the process group's timeout. Do not go "
                "on with the next batch: the ranks would be at different steps.",
            )
        raise


def check_positions_given(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, on every rank: within a split, a model was left to count its tokens' positions."""
    if _running is not None and arguments.get("position_ids") is None:
        raise ValueError(
            f"A model got no position_ids under cp_size={_running.size}: it would number each rank's tokens from 0. "
            "Use accel_moe.context_parallel(), or split position_ids with the other buffers and give them to the model."
        )


# ---- The split


@patch(
    "accelerate.Accelerator.maybe_context_parallel",
    why="torch splits sequences of a wrong length unevenly and then waits for ever, or fails inside the ring; loaders "
    "that accelerate did not prepare give cp ranks different batches; and torch has no ring attention for the CPU.",
    tested=ACCELERATE,
)
@contextmanager
def maybe_context_parallel(original, self, buffers=None, buffer_seq_dims=None, no_restore_buffers=None):
    if (size := cp_size(self)) == 1:
        with original(self, buffers, buffer_seq_dims, no_restore_buffers):
            yield
        return
    with refusing(self):
        whole = list(buffers or ())
        _check_lengths(whole, buffer_seq_dims or (), size)
        check_buffers(whole, size)
        mesh = self.torch_device_mesh["cp"]
        split = Split(mesh.get_group(), size, mesh.get_local_rank())
        _compare(self, whole[0], split)
    with original(self, buffers, buffer_seq_dims, no_restore_buffers), _attention_of(split, self.device):
        with _as_running(split):
            yield


def _check_lengths(buffers: Sequence[Tensor], dims: Sequence[int], size: int) -> None:
    lengths = {buffer.shape[dim] for buffer, dim in zip(buffers, dims)}
    if len(lengths) != 1:
        raise ValueError(
            f"maybe_context_parallel() got buffers whose sequences have {sorted(lengths) or 'no'} tokens, and needs "
            "one length. Give input_ids, shift_labels and position_ids [B, L]."
        )
    check_length(lengths.pop(), size)


@contextmanager
def _attention_of(split: Split, device: torch.device) -> Iterator[None]:
    """Within torch's context: the ring runs with fused kernels only, and under torch.compile it is one function.

    Without that, sdpa takes its plain form where no fused kernel fits (fp32 with grouped heads, say): products of
    DTensors, causal in the order of the parts instead of the sequence's, and wrong without a word.
    """
    global _sdpa
    outside, before = functional.scaled_dot_product_attention, _sdpa
    on_cpu = device.type == "cpu"
    _sdpa = functools.partial(cpu_attention.attention, split.group) if on_cpu else outside
    functional.scaled_dot_product_attention = _attention
    try:
        with nullcontext() if on_cpu else sdpa_kernel(FUSED):
            yield
    finally:
        functional.scaled_dot_product_attention, _sdpa = outside, before  # torch looks for its own, and takes it back


@torch.compiler.disable
def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """One object for all steps: torch makes a function for each context, and torch.compile would compile anew."""
    assert _sdpa is not None
    check_call(query, value, options.get("dropout_p", 0.0), query.is_cuda)
    out = _sdpa(query, key, value, *args, **options)
    if out.requires_grad:
        out.register_hook(_still_split)
    return out


def _still_split(gradient: Tensor) -> None:
    """Outside, torch has taken its ring away: backward would be that of each rank's own part, without a word."""
    if _running is None:
        raise RuntimeError(OUTSIDE)


@contextmanager
def _as_running(split: Split) -> Iterator[None]:
    global _running
    before, _running = _running, split
    try:
        yield
    finally:
        _running = before


def _compare(accelerator: Any, buffer: Tensor, split: Split) -> None:
    """Once for an Accelerator: the ranks of cp hold the same batch. A collective over cp."""
    if accelerator in _compared:
        return
    flat = buffer.flatten().to(accelerator.device, torch.double)
    weights = torch.arange(1, len(flat) + 1, device=flat.device, dtype=torch.double)
    own = torch.stack([flat @ weights, weights[-1]])
    sums = own.new_empty(split.size, 2)
    dist.all_gather(list(sums.unbind()), own, group=split.group)
    if bool((sums != sums[0]).any()):
        raise ValueError(
            f"The {split.size} ranks of cp hold different batches, and are to share one. Pass the DataLoader through "
            "accelerator.prepare(), or seed a loader of your own by process_index // cp_size. For an IterableDataset "
            "set dispatch_batches=False (DataLoaderConfiguration, or accelerator_config in TrainingArguments): "
            "accelerate's dispatcher gives each rank another batch."
        )
    _compared.add(accelerator)


# ---- The model


@patch(
    "accelerate.accelerator._attach_context_parallel_hooks",
    why="Its hooks drop the attention mask of every forward, also where no sequence is split: generate() with padding "
    "on the left, and packed or padded rows in evaluation, then attend to all before them, without a word.",
    tested=ACCELERATE,
)
def _attach_context_parallel_hooks(original, model):
    original(model)
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            hooks = module._forward_pre_hooks
            first = next(iter(hooks))  # accelerate's, which goes before all others
            hooks[first] = functools.partial(_while_split, hooks[first])


def _while_split(hook: Callable[..., Any], module: nn.Module, args: Any, named: dict[str, Any]) -> Any:
    return hook(module, args, named) if _running is not None else None


def watch(model: nn.Module) -> None:
    """From now on, a checkpointed attention that backward runs again outside of the split raises, and so do images
    within it; and the load-balancing loss is one for whole sequences, also that of TRL's SFT, which takes Mixtral's for
    every family."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_pre_hook(_same_attention_again)
        if isinstance(module, PreTrainedModel) and takes_media(module):
            module.register_forward_pre_hook(_text_alone, with_kwargs=True)
    targets = {
        f"{kind.__module__}.load_balancing_loss_func"
        for module in model.modules()
        for kind in type(module).__mro__
        if hasattr(sys.modules.get(kind.__module__), "load_balancing_loss_func")
    }
    targets.add("transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func")
    for target in targets:
        BALANCING.setdefault(target, Patch(target, load_balancing_loss_func, BALANCING_WHY, TRANSFORMERS))
    patching.install(BALANCING[target] for target in sorted(targets))


def _text_alone(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Such a model counts positions from its part's tokens, and may give them to its text model, which then cannot
    tell. A loop that splits its own buffers comes here with images, too."""
    if _running is None or torch.compiler.is_compiling():
        return
    tensors = [name for name, value in named.items() if value is not None and not isinstance(value, bool)]
    check_media(tensors, f"{type(module).__name__} got, within a split over cp_size={_running.size},")
    if len(args) < 3:
        check_positions_given(named)


def _same_attention_again(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if torch._C._current_graph_task_id() == -1:  # a forward, and not one that backward runs again
        module._accel_moe_split = _running is not None  # pyright: ignore[reportArgumentType]
    elif _running is None and getattr(module, "_accel_moe_split", False):
        raise RuntimeError(OUTSIDE)


BALANCING: dict[str, Patch] = {}
"""By target, of the families that were prepared under context parallelism: each has a function of its own."""
BALANCING_WHY = (
    "The load-balancing loss is a product of two means over tokens; of each rank's part, its mean is another loss than "
    "that of the whole sequences."
)


def load_balancing_loss_func(original, gate_logits, num_experts=None, top_k=2, attention_mask=None):
    if _running is None or not isinstance(gate_logits, tuple):
        return original(gate_logits, num_experts, top_k, attention_mask)
    return balancing_loss(gate_logits, num_experts, top_k, attention_mask, _running)


def balancing_loss(
    gate_logits: Sequence[Tensor], experts: int, top_k: int, attention_mask: Tensor | None, split: Split
) -> Tensor:
    """E x the sum over experts of (share of slots) x (mean probability), over the tokens of the whole sequences.

    The shares have no gradient and are summed over cp; the probabilities are this rank's. The mean of the results over
    cp, as FSDP takes it of their gradients, is therefore the loss of the whole sequences. A collective over cp.

    Args:
        gate_logits: of each layer [T, E].
        attention_mask: [B, S] of this rank's T tokens; those with 0 are left out.
    """
    device = gate_logits[0].device
    slots, probabilities = torch.zeros(experts + 1, device=device), torch.zeros(experts, device=device)
    weight = torch.ones(len(gate_logits[0]), device=device)
    if attention_mask is not None:
        weight = attention_mask.reshape(-1).to(device, torch.float32)
    for logits in gate_logits:
        routed = logits.to(device).softmax(dim=-1)
        chosen = routed.topk(top_k, dim=-1).indices
        slots = slots.scatter_add(0, chosen.flatten(), weight.repeat_interleave(top_k))
        slots[experts] += weight.sum()
        probabilities = probabilities + weight @ routed.float()
    dist.all_reduce(slots, group=split.group)
    tokens = slots[experts]
    return experts * (slots[:experts] / tokens) @ (split.size * probabilities / tokens)
