"""The tiles that memory allows."""

from hypothesis import given
from hypothesis import strategies as st

from ppsr.pictures.tile_choice import largest_tile


@given(st.floats(0, 1e12), st.floats(1, 1e5), st.floats(0, 1e7), st.integers(0, 64))
def test_the_largest_tile_fits_and_is_the_largest(allowed, per_pixel, per_row, overlap):
    tile = largest_tile(allowed, per_pixel, per_row, overlap, 16)
    larger = tile + 16
    assert tile % 16 == 0
    if tile:
        assert tile**2 * per_pixel + tile * per_row <= allowed * (1 + 1e-9) and tile >= 2 * overlap + 16
    else:
        larger = -(-(2 * overlap + 16) // 16) * 16
    assert larger**2 * per_pixel + larger * per_row > allowed * (1 - 1e-9)
