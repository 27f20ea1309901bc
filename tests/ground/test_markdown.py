from stas_core import markdown


def test_cells_cannot_break_the_table() -> None:
    text = markdown.table(["Id", "Message"], [["a|b", "two\nlines"], ["c", ""]])
    assert text == "| Id | Message |\n| --- | --- |\n| a\\|b | two lines |\n| c |  |"
