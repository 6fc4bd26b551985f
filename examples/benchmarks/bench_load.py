"""Loading a Hub checkpoint into expert-parallel shards: bytes, disk, memory and time, against plain from_pretrained.

    python examples/benchmarks/bench_load.py                       # 4 gloo ranks, ep 4, a 4.3 GB checkpoint it makes
    python examples/benchmarks/bench_load.py --ranks 2 --gb 8      # on 2 GPUs: about 4 B parameters, bf16

It makes a random Qwen3-MoE checkpoint in the format of the Hub (per-expert keys, bf16, one file a layer) under
--folder, drops it from the page cache before every run, and deletes it at the end (--keep leaves it). Runs:

    ours        each rank: accel_moe.from_pretrained, prepare, accelerator.prepare
    plain       one process: AutoModelForCausalLM.from_pretrained, nothing else (it has no shards)
    plain_all   with --plain-on-every-rank: the same on every rank, then accelerator.prepare; needs the RAM for it

Columns: `read` counts bytes requested from the files, `disk` bytes that the kernel fetched (/proc/self/io). `anon` is
the peak of RssAnon above its value after imports and set-up, `GPU` the peak of torch's allocator. `time` covers
from_pretrained + accelerator.prepare, without imports, process group and warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 1024, 512, 64, 8, 32_000
LAYER_BYTES = 2 * (EXPERTS * 3 * HIDDEN * INTERMEDIATE + 4 * HIDDEN * HIDDEN)


def main() -> None:
    arguments = parse()
    if arguments.role:
        print("RESULT " + json.dumps(globals()[f"run_{arguments.role}"](arguments)), flush=True)
        return
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="bench_load_"))
    try:
        if not (folder / "model.safetensors.index.json").is_file():
            make_checkpoint(folder, arguments.gb)
        make_tiny(folder / "tiny")
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        print(f"checkpoint: {size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} files")
        roles = ["plain", "ours", *(["plain_all"] if arguments.plain_on_every_rank else [])]
        for cache in ("cold", "warm") if arguments.warm else ("cold",):
            for _ in range(arguments.repeats):
                for role in roles:
                    if cache == "cold":
                        drop_from_page_cache(folder)
                    else:
                        read_once(folder)
                    report(role, cache, start(role, folder, arguments), size)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ep", type=int, help="expert-parallel degree (default: the number of ranks)")
    parser.add_argument("--gb", type=float, default=4.2, help="size of the checkpoint to make")
    parser.add_argument("--folder", help="folder to make the checkpoint in, or that has it already")
    parser.add_argument("--keep", action="store_true", help="do not delete the checkpoint")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", action="store_true", help="then again with the checkpoint in the page cache")
    parser.add_argument("--plain-on-every-rank", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    from common import write_random_checkpoint
    from transformers import Qwen3MoeConfig

    layers = max(1, round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / LAYER_BYTES))
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
        tie_word_embeddings=False,
    )
    write_random_checkpoint(config, folder)


def make_tiny(folder: Path) -> None:
    """A one-layer checkpoint for the warm-up: loading it first imports every module the measured load needs."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    tiny = dict(hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=EXPERTS, vocab_size=16)
    config = Qwen3MoeConfig(**tiny, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def drop_from_page_cache(folder: Path) -> None:
    """Needs no privilege: the files are clean once they are synced."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_once(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as stream:
            while stream.read(2**24):
                pass


def start(role: str, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Run a role in processes of its own; returns the result of each."""
    import torch

    own = [__file__, "--role", role, "--folder", str(folder), "--ep", str(arguments.ep or arguments.ranks)]
    if role == "plain":
        command = [sys.executable, *own]
        environment = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    else:
        # no --standalone: its c10d rendezvous resolves the machine's host name, which need not exist
        options = ["--nproc-per-node", str(arguments.ranks), "--master-addr", "127.0.0.1", "--master-port", "29577"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *own]
        environment = dict(os.environ)
    root = str(Path(__file__).resolve().parents[2])  # works without an installed package, too
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    if not torch.cuda.is_available() and role != "plain":
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    # two ranks may write on one line
    results = [json.loads(part.splitlines()[0]) for part in done.stdout.split("RESULT ")[1:]]
    if done.returncode or not results:
        raise SystemExit(done.stdout[-2000:] + done.stderr[:8000])
    return results


def report(role: str, cache: str, results: list[dict], size: int) -> None:
    def most(key: str) -> float:
        return max(r[key] for r in results)

    owned = most("owned")
    line = (
        f"{cache} {role:9} x{len(results)}  owned {owned / 1e9:.3f} GB  anon +{most('anon') / 1e6:.0f} MB "
        f"(owned {most('anon') / 1e6 - owned / 1e6:+.0f})  disk {sum(r['disk'] for r in results) / size:.3f} x file  "
        f"time {most('seconds'):.2f} s"
    )
    if role == "ours":
        line += f" (filling {most('filling'):.2f})  read {max(r['read'] / r['owned'] for r in results):.3f} x owned"
    if most("gpu"):
        line += f"  GPU {max(r['gpu'] / r['owned'] for r in results):.3f} x owned  host RSS {most('rss') / 1e9:.2f} GB"
    print(line, flush=True)


# --- in the processes that load


class Watch:
    """Time, memory and bytes read of this process while the block ran."""

    def __enter__(self) -> Watch:
        import torch

        self._stop = threading.Event()
        self._first = memory_bytes()["RssAnon"]
        self.anon = self.rss = 0
        self._disk = disk_bytes()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._started = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            now = memory_bytes()
            self.anon, self.rss = max(self.anon, now["RssAnon"] - self._first), max(self.rss, now["VmRSS"])
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        import torch

        self.gpu = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.gpu = torch.cuda.max_memory_allocated()
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()
        now = memory_bytes()
        self.anon, self.rss = max(self.anon, now["RssAnon"] - self._first), max(self.rss, now["VmRSS"])
        self.disk = disk_bytes() - self._disk

    def result(self, **more: float) -> dict:
        return {k: getattr(self, k) for k in ("anon", "rss", "disk", "gpu", "seconds")} | more


def memory_bytes() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    return {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in lines) if k in ("RssAnon", "VmRSS")}


def disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split(":")[1]) for line in lines if line.startswith("read_bytes"))


def run_plain(arguments: argparse.Namespace) -> dict:
    from transformers import AutoModelForCausalLM

    def load_from(folder: str):
        return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")

    load_from(arguments.folder + "/tiny")
    with Watch() as watch:
        model = load_from(arguments.folder)
    return watch.result(owned=sum(p.nbytes for p in model.parameters()))


def run_ours(arguments: argparse.Namespace, ours: bool = True) -> dict:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import AutoModelForCausalLM

    import accel_moe
    import accel_moe.cpu

    accel_moe.cpu.enable()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3MoeDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin)
    load = accel_moe.from_pretrained if ours else AutoModelForCausalLM.from_pretrained

    def load_from(folder: str):
        model = load(folder, dtype="bfloat16")
        accel_moe.prepare(model, moe_ep_degree=arguments.ep)
        optimizer = torch.optim.AdamW(model.parameters())
        return accelerator.prepare(model, optimizer)[0]

    load_from(arguments.folder + "/tiny")
    with Watch() as watch:
        model = load_from(arguments.folder)
    owned = sum(p.to_local().nbytes for p in model.parameters())
    if not ours:
        return watch.result(owned=owned)
    done = model._accel_moe_load_report
    return watch.result(owned=owned, read=done.read_bytes, filling=done.seconds)


def run_plain_all(arguments: argparse.Namespace) -> dict:
    return run_ours(arguments, ours=False)


if __name__ == "__main__":
    main()
