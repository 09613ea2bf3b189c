"""The mutants of the model."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from .mutant import COMPARISONS, Change, Mutant, mutants_of, numbers_near

COMPARED: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: COMPARISONS["<"],
    ast.LtE: COMPARISONS["<="],
    ast.Gt: COMPARISONS[">"],
    ast.GtE: COMPARISONS[">="],
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
}
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "//",
    ast.FloorDiv: "*",
}
# An operator as it stands between its operands.
SIGN = re.compile(r"not\s+in|is\s+not|in|is|[-+*/%<>=!]+")
EXTREMES = {"min": "max", "max": "min"}
REMOVABLE = ("int", "str")
DROPPED = "pass"
Pairs = Iterator[tuple[str, Change]]


def mutants(source: str, file: str = "model") -> list[Mutant]:
    """All mutants of the model, in the order of the source."""
    return mutants_of(file, source, Changes(source).inside(ast.parse(source), ""))


class Changes:
    """Goes through the tree and yields (function, change)."""

    def __init__(self, source: str) -> None:
        self._source = source
        # Columns are counted in bytes, lines from 1.
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line.encode()))
        self._bytes = source.encode()

    # ---------------------------------------------------------------------- where things stand

    def _offset(self, line: int, column: int) -> int:
        return len(self._bytes[: self._lines[line - 1] + column].decode())

    def _span(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._offset(node.lineno, node.col_offset)
        return start, self._offset(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.expr) -> str:
        start, end = self._span(node)
        text = self._source[start:end]
        simple = isinstance(node, ast.Name | ast.Constant | ast.Attribute | ast.Call)
        return text if simple else f"({text})"

    def _instead(self, node: ast.stmt | ast.expr, text: str, operator: str) -> Change:
        return Change(*self._span(node), text, operator)

    def _sign(self, left: ast.expr, right: ast.expr) -> tuple[int, int]:
        start, end = self._span(left)[1], self._span(right)[0]
        match = SIGN.search(self._source, start, end)
        assert match is not None, self._source[start:end]
        return match.span()

    # ---------------------------------------------------------------------- statements

    def inside(self, node: ast.Module | ast.ClassDef | ast.FunctionDef, place: str) -> Pairs:
        """The changes of a module, class or function; what it is called is part of their names."""
        bound: set[str] = set()
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef | ast.ClassDef):
                yield from self.inside(statement, f"{place}.{statement.name}".lstrip("."))
                continue
            name = place
            if not isinstance(node, ast.FunctionDef):
                # A constant, or a field of a class, goes by its own name.
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                if isinstance(targets[0], ast.Name):
                    name = f"{place}.{targets[0].id}".lstrip(".")
            for change in self._statement(statement, bound, isinstance(node, ast.FunctionDef)):
                yield name, change

    def _statement(self, node: ast.stmt, bound: set[str], drop: bool) -> Iterator[Change]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # A docstring.
        if drop and self._droppable(node, bound):
            yield self._instead(node, DROPPED, f"drop {type(node).__name__.lower()}")
        if isinstance(node, ast.AugAssign):
            yield from self._augmented(node)
        if isinstance(node, ast.If):
            yield from self._condition(node.test, ("True", "False"))
        if isinstance(node, ast.While):
            yield from self._condition(node.test, ())
        for name, child in ast.iter_fields(node):
            for each in child if isinstance(child, list) else [child]:
                if isinstance(each, ast.stmt):
                    yield from self._statement(each, bound, drop)
                elif isinstance(each, ast.expr) and name != "annotation":
                    yield from self._expression(each)
                elif isinstance(each, ast.ExceptHandler):
                    for inner in each.body:
                        yield from self._statement(inner, bound, drop)

    def _droppable(self, node: ast.stmt, bound: set[str]) -> bool:
        """Whether something is left when the statement goes: not where a name is bound first."""
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {each.id for t in targets for each in ast.walk(t) if isinstance(each, ast.Name)}
            plain = all(isinstance(t, ast.Name | ast.Tuple) for t in targets)
            new = plain and bool(names - bound)
            bound |= names if plain else set()
            return not new
        kinds = (ast.AugAssign, ast.Expr, ast.For, ast.While, ast.Return, ast.Break, ast.Raise)
        return isinstance(node, kinds)

    def _augmented(self, node: ast.AugAssign) -> Iterator[Change]:
        start, end = self._sign(node.target, node.value)
        if type(node.op) in ARITHMETIC:
            yield Change(start, end, ARITHMETIC[type(node.op)] + "=", "arithmetic")
        yield Change(start, end, "=", "arithmetic")

    # ---------------------------------------------------------------------- expressions

    def _expression(self, node: ast.expr) -> Iterator[Change]:
        """The changes of one expression and of everything in it."""
        if isinstance(node, ast.JoinedStr):
            # What stands in it has no places of its own before Python 3.12.
            yield from self._joined(node)
            return
        if isinstance(node, ast.Compare):
            yield from self._compare(node)
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
            sign = self._sign(node.left, node.right)
            yield Change(*sign, ARITHMETIC[type(node.op)], "arithmetic")
        elif isinstance(node, ast.BoolOp):
            yield from self._logic(node)
        elif isinstance(node, ast.UnaryOp):
            operator = "drop not" if isinstance(node.op, ast.Not) else "drop -"
            yield self._instead(node, self._text(node.operand), operator)
        elif isinstance(node, ast.IfExp):
            yield from self._condition(node.test, ("True", "False"))
        elif isinstance(node, ast.Constant):
            yield from self._constant(node)
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.comprehension):
                for condition in child.ifs:
                    yield from self._condition(condition, ("True", "False"))
                    yield from self._expression(condition)
                yield from self._expression(child.iter)
            elif isinstance(child, ast.keyword):
                yield from self._expression(child.value)
            elif isinstance(child, ast.expr) and not self._index(node, child):
                yield from self._expression(child)

    def _index(self, node: ast.expr, child: ast.expr) -> bool:
        """Whether the child is the name of an entry, which is as good as an attribute."""
        named = isinstance(child, ast.Constant) and isinstance(child.value, str)
        return named and isinstance(node, ast.Subscript)

    def _joined(self, node: ast.JoinedStr) -> Iterator[Change]:
        for index in range(len(node.values)):
            rest = ast.JoinedStr([*node.values[:index], *node.values[index + 1 :]])
            yield self._instead(node, ast.unparse(rest), "string")

    def _compare(self, node: ast.Compare) -> Iterator[Change]:
        operands = [node.left, *node.comparators]
        for op, left, right in zip(node.ops, operands, operands[1:], strict=False):
            for other in COMPARED[type(op)]:
                yield Change(*self._sign(left, right), other, "comparison")

    def _logic(self, node: ast.BoolOp) -> Iterator[Change]:
        other = "or" if isinstance(node.op, ast.And) else "and"
        for index in range(len(node.values)):
            rest = [self._text(v) for v in [*node.values[:index], *node.values[index + 1 :]]]
            this = "and" if isinstance(node.op, ast.And) else "or"
            yield self._instead(node, f" {this} ".join(rest), "drop operand")
        whole = f" {other} ".join(self._text(value) for value in node.values)
        yield self._instead(node, f"({whole})", "boolean")

    def _constant(self, node: ast.Constant) -> Iterator[Change]:
        if isinstance(node.value, bool):
            yield self._instead(node, str(not node.value), "boolean")
        elif isinstance(node.value, int):
            for text in numbers_near(node.value):
                yield self._instead(node, text, "number")
        elif isinstance(node.value, str):
            yield self._instead(node, '""' if node.value else '"x"', "string")

    def _call(self, node: ast.Call) -> Iterator[Change]:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in EXTREMES and len(node.args) > 1:
            yield self._instead(node.func, EXTREMES[name], "swap min and max")
            for argument in node.args:
                yield self._instead(node, self._text(argument), "drop call")
        elif name in EXTREMES:
            yield self._instead(node.func, EXTREMES[name], "swap min and max")
        elif name in REMOVABLE:
            yield self._instead(node, self._text(node.args[0]), "drop call")

    def _condition(self, node: ast.expr, fixed: tuple[str, ...]) -> Iterator[Change]:
        yield self._instead(node, f"not ({self._text(node).strip()})", "negate")
        for value in fixed:
            yield self._instead(node, value, "condition")
