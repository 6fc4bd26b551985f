"""What context parallelism cannot split: models, batches and calls that torch's ring attention has no right answer for.

The ring is causal over the whole sequence. It has no mask and no window, and each rank sees its own positions only.
Every check says the number or name that was found, the one that was expected, and the mend. No rank talks to another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask")
"""The tensors [B, L] of a batch that are split."""
BY_LENGTH = ("longrope", "dynamic")
"""The rope types whose frequencies depend on the largest position of a forward."""
BLOCK = 64
"""A rank's tokens that sdpa's efficient kernel can take: its sums come in blocks of 32, and a rank has two chunks."""
OF_MEDIA = re.compile("pixel|image|video|audio|input_features")
"""In the names of what a model gets of images, video and sound."""
COUNTED, CHECKED = "_accel_moe_counted", "_accel_moe_checked"
"""Marks on tensors: positions that were counted here, and input_ids of a batch that passed check_batch()."""
OFF = "set parallelism_config_cp_size: 1"


# ---- Models


def why_no_ring(model: nn.Module) -> str | None:
    """Why `model` cannot be trained with context parallelism, whatever attention it is loaded with; None if it can."""
    config: Any = _text_config(model)
    name = type(model).__name__
    if not getattr(model, "_supports_sdpa", True):
        return f"{name} has no sdpa attention, and torch's ring takes the place of sdpa only. So {OFF}."
    if kinds := _not_full(config):
        return (
            f"{name} has layers of {', '.join(kinds)}, and torch's ring has full causal attention only. Use a model "
            f"with full attention, or {OFF}."
        )
    if not any(n.endswith("self_attn") and not isinstance(m, nn.ModuleList) for n, m in model.named_modules()):
        return (
            f"{name} has no attention module named self_attn. By that name accelerate finds attention, to leave out "
            f"its mask. So {OFF}."
        )
    if found := sorted(_rope_types(config) & set(BY_LENGTH)):
        return (
            f"{name} has rope_type {found[0]!r}, whose frequencies depend on the largest position: each rank would "
            f"take them from its own part. Set a rope_type such as 'yarn' or 'default' in rope_parameters, or {OFF}."
        )
    if dropout := getattr(config, "attention_dropout", 0.0):
        return (
            f"{name} has attention_dropout={dropout}, and torch's ring draws the same numbers for all blocks: its "
            f"gradients would be wrong. Set config.attention_dropout = 0.0, or {OFF}."
        )
    return None


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _not_full(config: Any) -> list[str]:
    """The kinds of layers without full attention, by accelerate's rule: one sliding_window is all layers' where
    layer_types are not told."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return sorted(set(kinds) - {"full_attention"})
    return ["sliding_attention"] if getattr(config, "sliding_window", None) else []


def why_no_length(model: nn.Module, length: int, size: int) -> str | None:
    """Why sequences of `length` tokens, a multiple of 2 x `size`, have no kernel in bf16; None if they have."""
    if (heads := _unlike_heads(model)) and length // size % BLOCK:
        return f"{length} tokens are no multiple of {BLOCK} x cp_size = {BLOCK * size}, which heads of {heads} need"
    return None


def _unlike_heads(model: nn.Module) -> str:
    """The head sizes of queries and values, as "192 and 128", where latent attention has them differ; else ""."""
    config = _text_config(model)
    sizes = [getattr(config, f"{name}_head_dim", None) or 0 for name in ("qk_rope", "qk_nope", "v")]
    query, value = sum(sizes[:2]), sizes[2]
    return f"{query} and {value}" if 0 not in sizes and query != value else ""


def conditions(model: nn.Module, size: int, mixed_precision: str = "bf16") -> list[str]:
    """What a run with `model` must keep to, and what neither its config nor accelerate's tells."""
    heads = _unlike_heads(model)
    found = [
        "load the model with attn_implementation='sdpa'",
        f"give sequences of a multiple of {BLOCK * size if heads else 2 * size} tokens"
        + (f" (heads of {heads})" if heads else ""),
        "no packed rows, and padding on the right",
    ]
    if takes_media(model):
        found.append("batches of text alone, without images, video or sound")
    if mixed_precision == "no":
        found.append(
            f"load the weights in bf16: in fp32 a GPU needs a multiple of {BLOCK * size} tokens, and as many key as "
            "query heads"
        )
    return found


def takes_media(model: nn.Module) -> bool:
    """Whether `model` has a text model in it, beside one for images, video or sound."""
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def _rope_types(config: Any) -> set[str]:
    """Of one set of rope_parameters, or of one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return {kind for one in sets if (kind := one.get("rope_type", one.get("type")))}


def check_model(model: nn.Module, size: int) -> None:
    """Raises ValueError: attention of `model`, as it was loaded, would not run over cp ranks."""
    if (why := why_no_ring(model)) is not None:
        raise ValueError(f"parallelism_config_cp_size={size}: {why}")
    found = getattr(_text_config(model), "_attn_implementation", "sdpa")
    if found != "sdpa":
        raise ValueError(
            f"parallelism_config_cp_size={size} needs attn_implementation='sdpa', and {type(model).__name__} has "
            f"{found!r}: torch's ring attention takes the place of sdpa only, and each rank would attend to its own "
            f"part. Load the model with attn_implementation='sdpa', or {OFF}."
        )


# ---- Batches


def check_names(batch: Any, who: str, settings: tuple[type, ...] = ()) -> None:
    """Raises ValueError: `batch`, which `who` got, is no mapping, or has names beside ARGUMENTS, except for values of
    the types `settings`; or it has images, video or sound."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"{who} got a batch of type {type(batch).__name__}, and splits a mapping with {', '.join(ARGUMENTS)} only. "
            f"Give such a batch, or {OFF}."
        )
    named = {name for name, value in batch.items() if not isinstance(value, settings)}
    check_media(named, f"{who} got a batch with")
    if unknown := sorted(named - set(ARGUMENTS)):
        raise ValueError(
            f"{who} got a batch with {', '.join(unknown)}, and splits only {', '.join(ARGUMENTS)}. Leave "
            f"the others out of the batch, or {OFF}."
        )


def check_media(names: Iterable[str], found_in: str) -> None:
    """Raises ValueError: `names` hold those of images, video or sound. `found_in` are the words before them."""
    if media := sorted(name for name in names if OF_MEDIA.search(name)):
        raise ValueError(
            f"{found_in} {', '.join(media)}. Images, video and sound are not split over the ranks of cp, and the "
            f"positions of their tokens are counted over whole sequences. Train on batches of text alone, or {OFF}."
        )


def text_positions(positions: Tensor, size: int) -> Tensor:
    """[B, L] int64 of positions [3 or 4, B, L], one plane for each axis of an image or video (mrope); others stay.

    Of text all planes are the same. Asks the GPU.

    Raises:
        ValueError: the planes differ.
    """
    if positions.dim() != 3:
        return positions
    if bool((positions != positions[:1]).any()):
        raise ValueError(
            f"position_ids {list(positions.shape)} differ from plane to plane, as those of images and video do. "
            f"cp_size={size} splits batches of text alone, whose planes are the same. Leave such rows out, or {OFF}."
        )
    return positions[0].contiguous()


def check_batch(batch: Mapping[str, Any], size: int) -> None:
    """Raises ValueError: ring attention cannot take these sequences. Asks the GPU if there are positions or a mask.

    Positions of padding may be any. A batch that passed bears a mark, and check_buffers() leaves it alone."""
    if size == 1:
        return
    check_length(batch["input_ids"].shape[1], size)
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if mask is not None and (mask.dim() != 2 or bool((mask.long().diff(dim=-1) > 0).any())):
        raise ValueError(
            f"The attention_mask {list(mask.shape)} has padding before a token, or more than one number for a token. "
            f"Ring attention over cp_size={size} is causal over the whole sequence, without a mask. Pad on the right "
            f"(padding_side='right'), or {OFF}."
        )
    if positions is not None and not hasattr(positions, COUNTED):
        leaps = positions.diff(dim=-1) != 1
        if bool((leaps if mask is None else leaps & (mask[:, 1:] != 0)).any()):
            refuse_packed(size)
    setattr(batch["input_ids"], CHECKED, True)


def check_length(length: int, size: int) -> None:
    if length % (2 * size) or not length:
        raise ValueError(
            f"Sequences of {length} tokens cannot be split over cp_size={size}: the length must be a multiple of 2 x "
            f"cp_size = {2 * size}. Pad or cut them (pad_to_multiple_of={2 * size} in the collator)."
        )


def refuse_packed(size: int) -> None:
    """Raises ValueError: rows hold several sequences."""
    raise ValueError(
        f"position_ids start again, or leap, inside a sequence, as those of packed sequences do. Ring attention over "
        f"cp_size={size} would attend from one sequence to the other. Give one text per row (without packing or "
        f"padding_free), or {OFF}."
    )


def check_buffers(buffers: Sequence[Tensor], size: int) -> None:
    """The same for tensors without a name: one that starts at 0 and mostly counts on by 1 holds positions.

    Asks the GPU, unless check_batch() saw the batch."""
    whole = [b for b in buffers if b.dim() == 2 and not b.is_floating_point() and b.shape[1] > 1]
    if not whole or any(hasattr(buffer, CHECKED) for buffer in buffers):
        return
    steps = [buffer.diff(dim=1) == 1 for buffer in whole]
    packed = [(buffer[:, 0] == 0).all() & (on.double().mean() > 0.5) & ~on.all() for buffer, on in zip(whole, steps)]
    if bool(torch.stack(packed).any()):
        refuse_packed(size)


# ---- Calls


def check_call(query: Tensor, value: Tensor, dropout_p: float, on_gpu: bool) -> None:
    """Raises ValueError: the ring's kernels cannot take this call of sdpa, with a rank's tokens [B, heads, T, D]."""
    if dropout_p:
        raise ValueError(
            f"Attention got dropout_p={dropout_p} inside of context_parallel(): torch's ring draws the same numbers "
            f"for all blocks, and its gradients would be wrong. Set the attention's dropout to 0, or {OFF}."
        )
    tokens, differ = query.shape[2], query.shape[-1] != value.shape[-1]
    if on_gpu and tokens % BLOCK and (query.dtype == torch.float32 or differ):
        because = f"heads of {query.shape[-1]} and {value.shape[-1]}" if differ else "fp32"
        raise ValueError(
            f"A rank has {tokens} tokens of each sequence, and needs a multiple of {BLOCK}: attention with {because} "
            f"takes sdpa's efficient kernel, whose sums come in blocks. Pad sequences to a multiple of {BLOCK} x "
            f"cp_size{'' if differ else ', or train in bf16'}."
        )
