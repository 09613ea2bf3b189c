"""A parser for the Lua of ``lua/breaker.lua``: a tree of nodes that know where they stand.

It takes what Lua 5.1 has and that file uses, and stops at anything else, so that no part of the
script goes without mutants unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

KEYWORDS = frozenset(
    "and break do else elseif end false for function if in local nil not or return then true "
    "while".split()
)
TOKEN = re.compile(
    r"(?P<blank>\s+|--[^\n]*)"
    r"|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<number>\d+)"
    r"|(?P<string>'(?:[^'\\\n]|\\.)*')"
    r"|(?P<sign>\.\.\.|\.\.|[<>=~]=|[-+*/%#<>=(){}\[\];:,.])"
)
# How strongly operators bind, weakest first; all are taken from the left, for `..` that is as good.
BINARY = (
    ("or",),
    ("and",),
    ("<", ">", "<=", ">=", "~=", "=="),
    ("..",),
    ("+", "-"),
    ("*", "/", "%"),
)


class Token(NamedTuple):
    """A word of the source; at the end there is one of the kind ``end``."""

    kind: str
    text: str
    start: int
    end: int


@dataclass
class Node:
    """A piece of the source.

    ``kind`` says what it is, ``text`` its operator or name, ``children`` its parts in order;
    ``sign`` is where an operator stands.
    """

    kind: str
    start: int
    end: int
    text: str = ""
    children: list[Node] = field(default_factory=list)
    sign: tuple[int, int] = (0, 0)

    def walk(self) -> Iterator[Node]:
        """The node and everything in it."""
        yield self
        for child in self.children:
            yield from child.walk()


def tokens(source: str) -> list[Token]:
    """The words of the source, without blanks and comments."""
    found, position = [], 0
    while position < len(source):
        match = TOKEN.match(source, position)
        if match is None:
            raise SyntaxError(
                f"no Lua that this parser knows: {source[position : position + 40]!r}"
            )
        kind, text = str(match.lastgroup), match.group()
        if kind == "name" and text in KEYWORDS:
            kind = "keyword"
        if kind != "blank":
            found.append(Token(kind, text, match.start(), match.end()))
        position = match.end()
    return [*found, Token("end", "", position, position)]


def parse(source: str) -> Node:
    """The tree of a whole file."""
    parser = Parser(source)
    block = parser.block()
    parser.expect("")
    return block


class Parser:
    """Recursive descent, one token ahead."""

    def __init__(self, source: str) -> None:
        self._tokens = tokens(source)
        self._at = 0

    # ---------------------------------------------------------------------- tokens

    @property
    def _next(self) -> Token:
        return self._tokens[self._at]

    @property
    def _last(self) -> int:
        return self._tokens[self._at - 1].end

    def _is(self, *texts: str) -> bool:
        return self._next.kind != "string" and self._next.text in texts

    def _take(self) -> Token:
        self._at += 1
        return self._tokens[self._at - 1]

    def _accept(self, text: str) -> bool:
        if not self._is(text):
            return False
        self._take()
        return True

    def expect(self, text: str) -> Token:
        """The next token, which must be this one (the end of the source is an empty text)."""
        if not self._is(text):
            raise SyntaxError(f"{text!r} expected, found {self._next}")
        return self._take()

    def _name(self) -> Token:
        if self._next.kind != "name":
            raise SyntaxError(f"a name expected, found {self._next}")
        return self._take()

    # ---------------------------------------------------------------------- statements

    def block(self) -> Node:
        """Statements up to a word that ends them."""
        node = Node("block", self._next.start, self._next.start)
        while not self._is("end", "else", "elseif", "") or self._next.kind == "string":
            node.children.append(self._statement())
            node.end = self._last
        return node

    def _statement(self) -> Node:
        start = self._next.start
        if self._accept("local"):
            if self._accept("function"):
                return self._function("function", start, self._name().text)
            name = self._names()
            values = self._list() if self._accept("=") else []
            return Node("local", start, self._last, name, values)
        if self._accept("function"):
            return self._function("function", start, self._name().text)
        if self._accept("if"):
            return self._if(start)
        if self._accept("while"):
            children = [self._expression()]
            self.expect("do")
            return self._ended(Node("while", start, start, "", [*children, self.block()]))
        if self._accept("for"):
            return self._for(start)
        if self._accept("do"):
            return self._ended(Node("do", start, start, "", [self.block()]))
        if self._accept("return"):
            values = [] if self._is("end", "else", "elseif", "") else self._list()
            return Node("return", start, self._last, "", values)
        if self._accept("break"):
            return Node("break", start, self._last)
        targets = [self._suffixed()]
        while self._accept(","):
            targets.append(self._suffixed())
        if self._accept("="):
            return self._made("assign", start, [*targets, *self._list()])
        if len(targets) != 1 or targets[0].kind != "call":
            raise SyntaxError(f"a statement expected at {start}")
        return Node("run", start, self._last, "", targets)

    def _made(self, kind: str, start: int, children: list[Node]) -> Node:
        return Node(kind, start, self._last, "", children)

    def _ended(self, node: Node) -> Node:
        self.expect("end")
        node.end = self._last
        return node

    def _names(self) -> str:
        names = [self._name().text]
        while self._accept(","):
            names.append(self._name().text)
        return ", ".join(names)

    def _function(self, kind: str, start: int, name: str) -> Node:
        self.expect("(")
        while not self._accept(")"):
            self._take()
        return self._ended(Node(kind, start, start, name, [self.block()]))

    def _if(self, start: int) -> Node:
        """Children: condition, block, condition, block …, and a last block if there is an else."""
        node = Node("if", start, start)
        node.children.append(self._expression())
        self.expect("then")
        node.children.append(self.block())
        while self._accept("elseif"):
            node.children.append(self._expression())
            self.expect("then")
            node.children.append(self.block())
        if self._accept("else"):
            node.children.append(self.block())
        return self._ended(node)

    def _for(self, start: int) -> Node:
        names = self._names()
        if not self._accept("="):
            self.expect("in")
        children = self._list()
        self.expect("do")
        return self._ended(Node("for", start, start, names, [*children, self.block()]))

    # ---------------------------------------------------------------------- expressions

    def _list(self) -> list[Node]:
        found = [self._expression()]
        while self._accept(","):
            found.append(self._expression())
        return found

    def _expression(self, level: int = 0) -> Node:
        if level == len(BINARY):
            return self._unary()
        left = self._expression(level + 1)
        while self._is(*BINARY[level]):
            sign = self._take()
            right = self._expression(level + 1)
            left = Node("binary", left.start, right.end, sign.text, [left, right], sign[2:])
        return left

    def _unary(self) -> Node:
        if self._is("not", "-", "#"):
            sign = self._take()
            operand = self._unary()
            return Node("unary", sign.start, operand.end, sign.text, [operand], sign[2:])
        return self._simple()

    def _simple(self) -> Node:
        token = self._next
        if token.kind in ("number", "string") or self._is("true", "false", "nil", "..."):
            self._take()
            kind = token.kind if token.kind in ("number", "string") else "literal"
            return Node(kind, token.start, token.end, token.text)
        if self._is("{"):
            return self._table()
        if self._accept("function"):
            return self._function("lambda", token.start, "")
        return self._suffixed()

    def _suffixed(self) -> Node:
        """A name or something in parentheses, with indices and calls behind it."""
        start = self._next.start
        if self._accept("("):
            node = Node("parentheses", start, start, "", [self._expression()])
            self.expect(")")
            node.end = self._last
        else:
            name = self._name()
            node = Node("name", name.start, name.end, name.text)
        while True:
            if self._accept("."):
                field_name = self._name().text
                node = Node("index", start, self._last, f"{node.text}.{field_name}", [node])
            elif self._accept("["):
                inner = self._expression()
                self.expect("]")
                node = Node("index", start, self._last, "", [node, inner])
            elif self._accept("("):
                arguments = [] if self._is(")") else self._list()
                self.expect(")")
                node = Node("call", start, self._last, node.text, [node, *arguments])
            else:
                return node

    def _table(self) -> Node:
        node = Node("table", self.expect("{").start, 0)
        while not self._accept("}"):
            if self._next.kind == "name" and self._tokens[self._at + 1].text == "=":
                self._take()
                self._take()
            node.children.append(self._expression())
            if not self._accept(","):
                self.expect("}")
                break
        node.end = self._last
        return node
