import math

import numpy as np
import pytest

from hf_alsals.checks import check_number


def is_share(x):
    return 0 < x < 1


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), np.float64(1e-9)])
def test_a_valid_number_passes(value):
    assert check_number("share", value, is_share, "a number in (0, 1)") is None


@pytest.mark.parametrize("value", [0, 1, -0.5, math.nan, math.inf])
def test_a_number_out_of_range_is_named_with_its_value_and_what_would_be_right(value):
    with pytest.raises(ValueError) as raised:
        check_number("share", value, is_share, "a number in (0, 1)")
    assert str(raised.value) == f"share must be a number in (0, 1), got {value!r}."


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j])
def test_what_is_no_number_is_named_with_its_type(value):
    with pytest.raises(TypeError) as raised:
        check_number("share", value, is_share, "a number in (0, 1)")
    assert str(raised.value) == f"share must be a number in (0, 1), got {value!r} of type {type(value).__name__}."
