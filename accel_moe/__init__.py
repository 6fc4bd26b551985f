"""accel_moe: expert parallelism for any transformers Mixture-of-Experts model, in any accelerate script.

    import accel_moe
    model = accel_moe.prepare(model)     # with moe_ep_degree: 8 in the accelerate YAML
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Importing the package does one thing: it registers the experts function `scattermoe` with transformers, so that
`from_pretrained(..., experts_implementation="scattermoe")` works. A public name is imported at its first use, the
kernels at their first call. No patch is installed, no CUDA context made, before `prepare`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from accel_moe.experts.registration import register_names
from accel_moe.version import __version__

if TYPE_CHECKING:
    from accel_moe.api import from_pretrained, prepare
    from accel_moe.checkpoint.preemption import Preemption, PreemptionCallback
    from accel_moe.checkpoint.resume import newest_checkpoint
    from accel_moe.config import MoEConfig
    from accel_moe.experts.expert_counts import expert_load, tokens_per_expert
    from accel_moe.long_context import context_parallel
    from accel_moe.monitoring.callback import ExpertLoadCallback
    from accel_moe.monitoring.heatmap import ExpertLoadHistory
    from accel_moe.monitoring.statistics import expert_load_metrics

__all__ = [
    "ExpertLoadCallback",
    "ExpertLoadHistory",
    "MoEConfig",
    "Preemption",
    "PreemptionCallback",
    "__version__",
    "context_parallel",
    "expert_load",
    "expert_load_metrics",
    "from_pretrained",
    "newest_checkpoint",
    "prepare",
    "tokens_per_expert",
]

_MODULE_OF = {
    "ExpertLoadCallback": "accel_moe.monitoring.callback",
    "ExpertLoadHistory": "accel_moe.monitoring.heatmap",
    "MoEConfig": "accel_moe.config",
    "Preemption": "accel_moe.checkpoint.preemption",
    "PreemptionCallback": "accel_moe.checkpoint.preemption",
    "context_parallel": "accel_moe.long_context",
    "expert_load": "accel_moe.experts.expert_counts",
    "expert_load_metrics": "accel_moe.monitoring.statistics",
    "from_pretrained": "accel_moe.api",
    "newest_checkpoint": "accel_moe.checkpoint.resume",
    "prepare": "accel_moe.api",
    "tokens_per_expert": "accel_moe.experts.expert_counts",
}

register_names()


def __getattr__(name: str) -> Any:
    if name == "dispatch":  # its table DISPATCHERS is open to dispatchers of the user's own
        return importlib.import_module("accel_moe.dispatch")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
