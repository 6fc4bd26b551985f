"""One family's tiny model on two gloo ranks that share each sequence and the experts, against one process.

The loss is <output, fixed random cotangent>, so that it is defined for every family, with a head or without.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.families import over_ranks, tiny_families

SEQUENCES, LENGTH = 2, 8


def with_sdpa(family: str) -> nn.Module:
    model = tiny_families.tiny(family).build()
    model.set_attn_implementation("sdpa")
    return model


def split_over_two(model: nn.Module):
    """(accelerator, model): prepared with cp 2 x ep 2, on this rank."""
    from accelerate import Accelerator
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    accel_moe.prepare(model, moe_ep_degree=2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=over_ranks.layer_classes(model),
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, parallelism_config=ParallelismConfig(cp_size=2))
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    return accelerator, model


def ids() -> torch.Tensor:
    shape = (SEQUENCES, LENGTH)
    return torch.randint(2, tiny_families.VOCAB, shape, generator=torch.Generator().manual_seed(7))


def positions() -> torch.Tensor:
    return torch.arange(LENGTH).repeat(SEQUENCES, 1)


def cotangent(model: nn.Module) -> torch.Tensor:
    """One for each number of the output, found by a forward outside of a split."""
    with torch.no_grad():
        width = tiny_families.output_of(model, ids()).shape[-1]
    return torch.randn(SEQUENCES, LENGTH, width, generator=torch.Generator().manual_seed(5))


def loss_of(model: nn.Module, ids: torch.Tensor, positions: torch.Tensor, cotangent: torch.Tensor) -> torch.Tensor:
    out = model(input_ids=ids, position_ids=positions, use_cache=False)
    found = getattr(out, "logits", None)
    return ((found if found is not None else out.last_hidden_state).float() * cotangent).sum()


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: over_ranks.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def on_rank(family: str) -> dict[str, torch.Tensor]:
    """Whole gradients by parameter name. A collective."""
    model = with_sdpa(family)
    numbers = cotangent(model)
    accelerator, model = split_over_two(model)
    buffers = [ids(), positions(), numbers]
    with accelerator.maybe_context_parallel(buffers, [1] * 3, set(buffers)):
        accelerator.backward(2 * loss_of(model, *buffers))  # the gradients are means over both ranks
    return gradients_of(model)


def on_one_process(family: str) -> dict[str, torch.Tensor]:
    model = with_sdpa(family)
    numbers = cotangent(model)
    tiny_families.use_own_loop(model)
    loss_of(model, ids(), positions(), numbers).backward()
    return gradients_of(model)


# ---- A model with images


def with_images() -> nn.Module:
    """Text and vision model in one, of which the text model holds experts and takes three planes of positions."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(tiny_families.tiny_config(Qwen3VLMoeConfig, "qwen3_vl_moe")).float()
    model.set_attn_implementation("sdpa")
    tiny_families.randomise(model, 0)
    return model.train()


def text(planes: int) -> dict[str, torch.Tensor]:
    """A batch of text; planes 0 leaves the positions to be counted."""
    batch = {"input_ids": ids(), "labels": ids()}
    return {**batch, "position_ids": positions().expand(planes, -1, -1).contiguous()} if planes else batch


def text_on_rank() -> list[dict[str, torch.Tensor]]:
    """Gradients of a batch of text, its positions counted, in three planes and in four. A collective."""
    from accel_moe import context_parallel

    accelerator, model = split_over_two(with_images())
    found = []
    for planes in (0, 3, 4):
        with context_parallel(accelerator, text(planes)) as part:
            accelerator.backward(model(**part, use_cache=False).loss)
        found.append(gradients_of(model))
        model.zero_grad()
    return found


def text_on_one_process() -> dict[str, torch.Tensor]:
    model = with_images()
    tiny_families.use_own_loop(model)
    model(**text(0), use_cache=False).loss.backward()
    return gradients_of(model)


def leaping() -> torch.Tensor:
    """[3, B, L]: four tokens of an image in the middle, of one time and two by two places."""
    image = torch.tensor([[2, 2, 2, 2], [2, 2, 3, 3], [2, 3, 2, 3]])
    row = torch.cat([torch.arange(2).expand(3, -1), image, torch.arange(4, 6).expand(3, -1)], dim=1)
    return row[:, None].repeat(1, SEQUENCES, 1)


def refused_on_rank() -> list[str]:
    """What is said of images: in a batch, as positions in planes, and given to the model by a loop of its own."""
    from accel_moe import context_parallel
    from tests.distributed.test_bad_input import message_of

    accelerator, model = split_over_two(with_images())

    def enter(**more) -> None:
        with context_parallel(accelerator, {**text(0), **more}):
            pass

    def by_hand(named: tuple[str, ...] = ("input_ids", "position_ids"), **more) -> None:
        parts = {"input_ids": ids(), "position_ids": positions()}
        buffers = list(parts.values())
        with accelerator.maybe_context_parallel(buffers, [1, 1], set(buffers)):
            model(**{name: parts[name] for name in named}, **more)

    def embedded() -> None:
        """After generation the model has an offset, by which it counts the positions of embeddings itself."""
        model.model.rope_deltas = torch.zeros(SEQUENCES, 1, dtype=torch.long)
        by_hand((), inputs_embeds=torch.zeros(SEQUENCES, LENGTH // 2, 32))

    grid = torch.tensor([[1, 4, 4]])
    return [
        message_of(lambda: enter(pixel_values=torch.zeros(16, 8), image_grid_thw=grid)),
        message_of(lambda: enter(position_ids=leaping())),
        message_of(lambda: by_hand(pixel_values=torch.zeros(16, 8), image_grid_thw=grid)),
        message_of(lambda: by_hand(("input_ids",))),
        message_of(embedded),
    ]
