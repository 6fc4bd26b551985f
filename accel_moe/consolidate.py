"""`python -m accel_moe.consolidate CHECKPOINT... OUT BASE_MODEL`: a training checkpoint becomes a model for
the Hub.

The result has the base model's keys, shapes, dtypes and file layout, its config and tokenizer, and the
checkpoint's weights; what training untied in the model is in it, too, and any other change is refused by name.
Nothing that a checkpoint says is run, and code of the base's own only with --trust-remote-code.

One process, no GPU, no process group; memory is bounded by the largest group of tensors, not by the model.

    python -m accel_moe.consolidate out/checkpoint-500 out/hub Qwen/Qwen3-30B-A3B
    python -m accel_moe.consolidate node0/checkpoint-500 node1/checkpoint-500 out/hub base/     (node-local disks)
    python -m accel_moe.consolidate --inspect out/checkpoint-500

Exit codes: 0 done; 1 the checkpoint or the base cannot be used, or the result is not what it must be; 2
wrong usage; 130 interrupted (run the same command again: it goes on where it stopped).
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m accel_moe.consolidate",
        description="Turn a sharded training checkpoint into Hub-format safetensors.",
        usage="%(prog)s [options] CHECKPOINT [CHECKPOINT ...] OUT BASE_MODEL\n       %(prog)s --inspect CHECKPOINT ...",
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
    parser.add_argument("--inspect", action="store_true", help="print what a checkpoint holds, and read no tensor")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Usage errors exit with 2, as argparse does."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.inspect and len(args.paths) < 3:
        parser.error(f"expected CHECKPOINT... OUT BASE_MODEL, found {len(args.paths)} path(s): {' '.join(args.paths)}")
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: expected 1 or more")
    from accel_moe.errors import CheckpointError, HubFormatError

    try:
        return inspect(args) if args.inspect else consolidate(args)
    except (CheckpointError, HubFormatError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}. Make room or mend the folder, then run the same command again.", file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "interrupted. Run the same command again: it goes on where it stopped; what was written before the "
            "checksums were verified is written again.",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    return EXIT_FAILED


def consolidate(args: argparse.Namespace) -> int:
    from accel_moe.checkpoint import export
    from accel_moe.checkpoint.export_out import check_room, check_writable, place_of
    from accel_moe.checkpoint.export_plan import plan_export
    from accel_moe.checkpoint.export_verify import verify_export
    from accel_moe.checkpoint.export_write import write_export
    from accel_moe.errors import CheckpointError
    from accel_moe.weights.base_model import open_base
    from accel_moe.weights.safetensors import parse_size

    *folders, out, base_name = args.paths
    import torch

    place = place_of(Path(out))
    check_writable(place)
    checkpoint = export.open_checkpoint(folders)
    with _checking(checkpoint, checksums=not args.sizes_only) as check:  # while the base's classes are imported
        plan = plan_export(
            checkpoint,
            open_base(base_name, trust_remote_code=args.trust_remote_code),
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            max_shard_bytes=parse_size(args.max_shard_size) if args.max_shard_size else None,
            keep_extra=args.keep_extra,
        )
        check_room(place, plan.size_bytes)
        _say_what_is_special(plan)

        def verify(folder: Path) -> None:
            with _progress("verifying", plan.size_bytes) as bar:
                problems = verify_export(plan, folder, on_bytes=bar.update)
            if problems:
                raise CheckpointError(
                    f"the result in {folder} is not the checkpoint: {_list(problems)}. Please report this."
                )

        if args.workers > 1:
            check.result()  # they are forked, and a check that goes on meanwhile has threads
        with _progress("consolidating", plan.size_bytes) as bar:
            try:
                write_export(
                    plan,
                    Path(out),
                    workers=args.workers,
                    on_bytes=bar.update,
                    on_resume=bar.update,
                    before_commit=verify if args.verify else None,
                    vouched=check,
                    vouched_by="sizes" if args.sizes_only else "checksums",
                )
            except CheckpointError:
                check.result()  # damage explains what came of it
                raise
    print(f"{out}: {len(plan.outputs)} tensors, {plan.size_bytes / 1e9:.2f} GB in {len(plan.files())} file(s)")
    if left := plan.base.left_behind():
        print(f"not copied from {base_name}: {_list(left, ', ', shown=20)}")
    return 0


@contextmanager
def _checking(checkpoint: Any, checksums: bool) -> Iterator[Future[None]]:
    """Checks the checkpoint in a thread. What it yields raises CheckpointError with everything that is wrong: ask it
    before any result counts."""
    from accel_moe.errors import CheckpointError, HubFormatError

    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(_check, checkpoint, checksums, stopped)
        try:
            yield checking
        except (CheckpointError, HubFormatError, OSError, KeyboardInterrupt):
            stopped.set()
            raise
        except Exception:
            checking.result()  # damage explains what nobody expected
            raise


def _check(checkpoint: Any, checksums: bool, stopped: threading.Event) -> None:
    """Raises CheckpointError with everything that is wrong."""
    from accel_moe.checkpoint import export
    from accel_moe.errors import CheckpointError

    manifest = checkpoint.manifest
    if manifest is None:
        print(
            f"warning: {checkpoint.name} has no manifest (stock accelerate wrote it): nothing vouches for its bytes.",
            file=sys.stderr,
        )
        problems = export.check_checkpoint(checkpoint)
    else:
        total = sum(export.model_files(checkpoint).values())
        with _progress("checking", total) as bar:

            def on_bytes(count: int) -> None:
                if stopped.is_set():
                    raise CheckpointError("the check was given up")  # nobody waits for it: another error is on its way
                bar.update(count)

            problems = export.check_checkpoint(checkpoint, checksums=checksums, on_bytes=on_bytes)
    if problems:
        raise CheckpointError(
            f"{checkpoint.name} is damaged: {_list(problems)}. Use another checkpoint, or restore the files."
        )


def _say_what_is_special(plan: Any) -> None:
    if plan.untied:
        added = [key for key in plan.outputs if key not in plan.base.tensors]
        print(
            f"note: {_list(added, ', ')} was trained apart from the tensor that the base ties it to: it is written, "
            "and config.json says tie_word_embeddings: false.",
            file=sys.stderr,
        )
    if plan.extras and not plan.keep_extra:
        print(
            f"note: {len(plan.extras)} base tensors have no counterpart in training and are left out: "
            f"{_list(plan.extras, ', ')}. --keep-extra copies them from the base.",
            file=sys.stderr,
        )


def inspect(args: argparse.Namespace) -> int:
    """Prints what a checkpoint holds: step, layout, sizes, largest tensors, what can be said of its state."""
    from accel_moe.checkpoint import export

    checkpoint = export.open_checkpoint(args.paths)
    problems = export.check_checkpoint(checkpoint, checksums=False)
    print("\n".join(export.describe(checkpoint)))
    print("state        " + (f"damaged: {_list(problems)}" if problems else _state(checkpoint)))
    return EXIT_FAILED if problems else 0


def _state(checkpoint: Any) -> str:
    if checkpoint.manifest is None:
        return "files present, chunks whole; no manifest, so nothing vouches for the bytes"
    return "committed; files present with the right sizes, chunks whole (checksums are verified when it is used)"


def _list(lines: Sequence[str], separator: str = "; ", shown: int = 3) -> str:
    return separator.join(lines[:shown]) + (f" (and {len(lines) - shown} more)" if len(lines) > shown else "")


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Any]:
    """A bar with bytes, speed and time left; nothing where the output is not a terminal."""
    from tqdm import tqdm

    with tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, disable=None) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
