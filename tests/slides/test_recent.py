"""What is kept of arrays: those of the most recent use, within the bytes that are allowed."""

from functools import partial

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stas_core.slides.recent import RecentArrays


@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 6))
def test_the_most_recent_are_kept_and_no_more_than_fit(keys: list[int], num_fitting: int) -> None:
    made: list[int] = []
    kept: RecentArrays[int] = RecentArrays(most_bytes=num_fitting * 5256)
    recent: list[int] = []  # the last is the most recent

    def make(key: int) -> np.ndarray:
        made.append(key)
        return np.full(5000, key, np.uint8)

    for key in keys:
        num_made = len(made)
        assert (kept.of(key, partial(make, key)) == key).all()
        assert (len(made) > num_made) == (key not in recent)
        recent = [*(other for other in recent if other != key), key][-max(1, num_fitting) :]
    kept.clear()
    num_made = len(made)
    assert all((kept.of(key, partial(make, key)) == key).all() for key in set(recent))
    assert len(made) == num_made + len(set(recent))


def test_what_is_larger_than_all_is_kept_until_the_next() -> None:
    kept: RecentArrays[str] = RecentArrays(most_bytes=10)
    first = kept.of("a", lambda: np.zeros(1000, np.uint8))
    assert kept.of("a", lambda: np.ones(1000, np.uint8)) is first
    assert kept.of("b", lambda: np.ones(1000, np.uint8)).all()
    assert kept.of("a", lambda: np.ones(1000, np.uint8)) is not first
