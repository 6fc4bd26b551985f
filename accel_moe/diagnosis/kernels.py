"""Our Triton kernels against the experts' meaning in plain torch: output and every gradient (experts/probe.py).

With a GPU the widths, the gate and the layout are the model's own, in fp32 and in bf16. Without one the kernels run in
Triton's interpreter on the small model, in fp32. Either is a process of its own: a fault of a kernel may end it.

    python -m torch.distributed.run --nproc-per-node 1 -m accel_moe.diagnosis.rank FOLDER     (check_on_rank)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from accel_moe.diagnosis import shrink
from accel_moe.diagnosis.launch import last_line, run_ranks
from accel_moe.diagnosis.report import Line, failed, passed, skipped
from accel_moe.experts import probe, recognise

SUBJECT = "Triton kernels"
TIMEOUT_S = 120
_MEND = "Set moe_kernel: grouped_mm until it is mended, and report this line with your GPU and Triton's version."


def lines(config: Any, own_sizes: bool) -> Iterator[Line]:
    """One line for each dtype.

    Args:
        config: of the user's model with a GPU, of the small one without.
        own_sizes: whether to keep the experts' widths.
    """
    from importlib.util import find_spec

    if find_spec("triton") is None:
        yield skipped(SUBJECT, "no Triton is installed: moe_kernel auto takes grouped_mm")
        return
    device = "cuda" if own_sizes else "cpu"
    where = "own widths, compiled" if own_sizes else "no GPU found: small widths, in Triton's interpreter"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argument = (config, own_sizes)
        env = {} if own_sizes else {"TRITON_INTERPRET": "1"}  # before Triton's first import
        why = run_ranks(check_on_rank, argument, folder, ranks=1, device=device, timeout_s=TIMEOUT_S, **env)
        if why is not None:
            yield failed(SUBJECT, last_line(why), _MEND, detail=why)
            return
        found = json.loads((folder / "kernels.json").read_text())
    for dtype, wrong in found.items():
        if wrong and wrong.startswith("not ours"):
            yield skipped(SUBJECT, f"{wrong}: moe_kernel auto takes grouped_mm")
        elif wrong:
            yield failed(SUBJECT, f"{dtype} ({where}): moe_kernel=scattermoe {wrong}", _MEND)
        else:
            yield passed(SUBJECT, f"{dtype}: output and gradients as in plain torch ({where})")


def check_on_rank(argument: tuple[Any, bool], folder: Path) -> None:
    """Writes kernels.json: the fault of each dtype, or null."""
    (folder / "kernels.json").write_text(json.dumps(faults(*argument)))


def faults(config: Any, own_sizes: bool) -> dict[str, str | None]:
    """{dtype: the fault in words, or None}, over the model's kinds of experts."""
    from accel_moe.kernels.scattermoe import scattermoe_experts_forward

    with torch.device("meta"):
        model = shrink.build(shrink.class_with_experts(config), config)
    layers = {type(module): module for module in recognise.find_experts(model).values()}
    found: dict[str, str | None] = {}
    for dtype in (torch.float32, torch.bfloat16) if own_sizes else (torch.float32,):
        name = str(dtype).removeprefix("torch.")
        found[name] = None
        for module in layers.values():
            if why := recognise.not_scattermoe(module):
                found[name] = f"not ours to compute ({why})"
                continue
            side = 1 << 20 if own_sizes else 32
            found[name] = found[name] or probe.fault(scattermoe_experts_forward, module, dtype, ep_degree=2, side=side)
    return found
