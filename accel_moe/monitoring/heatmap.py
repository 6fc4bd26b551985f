"""The load of every expert of every layer over time, as one picture.

A layer is a strip and an expert is a column. Time runs down each strip, so an expert that dies or takes over is a line
that begins somewhere in its strip. A colour is the expert's slots over the mean of its layer: white is a fair share.

Memory and picture stay small in a long run: when a strip is full, neighbouring times are added in pairs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel_moe.experts.expert_counts import trained_tokens_per_expert
from accel_moe.monitoring.statistics import layer_labels, metrics_of

logger = logging.getLogger("accel_moe")

TIMES = 32
"""Rows of a layer's strip at most."""
BUSIEST = 4.0
"""Times the fair share: the end of the colours."""


class ExpertLoadHistory:
    """Counts of training's tokens over time, each time's numbers, and the heatmap of all.

    For loops of your own:

        history = accel_moe.ExpertLoadHistory()
        accelerator.log(history.measure(model, step), step=step)  # on every rank
        if accelerator.is_main_process:
            history.write("runs/mine/expert_load.png")
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        """The last step of each row of a strip."""
        self._begin: int | None = None
        self._rows: list[dict[str, torch.Tensor]] = []
        self._per_row = 1  # measurements that a full row adds up
        self._in_last = 0

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """`expert_load_metrics(model)`, whose counts are remembered under `step`. A collective."""
        counts = trained_tokens_per_expert(model, "ExpertLoadHistory.measure")
        self.add(counts, step)
        return metrics_of(counts)

    def add(self, counts: Mapping[str, torch.Tensor], step: int) -> None:
        """Remembers {layer name: [E] slots} of the steps up to `step`."""
        if self._begin is None:
            self._begin = step
        if self._rows and self._in_last < self._per_row:
            self._rows[-1] = _sum(self._rows[-1], counts)
            self.steps[-1] = step
            self._in_last += 1
            return
        if len(self._rows) == TIMES:
            self._rows = [_sum(*pair) for pair in zip(self._rows[::2], self._rows[1::2])]
            self.steps = self.steps[1::2]
            self._per_row *= 2
        self._rows.append(dict(counts))
        self.steps.append(step)
        self._in_last = 1

    def image(self) -> torch.Tensor:
        """[layers x times, most experts of a layer] float64: slots over the layer's mean; layer by layer, time down.

        NaN where a layer has no such expert, or had no slot at that time.
        """
        layers = list(self._rows[0]) if self._rows else []
        widest = max((self._rows[0][name].numel() for name in layers), default=0)
        lines = []
        for name in layers:
            for row in self._rows:
                counts = row[name].double()
                line = torch.full((widest,), torch.nan, dtype=torch.double)
                line[: counts.numel()] = counts / counts.mean()
                lines.append(line)
        return torch.stack(lines) if lines else torch.zeros(0, 0, dtype=torch.double)

    def figure(self) -> Any:
        """The heatmap as a matplotlib Figure.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: nothing was measured yet.
        """
        if not self._rows:
            raise ValueError("ExpertLoadHistory has no measurement to draw. Call measure(model, step) first.")
        labels = list(layer_labels(self._rows[0]).values())
        several = self.steps[-1] != self._begin
        when = f"from step {self._begin} to {self.steps[-1]}" if several else f"at step {self._begin}"
        return _drawn(self.image(), labels, f"measured {when}")

    def write(self, path: str | os.PathLike) -> bool:
        """Draws the heatmap into a PNG, which appears whole or not at all, and makes its folder. One rank calls it.

        Returns False if there is no picture: nothing was measured, matplotlib is not installed, or the file cannot be
        written. The last two are a warning, once: a picture ends no training.
        """
        return bool(self._rows) and _attempt(self._write, Path(path))

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.figure().savefig(unfinished, format="png")
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def log_image(self, accelerator: Any, step: int) -> bool:
        """Sends the heatmap to those of accelerate's trackers that are tensorboard or wandb. Any rank may call it.

        Returns whether it was sent to one; a failure is a warning, once.
        """
        trackers = [one for one in accelerator.trackers if one.name in ("tensorboard", "wandb")]
        if not (trackers and self._rows and accelerator.is_main_process):
            return False
        return _attempt(self._log_image, trackers, step)

    def _log_image(self, trackers: list[Any], step: int) -> None:
        pixels = pixels_of(self.figure())
        for tracker in trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"expert_load": pixels[None]}, step=step, **layout)


def _sum(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: counts + other[name] for name, counts in one.items()}


def _attempt(draw: Callable[..., None], *args: Any) -> bool:
    try:
        draw(*args)
    except ImportError as error:
        warn_once(f"No heatmap of the expert load: {error}. Install matplotlib: pip install 'accel_moe[monitor]'.")
        return False
    except Exception as error:  # of matplotlib, of the disk, of a tracker
        warn_once(f"No heatmap of the expert load: {type(error).__name__}: {error}. Training goes on.")
        return False
    return True


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


def pixels_of(figure: Any) -> Any:
    """[H, W, 3] uint8, a numpy array."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def _drawn(image: torch.Tensor, labels: list[str], when: str) -> Any:
    """A Figure of its own: pyplot and its backend are left alone."""
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure

    width, times = image.shape[1], image.shape[0] // len(labels)
    # an expert without any slot is black, as nothing else is
    colours = LinearSegmentedColormap.from_list("load", ["#2b6fb0", "#f7f7f7", "#c0392b"])
    colours = colours.with_extremes(under="black", over="#7a0f1f", bad="0.85")
    norm = TwoSlopeNorm(vmin=1e-9, vcenter=1.0, vmax=BUSIEST)
    inches = max(0.2, min(1.2, 12 / len(labels))) * len(labels)
    figure = Figure((max(6.5, min(16.0, 0.1 * width + 3)), inches + 1.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    extent = (-0.5, width - 0.5, len(labels), 0)  # an expert is 1 wide, a layer 1 high
    shown = axes.imshow(image.numpy(), cmap=colours, norm=norm, aspect="auto", interpolation="nearest", extent=extent)
    axes.hlines(range(1, len(labels)), -0.5, width - 0.5, colors="0.3", linewidth=0.8)
    every = -(-len(labels) // 48)
    axes.set_yticks([at + 0.5 for at in range(0, len(labels), every)], [one[6:] for one in labels[::every]])
    axes.set_xlabel("expert")
    axes.set_ylabel(f"layer (time runs down each strip, {times} rows)" if times > 1 else "layer")
    axes.set_title(f"Expert load, {when}")
    bar = figure.colorbar(shown, ax=axes, extend="both", ticks=[0.25, 0.5, 1, 2, 3, BUSIEST], pad=0.02, aspect=30)
    bar.ax.set_yticklabels(["1/4", "1/2", "fair", "2x", "3x", f"{BUSIEST:.0f}x"])
    bar.set_label("an expert's tokens over its layer's mean (black: none)", size=9)
    return figure
