"""python -m accel_moe.plan MODEL --gpus N: the meshes that a model can be trained on, their memory and their step time.

    python -m accel_moe.plan Qwen/Qwen3-30B-A3B --gpus 8
    python -m accel_moe.plan my_model --gpus 8 --activation-checkpointing --write ep8.yaml
    python -m accel_moe.plan my_model --gpus 8 --cp 4 --seq-len 131072 --sequences 1
    python -m accel_moe.plan my_model --gpus 1 --lora 16 --lora-experts --quantize nf4

MODEL is a folder or a Hub id with a config.json. No GPU is needed, and no weight is read.

Exit codes: 0 a mesh fits; 1 none fits, or the model cannot be planned for; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel_moe.errors import HubFormatError

_TOKENS, _LENGTH = 8192, 4096


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accel_moe.plan",
        usage="%(prog)s MODEL --gpus N [flags; --help lists them]",
        description=__doc__.splitlines()[0],
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder or a Hub id with a config.json")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs of the whole job")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    add("--memory", type=float, default=80, metavar="GIB", help="of each GPU (default: %(default)s)")
    add("--tokens", type=int, metavar="T", help=f"a GPU and step: sequences x their length (default: {_TOKENS})")
    add(
        "--sequences",
        type=int,
        metavar="N",
        help="a GPU and step (with --cp: of the GPUs that share them), instead of --tokens",
    )
    add("--cp", type=int, default=1, metavar="N", help="GPUs that share each sequence (default: %(default)s)")
    add("--seq-len", type=int, default=_LENGTH, metavar="L", help="tokens of a sequence (default: %(default)s)")
    add("--lora", type=int, default=0, metavar="RANK", help="train a LoRA adapter of this rank on the attention")
    add("--lora-experts", action="store_true", help="adapt the experts, too (with --lora)")
    add("--fp32-base", action="store_true", help="the frozen base is loaded in fp32, not in bf16 (with --lora)")
    add("--quantize", choices=("nf4", "int8"), default="none", help="hold frozen experts packed (with --lora)")
    add("--activation-checkpointing", action="store_true", help="keep only each layer's input for backward")
    add("--exchange-again", action="store_true", help="moe_keep_exchanged: false (with --activation-checkpointing)")
    add("--bf16-weights", action="store_true", help="weights, gradients and moments in bf16, without an fp32 copy")
    add("--recompute-up", action="store_true", help="the option moe_recompute_up_projection")
    add("--compile", action="store_true", help="decoder layers under torch.compile")
    add("--write", type=Path, metavar="YAML", help="write the accelerate config of the recommended mesh; a new file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Usage errors exit with 2, as argparse does."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if wrong := _wrong_usage(args):
        parser.error(wrong)
    try:
        return _plan(args, ["python -m accel_moe.plan", *(sys.argv[1:] if argv is None else argv)])
    except (HubFormatError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        known = error.filename is not None
        print(
            f"error: {error.filename} cannot be written: {error.strerror}." if known else f"error: {error}",
            file=sys.stderr,
        )
    return 1


def _wrong_usage(args: argparse.Namespace) -> str | None:
    """The first flag that cannot be honoured, in words; sets `sequences`."""
    for name in ("gpus", "gpus_per_node", "memory", "tokens", "sequences", "seq_len", "cp"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            return f"--{name.replace('_', '-')} {value}: expected more than 0"
    if args.lora < 0:
        return f"--lora {args.lora}: expected a rank above 0"
    if not args.lora:
        needs = {"--lora-experts": args.lora_experts, "--fp32-base": args.fp32_base}
        needs["--quantize"] = args.quantize != "none"
        if found := [flag for flag, is_on in needs.items() if is_on]:
            return f"{found[0]} is for a frozen base: give --lora RANK, too"
    elif args.bf16_weights:
        return "--bf16-weights is for weights that train; the base under --lora is in bf16 unless --fp32-base is given"
    if args.quantize != "none" and args.fp32_base:
        return "--fp32-base and --quantize exclude each other: give one"
    if args.exchange_again and not args.activation_checkpointing:
        return "--exchange-again is about the forward that runs again: give --activation-checkpointing, too"
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        return f"--gpus {args.gpus} is not a whole number of nodes of {args.gpus_per_node}: change --gpus-per-node"
    if args.gpus % args.cp:
        return f"--cp {args.cp} does not divide --gpus {args.gpus}: change one of them"
    if args.cp > 1 and args.seq_len % (2 * args.cp):
        return f"--seq-len {args.seq_len} is not a multiple of 2 x --cp = {2 * args.cp}: ring attention cannot split it"
    return _wrong_tokens(args)


def _wrong_tokens(args: argparse.Namespace) -> str | None:
    part = args.seq_len // args.cp
    named = f"--seq-len {args.seq_len}" if args.cp == 1 else f"--seq-len {args.seq_len} / --cp {args.cp}"
    if args.sequences is None:
        tokens = args.tokens or max(_TOKENS // part, 1) * part
        if tokens % part:
            return f"--tokens {tokens} is not a multiple of {named}: change one of them"
        args.sequences = tokens // part
    elif args.tokens is not None and args.tokens != args.sequences * part:
        return f"--tokens {args.tokens} is not --sequences {args.sequences} x {named}: leave one out"
    return None


def _plan(args: argparse.Namespace, command: list[str]) -> int:
    """Open, count, lay out, report; write if asked."""
    from accel_moe.planning import meshes, report, shapes, trace

    if args.write is not None and args.write.exists():
        raise ValueError(f"{args.write} exists already. Give the name of a new file, or remove it.")
    model = shapes.open_model(args.model)
    conditions = _conditions(model, args) if args.cp > 1 else []
    legal, limited = meshes.legal_meshes(model, args.gpus, args.cp)
    sizes = shapes.shapes_of(model)
    traced = trace.saved_outside_experts(model, sizes, args.sequences, args.seq_len // args.cp, args.lora)
    run = _training(args, traced.saved_bytes)
    plans = meshes.plans_of(sizes, run, legal)
    print(report.report(args.model, sizes, run, traced, plans, limited, conditions))
    best = meshes.recommended(plans)
    if args.write is not None:
        if best is None:
            raise ValueError(f"{args.write} is not written: no mesh fits.")
        args.write.write_text(report.accelerate_yaml(sizes, run, best, " ".join(command)), encoding="utf-8")
        print(f"\n{args.write}: the accelerate config of {report.mesh_name(best)}")
    return 0 if best is not None else 1


def _conditions(model: Any, args: argparse.Namespace) -> list[str]:
    """What training with --cp needs beside the mesh.

    Raises:
        ValueError: it would refuse the model, or the length.
    """
    from accel_moe import ring_limits

    if (why := ring_limits.why_no_ring(model)) is not None:
        raise ValueError(f"--cp {args.cp}: {why}")
    if (why := ring_limits.why_no_length(model, args.seq_len, args.cp)) is not None:
        raise ValueError(f"--cp {args.cp} --seq-len {args.seq_len}: {why}. Change --seq-len.")
    return ring_limits.conditions(model, args.cp)


def _training(args: argparse.Namespace, saved_bytes: int) -> Any:
    from accel_moe.planning.memory import BF16, FP32, GIB, Training

    return Training(
        saved_bytes=saved_bytes,
        sequences=args.sequences,
        length=args.seq_len,
        cp=args.cp,
        memory_bytes=args.memory * GIB,
        gpus_per_node=args.gpus_per_node,
        lora=args.lora,
        lora_experts=args.lora_experts,
        quantize=args.quantize,
        base_bytes=FP32 if args.fp32_base else BF16,
        checkpointing=args.activation_checkpointing,
        bf16_weights=args.bf16_weights,
        recompute_up=args.recompute_up,
        compiled=args.compile,
        keep_exchanged=not args.exchange_again,
    )


if __name__ == "__main__":
    # the process is ours; transformers' warnings about configs would stand above the table
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    sys.exit(main())
