import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the tests run beside each other

import pytest
from accelerate.state import AcceleratorState, GradientState

pytest.register_assert_rewrite("exactness", "searching", "small_problems")


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps mixed precision and the end of the last data loader for the whole process."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
