"""LoRA for the training scripts: the flags, the adapter's config, and the adapter around the model."""

from __future__ import annotations

import argparse
import logging
from importlib.util import find_spec
from typing import Any

from mistakes import at_least
from torch import nn

logger = logging.getLogger("accel_moe")


def add_lora_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", type=at_least(1), metavar="RANK", help="train a LoRA adapter of this rank (attention)"
    )
    parser.add_argument("--lora-experts", action="store_true", help="adapt the experts, too (with --lora)")
    parser.add_argument(
        "--quantize", metavar="FORMAT", help="store frozen experts so (nf4), by the option moe_quantize_experts"
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `accel_moe.prepare` that the flags ask for."""
    return {"moe_quantize_experts": args.quantize} if args.quantize else {}


def with_adapter(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """With --lora a PEFT model, whose adapter alone trains; the base's weights may still wait in the files.

    Raises ValueError for --lora-experts without --lora.
    """
    config = adapter_config(model, args)
    if config is None:
        return model
    from peft import get_peft_model

    adapted = get_peft_model(model, config)
    trained, total = adapted.get_nb_trainable_parameters()
    logger.info("LoRA of rank %d: %d of %d parameters train", args.lora, trained, total)
    return adapted


def adapter_config(model: nn.Module, args: argparse.Namespace) -> Any:
    """The `peft.LoraConfig` that the flags ask for; None without --lora.

    Raises ValueError for --lora-experts without --lora, and for --lora without PEFT.
    """
    if not args.lora:
        if args.lora_experts:
            raise ValueError("--lora-experts without --lora, expected a rank: --lora 16 --lora-experts")
        return None
    if find_spec("peft") is None:
        raise ValueError("--lora needs PEFT, which is not installed. Install it: python -m pip install peft")
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora,
        lora_alpha=2 * args.lora,
        target_modules=attention_projections(model),
        target_parameters=experts_parameters(model) if args.lora_experts else None,
    )


def attention_projections(model: nn.Module) -> list[str]:
    """The names, without the layer's, of the linear layers inside attention: ["k_proj", "o_proj", ...]."""
    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in linear if "attn" in name or "attention" in name})


def experts_parameters(model: nn.Module) -> list[str]:
    """The stacks of expert matrices: ["experts.down_proj", "experts.gate_up_proj"]."""
    stacks = (name.split(".")[-2:] for name, parameter in model.named_parameters() if parameter.dim() == 3)
    return sorted({f"{owner}.{name}" for owner, name in stacks if "experts" in owner})
