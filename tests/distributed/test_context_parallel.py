"""Context parallelism: cp ranks share each sequence, and the numbers are those of one process on the whole of it.

On a CPU the attention is cpu_attention.py's, inside of torch's own split; on GPUs it is torch's ring attention. The
comparison and its tolerances are those of test_parity.py; the yardstick for the weights is accelerate FSDP2 with the
same cp.
"""

import functools

import pytest

from tests.distributed.parity import Case
from tests.distributed.test_parity import check, run_case

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
EIGHT = (8,) * 3
TABLE = [
    Case(2, 2, cp=2, lengths=EIGHT, masked=True),
    Case(2, 2, cp=2, lengths=EIGHT, checkpointing=True, nothing_received=True),
    Case(4, 4, cp=2, lengths=EIGHT, masked=True, accumulation=2),
    Case(2, 2, cp=2, lengths=EIGHT, aux=0.5),
    slow(Case(4, 2, cp=2, lengths=EIGHT, masked=True)),
    slow(Case(4, 2, cp=2, lengths=EIGHT, dp_replicate=1, checkpointing=True, nothing_received=True)),
]


@pytest.mark.core
@pytest.mark.parametrize("case", TABLE, ids=lambda case: getattr(case, "name", None))
def test_training_equals_one_process_on_whole_sequences(case):
    check(run_case(case), case)
