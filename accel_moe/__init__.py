"""accel_moe: expert parallelism for any transformers Mixture-of-Experts model, in any accelerate script.

    import accel_moe
    model = accel_moe.prepare(model)     # with moe_ep_degree: 8 in the accelerate YAML
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Importing the package does one thing: it registers the experts function `scattermoe` with transformers, for
`from_pretrained(..., experts_implementation="scattermoe")`. The function imports the kernels at its first call. Before
`prepare` no patch is installed and no CUDA context exists.
"""

from accel_moe.api import from_pretrained, prepare
from accel_moe.config import MoEConfig
from accel_moe.experts.expert_counts import expert_load
from accel_moe.experts.swap import register_scattermoe
from accel_moe.version import __version__

register_scattermoe()

__all__ = ["MoEConfig", "__version__", "expert_load", "from_pretrained", "prepare"]
