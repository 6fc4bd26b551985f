"""What expert parallelism refuses of accelerate's settings.

in:   the settings of an Accelerator (in_accelerator.py), or of a YAML before anything runs (diagnosis/settings.py)
out:  why they cannot be trained with, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class AccelerateSettings:
    """What counts of them.

    Attributes:
        kind: distributed_type; of FSDP with its version, "FSDP version 2".
        sizes: of the axes of parallelism_config, by their names without `_size`. One that is missing is 1.
        mixed_precision: "no", "bf16" or "fp16".
        fullgraph: torch.compile runs, with dynamo_use_fullgraph.
        offloads_over: the backends of the process group, "cuda:nccl", if FSDP offloads to host memory; else "".
    """

    kind: str
    sizes: Mapping[str, int]
    mixed_precision: str = "no"
    fullgraph: bool = False
    offloads_over: str = ""

    def refusal(self, found: str) -> str | None:
        """Why expert parallelism refuses them; None if it does not. `found` says which degree, and where it is set."""
        if self.kind != "FSDP version 2":
            return (
                f"{found} needs FSDP2, but this Accelerator runs {self.kind}. Set distributed_type: FSDP and "
                "fsdp_config.fsdp_version: 2 in the accelerate config, or remove moe_ep_degree."
            )
        for axis in ("tp", "sp"):
            if (size := self.sizes.get(axis, 1)) > 1:
                return (
                    f"{found} together with {axis}_size={size} is not supported. Set parallelism_config_{axis}_size: "
                    "1, or remove moe_ep_degree."
                )
        if self.mixed_precision == "fp16":
            return (
                f"{found} with mixed_precision: fp16 is not supported: the gradient scaler looks for overflow on each "
                "parameter's own mesh only. Use mixed_precision: bf16."
            )
        if self.offloads_over and "cpu:" not in self.offloads_over:
            return (
                f"{found} with FSDP's offloading to host memory needs a process group that also sums what is in host "
                f"memory, the gradients' norm, but this one has {self.offloads_over} alone. `accelerate launch` with "
                "fsdp_offload_params: true starts one; else give Accelerator kwargs_handlers="
                '[InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")].'
            )
        if self.fullgraph and (cp := self.sizes.get("cp", 1)) > 1:
            return (
                f"{found} with dynamo_use_fullgraph: true is not supported with cp_size={cp}: torch's ring attention "
                "breaks the graph. Set dynamo_config.dynamo_use_fullgraph: false."
            )
        return None
