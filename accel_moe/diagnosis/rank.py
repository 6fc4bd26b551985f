"""One rank that the doctor started: it does FOLDER/request.pkl, and leaves its traceback if it fails.

    python -m torch.distributed.run --nproc-per-node N -m accel_moe.diagnosis.rank FOLDER

A request is a pair (function, argument): the function gets the argument and the folder. Its results are files there. A
rank that fails writes FOLDER/rank<R>.err.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from pathlib import Path


def main(folder: Path) -> int:
    """Does the request of a folder on this rank. Returns the exit code."""
    import torch.distributed as dist

    try:
        function, argument = pickle.loads((folder / "request.pkl").read_bytes())
        function(argument, folder)
    except BaseException:
        (folder / f"rank{os.environ.get('RANK', 0)}.err").write_text(traceback.format_exc(), encoding="utf-8")
        return 1
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
