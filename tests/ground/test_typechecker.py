"""What all tests rely on: every call of the library is checked against its annotations."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float32, TypeCheckError

from stas_core import markdown
from stas_core.scores import metrics
from stas_core.slides.tiling import Box, Grid
from tests import typechecker

FAULTS = (TypeCheckError, BeartypeCallHintViolation)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.count(np.zeros((2, 3), bool), np.zeros((3, 2), bool)),  # "h w" is one size in a call
        lambda: metrics.is_target(np.zeros((2, 3))),  # not of 8 bits
        lambda: markdown.table("text", [[1]]),  # type: ignore[list-item]
        lambda: metrics.Counts(1, 2, 3.5),  # type: ignore[arg-type]
        lambda: Box(0, 0, 1, 1).within((0, 0, 2, 2)),  # type: ignore[arg-type]
        lambda: Grid(10, 10, 4, 1).tile("0", 0),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_call_of_the_library_is_found(call: Any) -> None:
    with pytest.raises(FAULTS):
        call()


def test_every_kind_of_function_is_checked() -> None:
    @dataclass(frozen=True)
    class Made:
        share: float
        row: Float32[np.ndarray, " n"]

        @classmethod
        def of(cls, number: int) -> int:
            return number

        @staticmethod
        def sum(a: Float32[np.ndarray, " n"], b: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
            return np.concatenate((a, b))[: len(a)]

        @property
        def name(self) -> str:
            return self.share  # type: ignore[return-value]

    for name in ("of", "sum", "name"):
        setattr(Made, name, typechecker._decorate(vars(Made)[name], typechecker=typechecker.checked))
    checked: Any = typechecker._decorate(Made, typechecker=typechecker.checked)
    row, longer = np.zeros(3, np.float32), np.zeros(4, np.float32)
    made: Any = checked(1, row)  # an int is a float, too
    assert checked.of(2) == 2 and checked.sum(row, row).shape == (3,)
    wrong: list[Any] = [
        lambda: checked("1", row),
        lambda: checked(1, row.astype(float)),
        lambda: checked.of("2"),
        lambda: checked.sum(row, longer),
        lambda: made.name,
    ]
    for call in wrong:
        with pytest.raises(FAULTS):
            call()
