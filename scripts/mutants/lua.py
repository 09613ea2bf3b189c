"""The mutants of the script."""

from __future__ import annotations

from collections.abc import Iterator

from .lua_syntax import Node, parse
from .mutant import COMPARISONS, Change, Mutant, mutants_of, numbers_near

ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*"}
EXTREMES = {"math.min": "math.max", "math.max": "math.min"}
# Calls that may be left out: what is made of their first argument.
REMOVABLE = frozenset(
    "div text kept math.floor refusal string.lower string.sub string.gsub whole unpack "
    "table.concat".split()
)
DROPPED = "do end"


def mutants(source: str, file: str = "lua") -> list[Mutant]:
    """All mutants of the script, in the order of the source."""
    return mutants_of(file, source, Changes(source).of(parse(source), "top"))


class Changes:
    """Goes through the tree and yields (function, change)."""

    def __init__(self, source: str) -> None:
        self._source = source

    def of(self, node: Node, function: str) -> Iterator[tuple[str, Change]]:
        """The changes of a node and of everything in it."""
        if node.kind == "function":
            function = node.text
        elif node.kind == "local" and function == "top":
            # A constant or a table at the top of the file goes by its own name.
            yield from (
                (node.text, change) for child in node.children for change in self._in(child)
            )
            return
        for change in self._here(node):
            yield function, change
        for child in node.children:
            yield from self.of(child, function)

    def _in(self, node: Node) -> Iterator[Change]:
        for each in node.walk():
            yield from self._here(each)

    def _text(self, node: Node) -> str:
        return self._source[node.start : node.end]

    def _here(self, node: Node) -> Iterator[Change]:
        """The changes of one node."""
        kinds = {
            "binary": self._binary,
            "unary": self._unary,
            "number": self._number,
            "string": self._string,
            "literal": self._literal,
            "call": self._call,
            "if": self._if,
            "while": self._while,
        }
        if node.kind in kinds:
            yield from kinds[node.kind](node)
        if node.kind in ("assign", "run", "for", "while", "return", "break"):
            yield Change(node.start, node.end, DROPPED, f"drop {node.kind}")

    def _binary(self, node: Node) -> Iterator[Change]:
        left, right = node.children
        start, end = node.sign
        if node.text in COMPARISONS:
            for other in COMPARISONS[node.text]:
                yield Change(start, end, other, "comparison")
        elif node.text in ARITHMETIC and self._text(right) != "0":  # a text becomes a number
            yield Change(start, end, ARITHMETIC[node.text], "arithmetic")
        elif node.text in ("and", "or"):
            yield Change(start, end, "or" if node.text == "and" else "and", "boolean")
        if node.text in ("and", "or", ".."):
            yield Change(node.start, node.end, self._text(left), "drop operand")
            yield Change(node.start, node.end, self._text(right), "drop operand")
        if node.text == "or" and left.kind == "binary" and left.text == "and":
            condition, then = left.children
            swapped = f"{self._text(condition)} and {self._text(right)} or {self._text(then)}"
            yield Change(node.start, node.end, swapped, "swap branches")

    def _unary(self, node: Node) -> Iterator[Change]:
        if node.text != "#":
            yield Change(node.start, node.end, self._text(node.children[0]), f"drop {node.text}")

    def _number(self, node: Node) -> Iterator[Change]:
        for text in numbers_near(int(node.text)):
            yield Change(node.start, node.end, text, "number")

    def _string(self, node: Node) -> Iterator[Change]:
        inner = node.text[1:-1]
        yield Change(node.start, node.end, "''" if inner else "'x'", "string")
        # Patterns are anchored; without the anchor they would also take what only holds it.
        if len(inner) > 1 and inner.startswith("^"):
            yield Change(node.start, node.end, f"'{inner[1:]}'", "anchor")
        if len(inner) > 1 and inner.endswith("$"):
            yield Change(node.start, node.end, f"'{inner[:-1]}'", "anchor")

    def _literal(self, node: Node) -> Iterator[Change]:
        other = {"true": "false", "false": "true"}.get(node.text)
        if other:
            yield Change(node.start, node.end, other, "boolean")

    def _call(self, node: Node) -> Iterator[Change]:
        called, *arguments = node.children
        if node.text in EXTREMES:
            yield Change(called.start, called.end, EXTREMES[node.text], "swap min and max")
            for argument in arguments:
                yield Change(node.start, node.end, f"({self._text(argument)})", "drop call")
        elif node.text in REMOVABLE:
            yield Change(node.start, node.end, f"({self._text(arguments[0])})", "drop call")

    def _if(self, node: Node) -> Iterator[Change]:
        for condition, block in zip(node.children[::2], node.children[1::2], strict=False):
            yield from self._condition(condition, ("true", "false"))
            assert block.kind == "block"

    def _while(self, node: Node) -> Iterator[Change]:
        yield from self._condition(node.children[0], ())

    def _condition(self, node: Node, fixed: tuple[str, ...]) -> Iterator[Change]:
        yield Change(node.start, node.end, f"not ({self._text(node)})", "negate")
        for value in fixed:
            yield Change(node.start, node.end, value, "condition")
