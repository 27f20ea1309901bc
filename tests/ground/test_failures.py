from stas_core import failures
from stas_core.errors import EmptyFile, UnreadableImage
from stas_core.failures import Failure


def test_a_stage_prints_counts_of_reasons_and_the_first_failures() -> None:
    found = [
        Failure.of(f"{number:02d}", "prepare_data", EmptyFile(f"{number}.png holds 0 bytes")) for number in range(11)
    ]
    found.append(Failure.of("x", "prepare_data", UnreadableImage("x.png is cut short")))
    printed = failures.lines(found)
    assert printed[0] == "failed: 11 empty_file, 1 unreadable_image"
    assert printed[1] == "failed: 00: empty_file: 0.png holds 0 bytes"
    assert len(printed) == 1 + failures.SHOWN
    assert failures.lines([]) == []
