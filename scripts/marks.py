"""Text that a command makes, between the marks of a page that people write."""

from __future__ import annotations

Marks = tuple[str, str]


def marks(name: str) -> Marks:
    """The two comments between which the text of this name stands."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def between(page: str, text: str, around: Marks) -> str:
    """The page with ``text`` between its marks. Raises ValueError unless it has each mark once."""
    begin, end = around
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise ValueError(f"the page must have {begin} and then {end}, each once")
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
