from stas_core import failures
from stas_core.errors import EmptyFile, InputError, UnreadableImage
from stas_core.failures import Failure


def failure(name: str, error: InputError) -> Failure:
    return Failure.of(name, "prepare_data", error)


def test_a_stage_prints_counts_of_reasons_and_a_line_for_each_kind_of_message() -> None:
    found = [failure(f"{number:02d}", EmptyFile(f"/in/{number:02d}.png holds 0 bytes")) for number in range(11)]
    found.append(failure("x", UnreadableImage("/in/x.png is cut short")))
    assert failures.lines(found) == [
        "failed: 11 empty_file, 1 unreadable_image",
        "failed: 11 x empty_file, such as 00: /in/00.png holds 0 bytes",
        "failed: x: unreadable_image: /in/x.png is cut short",
    ]
    assert failures.lines([]) == []


def test_only_so_many_kinds_are_printed_and_short_ids_are_not_taken_for_parts_of_words() -> None:
    found = [failure("a", EmptyFile(f"{number} bytes")) for number in range(20)]
    assert len(failures.lines(found)) == 1 + failures.SHOWN
    alike = [failure(name, EmptyFile(f"the run has no image {name}")) for name in ("a", "b", "image")]
    assert [len(some) for some in failures.groups(alike)] == [2, 1]  # "image" is a word of its own message
