"""`python -m accel_moe.consolidate CHECKPOINT... OUT BASE_MODEL`: a training checkpoint becomes a model for the Hub.

The result has the base model's keys, shapes, dtypes and file layout, its config and tokenizer, and the checkpoint's
weights. Tensors that training untied are in it, too. Any other change of the model is refused by name. Nothing that a
checkpoint says is run, and code of the base's own only with --trust-remote-code.

CHECKPOINT may be of an adapter run, or a folder that PEFT saved: the result is then the base with the adapter merged
into it.

One process, no GPU, no process group; memory is bounded by the largest group of tensors, not by the model.

    python -m accel_moe.consolidate out/checkpoint-500 out/hub Qwen/Qwen3-30B-A3B
    python -m accel_moe.consolidate node0/checkpoint-500 node1/checkpoint-500 out/hub base/     (node-local disks)
    python -m accel_moe.consolidate out/adapter out/hub Qwen/Qwen3-30B-A3B                              (merge LoRA)
    python -m accel_moe.consolidate --adapter out/checkpoint-500 out/adapter          (LoRA alone, in PEFT's form)
    python -m accel_moe.consolidate --inspect out/checkpoint-500

Exit codes: 0 done; 1 the checkpoint or the base cannot be used, or the result is not what it must be; 2 wrong usage;
130 interrupted (run the same command again: it goes on where it stopped).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accel_moe.errors import CheckpointError, HubFormatError, first_few

_OF_A_MODEL = ("inspect", "workers", "dtype", "max_shard_size", "keep_extra", "verify", "trust_remote_code")
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accel_moe.consolidate",
        description="Turn a sharded training checkpoint into Hub-format safetensors.",
        usage="%(prog)s [options] CHECKPOINT [CHECKPOINT ...] OUT BASE_MODEL\n"
        "       %(prog)s --adapter CHECKPOINT [CHECKPOINT ...] OUT\n       %(prog)s --inspect CHECKPOINT ...",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="the checkpoint folder (with node-local disks: the folder of each node), then the folder to "
        "write, then the base model: the folder or Hub id that training started from",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that convert in parallel (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="the dtype of the weights (default: each tensor's dtype in the base)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="such as 5GB (default: the same files as the base)")
    parser.add_argument(
        "--keep-extra",
        action="store_true",
        help="copy base tensors that training did not have (MTP layers) from the base, unchanged",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="before OUT appears, load the result with transformers and compare it with the checkpoint",
    )
    parser.add_argument(
        "--sizes-only", action="store_true", help="check the checkpoint's files by size, not by checksum"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the base's own code, for an architecture that transformers lacks (without it, nobody is asked and "
        "nothing of it is run)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapter of a LoRA run alone, as PEFT's adapter_config.json and adapter_model.safetensors: "
        "CHECKPOINT ... OUT, without a base",
    )
    parser.add_argument("--inspect", action="store_true", help="print what a checkpoint holds, and read no tensor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Usage errors exit with 2, as argparse does."""
    parser = build_parser()
    args = parser.parse_args(argv)
    expected = 1 if args.inspect else 2 if args.adapter else 3
    if len(args.paths) < expected:
        words = "CHECKPOINT... OUT" if args.adapter else "CHECKPOINT... OUT BASE_MODEL"
        parser.error(f"expected {words}, found {len(args.paths)} path(s): {' '.join(args.paths)}")
    if args.adapter and (found := [name for name in _OF_A_MODEL if getattr(args, name) != parser.get_default(name)]):
        parser.error(f"--{found[0].replace('_', '-')} is for a whole model, and --adapter writes an adapter as it is")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    try:
        return (inspect if args.inspect else extract_adapter if args.adapter else consolidate)(args)
    except (CheckpointError, HubFormatError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. Make room or mend the folder, then run the same command again.", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted. Run the same command again: it goes on where it stopped.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def consolidate(args: argparse.Namespace) -> int:
    """Refuses what it can at once, then checks the checkpoint, then writes."""
    import torch

    from accel_moe.checkpoint import opened
    from accel_moe.checkpoint.export_out import check_room, check_writable, place_of
    from accel_moe.checkpoint.export_plan import plan_export
    from accel_moe.checkpoint.merged import merged_onto, refuse_nan
    from accel_moe.weights.base_model import open_base
    from accel_moe.weights.safetensors import parse_size

    *folders, out, base_name = args.paths
    place = place_of(Path(out))
    check_writable(place)
    checkpoint = opened.open_checkpoint(folders)
    base = open_base(base_name, trust_remote_code=args.trust_remote_code)
    source = merged_onto(checkpoint, base)
    plan = plan_export(
        source,
        base,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_shard_bytes=parse_size(args.max_shard_size) if args.max_shard_size else None,
        keep_extra=args.keep_extra,
    )
    check_room(place, plan.size_bytes)
    _say_what_is_special(plan)
    _check(checkpoint, checksums=not args.sizes_only)
    refuse_nan(source)
    _write(plan, Path(out), args)
    print(f"{out}: {len(plan.outputs)} tensors, {plan.size_bytes / 1e9:.2f} GB in {len(plan.files())} file(s)")
    if left := plan.base.left_behind():
        print(f"not copied from {base_name}: {first_few(left, separator=', ', shown=20)}")
    return 0


def extract_adapter(args: argparse.Namespace) -> int:
    """Writes the adapter of a LoRA run's checkpoint as PEFT does."""
    from accel_moe.checkpoint import opened
    from accel_moe.checkpoint.export_adapter import export_adapter
    from accel_moe.checkpoint.export_out import check_writable, place_of

    *folders, out = args.paths
    check_writable(place_of(Path(out)))
    checkpoint = opened.open_checkpoint(folders)
    _check(checkpoint, checksums=not args.sizes_only)
    count, size_bytes = export_adapter(checkpoint, Path(out))
    print(f"{out}: {count} tensors, {size_bytes / 1e9:.2f} GB")
    return 0


def _check(checkpoint: Any, checksums: bool) -> None:
    """Raises CheckpointError with everything that is wrong."""
    from accel_moe.checkpoint import opened

    total = 0
    if checkpoint.manifest is not None:
        total = sum(opened.model_files(checkpoint).values())
    else:
        print(
            f"warning: {checkpoint.name} has no manifest ({checkpoint.written_by} wrote it): nothing vouches for its "
            "bytes.",
            file=sys.stderr,
        )
    with _progress("checking", total) as bar:
        problems = opened.check_checkpoint(checkpoint, checksums=checksums, on_bytes=bar.update)
    if problems:
        raise CheckpointError(
            f"{checkpoint.name} is damaged: {first_few(problems)}. Use another checkpoint, or restore the files."
        )


def _write(plan: Any, out: Path, args: argparse.Namespace) -> None:
    """Raises CheckpointError when, with --verify, the result is not the checkpoint."""
    from accel_moe.checkpoint.export_verify import verify_export
    from accel_moe.checkpoint.export_write import write_export

    def verify(folder: Path) -> None:
        if not args.verify:
            return
        with _progress("verifying", plan.size_bytes) as bar:
            problems = verify_export(plan, folder, on_bytes=bar.update)
        if problems:
            raise CheckpointError(
                f"the result in {folder} is not the checkpoint: {first_few(problems)}. Please report this."
            )

    with _progress("consolidating", plan.size_bytes) as bar:
        write_export(
            plan,
            out,
            workers=args.workers,
            on_bytes=bar.update,
            on_resume=bar.update,
            before_commit=verify,
            verified_by="sizes" if args.sizes_only else "checksums",
        )


def _say_what_is_special(plan: Any) -> None:
    if plan.untied:
        added = [key for key in plan.outputs if key not in plan.base.tensors]
        print(
            f"note: {first_few(added, separator=', ')} was trained apart from the tensor that the base ties it to: it "
            "is written, and config.json says tie_word_embeddings: false.",
            file=sys.stderr,
        )
    if plan.extras and not plan.keep_extra:
        print(
            f"note: {len(plan.extras)} base tensors have no counterpart in training and are left out: "
            f"{first_few(plan.extras, separator=', ')}. --keep-extra copies them from the base.",
            file=sys.stderr,
        )


def inspect(args: argparse.Namespace) -> int:
    """Prints what a checkpoint holds: step, layout, sizes, largest tensors, what can be said of its state."""
    from accel_moe.checkpoint import opened

    checkpoint = opened.open_checkpoint(args.paths)
    problems = opened.check_checkpoint(checkpoint, checksums=False)
    print("\n".join(opened.describe(checkpoint)))
    print("state        " + (f"damaged: {first_few(problems)}" if problems else _state(checkpoint)))
    return EXIT_FAILED if problems else 0


def _state(checkpoint: Any) -> str:
    if checkpoint.manifest is None:
        return "files present, chunks whole; no manifest, so nothing vouches for the bytes"
    return "committed; files present with the right sizes, chunks whole (checksums are verified when it is used)"


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Any]:
    """A bar with bytes, speed and time left; nothing if the output is no terminal, or there is nothing to do."""
    from tqdm import tqdm

    with tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=None if total_bytes else True) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
