"""Which rows are equal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_geometry.geometry.duplicates import first_rows, row_keys


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]))
def test_first_rows_are_those_of_unique(n: int, width: int, seed: int, dtype: torch.dtype) -> None:
    rows = torch.randint(-1, 2, (n, width), generator=torch.Generator().manual_seed(seed)).to(dtype)
    first = first_rows(row_keys(rows))
    expected = [row for row in range(n) if not any(torch.equal(rows[row], rows[other]) for other in range(row))]
    assert first.tolist() == expected
    half = n // 2
    rest = first_rows(row_keys(rows[half:]), row_keys(rows[:half]))
    assert (rest + half).tolist() == [row for row in expected if row >= half]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_tell_numbers_apart_whose_lower_bits_are_zero(dtype: torch.dtype) -> None:
    rows = 2 * torch.randint(2, (2**18, 64), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert len(first_rows(row_keys(rows))) == len(rows)


def test_no_atomics() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert first_rows(torch.tensor([4, 4, 2])).tolist() == [0, 2]
    finally:
        torch.use_deterministic_algorithms(False)
