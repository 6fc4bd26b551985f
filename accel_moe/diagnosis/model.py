"""The user's own architecture, small: trained on ranks and compared with one process, saved, resumed, consolidated.

Each part of the comparison is a line. A line that fails says what differs; a rank that fails gives its traceback.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel_moe.diagnosis import settings as user
from accel_moe.diagnosis import shrink, training
from accel_moe.diagnosis.launch import last_line, run_ranks
from accel_moe.diagnosis.report import Line, failed, judged, one_line, passed, skipped
from accel_moe.errors import first_few
from accel_moe.experts import recognise
from accel_moe.ring_limits import conditions, why_no_ring

TIMEOUT_S = 150
BYTES_PER_PARAMETER = 12
"""Of a checkpoint: fp32 weights and AdamW's two moments."""
_REPORT = "Try moe_kernel: grouped_mm and moe_dispatcher: all_to_all. If the line stays, report it."


@dataclass(frozen=True)
class Model:
    """The user's model, without weights.

    Attributes:
        layers: its experts modules, on the meta device.
        whole: the model, on the meta device.
    """

    config: Any
    layers: dict[str, torch.nn.Module]
    parameters: int
    whole: torch.nn.Module | None = None

    @property
    def checkpoint_bytes(self) -> int:
        return self.parameters * BYTES_PER_PARAMETER

    def describe(self) -> str:
        kinds = sorted({type(module).__name__ for module in self.layers.values()})
        experts = max(recognise.as_interface(module).num_experts for module in self.layers.values())
        return (
            f"{self.config.model_type}, {self.parameters / 1e9:.2f} billion parameters, {len(self.layers)} layers of "
            f"{experts} experts ({', '.join(kinds)})"
        )


def read(name: str) -> Model:
    """The model of a folder or Hub id, from its config.

    Raises:
        ValueError: there is no such config, transformers does not know the family, or the model has no experts.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers, the Hub's client and its checks of fields raise their own
        why = one_line(error).split(" You can update Transformers")[0]
        raise ValueError(
            f"{name} has no config that this transformers can read: {why} "
            "Give a folder with a config.json, or a Hub id."
        ) from error
    with torch.device("meta"):
        model = shrink.build(shrink.class_with_experts(config), config)
    parameters = sum(p.numel() for p in model.parameters())
    return Model(config, recognise.find_experts(model), parameters, model)


def lines(model: Model, settings: user.Settings) -> Iterator[Line]:
    """Every line of the model. Under three minutes."""
    refusal = refused(model, settings)
    yield judged("model", refusal, model.describe(), "")
    if refusal:
        return
    if settings.plan.cp > 1 and model.whole is not None:
        told = conditions(model.whole, settings.plan.cp, settings.mixed_precision)
        yield skipped("context parallelism", f"not tried. It needs: {'; '.join(told)}")
    device = "cuda" if torch.cuda.device_count() >= user.cut(settings.plan).world_size else "cpu"
    small_settings, changes = user.on_this_machine(settings, device)
    for change in changes:
        yield skipped("not as in the YAML", change)
    ep = small_settings.plan.ep
    try:
        config = shrink.shrunk(model.config, num_experts=ep * -(-8 // ep))
        small = shrink.small_model(config)
    except Exception as error:  # whatever a family's constructor raises
        yield failed("small copy", one_line(error), "The model cannot be tried here; train a few steps and compare.")
        return
    yield passed("small copy", f"{type(small).__name__}, {sum(p.numel() for p in small.parameters())} parameters, fp32")
    with tempfile.TemporaryDirectory() as name:
        request = training.Request(config, small_settings.plan, vars(small_settings.options), settings.checkpointing)
        yield from _trained(request, small, device, Path(name))


def refused(model: Model, settings: user.Settings) -> str | None:
    """Why `prepare` or `accelerator.prepare` would refuse the model under these settings, or None."""
    kernel = settings.options.moe_kernel
    for name, module in model.layers.items():
        asked = "grouped_mm" if kernel == "auto" else kernel
        if why := recognise.refusal(module, kernel=asked, ep_degree=settings.options.moe_ep_degree):
            return f"{name} of {model.config.model_type}: {why}"
    cp = settings.plan.cp
    if cp > 1 and model.whole is not None and (why := why_no_ring(model.whole)) is not None:
        return f"parallelism_config_cp_size={cp}: {why}"
    return None


def _trained(request: training.Request, small: torch.nn.Module, device: str, folder: Path) -> Iterator[Line]:
    ranks = request.plan.world_size
    subject = f"training on {ranks} {'GPUs' if device == 'cuda' else 'CPU ranks'}"
    why = run_ranks(training.on_ranks, request, folder, ranks=ranks, device=device, timeout_s=TIMEOUT_S)
    if not (folder / "trained.pt").exists():
        yield failed(subject, last_line(why or "no result"), "The traceback of the first rank is below.", why or "")
        return
    run = torch.load(folder / "trained.pt", weights_only=False)
    yield passed(subject, f"{training.STEPS} steps, {request.plan.describe()}")
    yield from parity_lines(run, training.in_one_process(request.config, ranks, device), device)
    if why is not None:
        yield failed("save and resume", last_line(why), "The traceback of the first rank is below.", why)
    else:
        yield resumed_line(torch.load(folder / "resumed.pt", weights_only=False))
    if (folder / "checkpoint").is_dir():
        yield from _consolidated(run, small, ranks, folder, device)


def parity_lines(run: training.Run, oracle: training.Run, device: str) -> Iterator[Line]:
    """Loss, gradients, gradient norm and replicas of a run on ranks, against one process with the model's own loop."""
    wrong = dict(training.differences(run, oracle, device))
    yield judged("loss", wrong.get("loss"), f"as in one process ({run.losses[-1]:.4f})", _REPORT)
    right = f"all {len(oracle.gradients)} as the model's own loop in one process has them"
    yield judged("gradients", wrong.get("gradients"), right, _REPORT)
    yield judged("gradient norm", wrong.get("norm"), f"as in one process ({run.norms[0]:.4g})", _REPORT)
    drifted = f"{first_few(run.unequal)} differ between ranks that hold the same part" if run.unequal else None
    yield judged("replicas", drifted, "bit for bit equal", _REPORT)


def resumed_line(found: list[tuple[list[str], list[str]]]) -> Line:
    """Args: found: of each rank, what did not come back, and what differs after one step more."""
    lost = sorted({name for resumed, _ in found for name in resumed})
    drifted = sorted({name for _, continued in found for name in continued})
    wrong = f"{first_few(lost)} did not come back" if lost else None
    if drifted and not lost:
        wrong = f"{first_few(drifted)} differ after the step that follows"
    right = "weights, optimizer and the next step come back bit for bit"
    return judged("save and resume", wrong, right, "Do not resume from checkpoints here before this is mended.")


def _consolidated(run: training.Run, small: torch.nn.Module, ranks: int, folder: Path, device: str) -> Iterator[Line]:
    """Consolidates the checkpoint onto the small model as its base, and compares transformers' logits."""
    from accel_moe import consolidate

    base, out, told = folder / "base", folder / "hub", io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        small.save_pretrained(base)
        code = consolidate.main([str(folder / "checkpoint"), str(out), str(base)])
    if code:
        yield failed("consolidate", last_line(told.getvalue()), "See docs/checkpoints.md.")
        return
    yield passed("consolidate", f"{sum(1 for _ in out.iterdir())} files in the Hub's format")
    try:
        model = type(small).from_pretrained(out, dtype=torch.float32, attn_implementation="eager").to(device).train()
        with torch.no_grad():
            parts = training.batch(0).chunk(ranks)  # a rank's own: jitter draws as many numbers as it has tokens
            logits = torch.cat([training.logits_of(model, part).float().cpu() for part in parts])
    except Exception as error:  # whatever a family's loading raises
        yield failed("from_pretrained", one_line(error), "transformers cannot read the result back.")
        return
    gap, largest = float((logits - run.logits).abs().max()), float(run.logits.abs().max())
    wrong = f"logits are off by {gap:.1e} of {largest:.1e}" if not gap <= 1e-3 * largest + 1e-5 else None
    yield judged("from_pretrained", wrong, "transformers' logits are those of the ranks", _REPORT)
