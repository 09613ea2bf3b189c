"""Which statements read: by what SQLAlchemy knows of them, and text by its words.

What cannot be told to be a read is a write.  Text is cut into words by sqlglot, which knows quotes,
comments and dollar signs of the dialects; whole parsing would take milliseconds, and would log text
that it does not understand.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from sqlalchemy import Delete, Insert, Sequence, TextClause, Update
from sqlalchemy.orm import Query
from sqlalchemy.sql import Executable, visitors
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.selectable import SelectBase, TextualSelect
from sqlglot import Dialect, TokenType
from sqlglot.errors import SqlglotError

LONGEST = 10_000  # characters of a text that is remembered
MOST_REMEMBERED = 1_000
LONGEST_SHOWN = 500  # characters of a text that is shown

# What sqlglot calls the dialects of SQLAlchemy; others are cut by the rules that most share.
_DIALECTS = {
    "postgresql": "postgres", "cockroachdb": "postgres", "sqlite": "sqlite", "mysql": "mysql",
    "mariadb": "mysql", "oracle": "oracle", "mssql": "tsql", "snowflake": "snowflake",
    "bigquery": "bigquery", "duckdb": "duckdb", "clickhouse": "clickhouse",
}  # fmt: skip
_BEGIN_READS = frozenset({"SELECT", "WITH", "VALUES", "TABLE", "EXPLAIN", "SHOW", "DESCRIBE"})
# Words that stand in no read, unless they are quoted.
_WRITE = frozenset(
    {"INSERT", "UPDATE", "DELETE", "MERGE", "INTO", "TRUNCATE", "CREATE", "DROP", "EXECUTE"}
)
_LOCK = frozenset({"UPDATE", "SHARE", "NO", "KEY"})  # after FOR
_CHANGES = frozenset({"INSERT", "UPDATE", "DELETE", "MERGE"})
_VERBS = _CHANGES | _BEGIN_READS - {"WITH"}  # what WITH ends with
# Functions that change something, of which it is known by their names.
_CHANGING = re.compile(r"nextval|next_value|setval|pg_notify|lo_.*|dblink.*|load_extension")
# Parameters as drivers write them, which are no SQL.
_PARAMETER = re.compile(r"%\(\w+\)s|%s")


def needs_no_session(statement: Any) -> bool:
    """Whether a statement is text, or of Core, and so means the same without the ORM."""
    if isinstance(statement, TextClause):
        return True
    marks = getattr(statement, "_propagate_attrs", None)  # as SQLAlchemy tells it itself
    return marks is not None and not marks and isinstance(statement, Executable)


def reads(statement: Any, dialect: str) -> bool:
    """Whether a statement only reads, as far as can be known.

    Args:
        statement: text, or SQLAlchemy's statement or legacy query.
        dialect: SQLAlchemy's name of the dialect, for text.
    """
    if isinstance(statement, str):
        return reads_text(statement, dialect)
    if isinstance(statement, TextClause):
        return reads_text(statement.text, dialect)
    if isinstance(statement, TextualSelect):
        return reads(statement.element, dialect)
    if isinstance(statement, Query):
        return reads(statement.statement, dialect)
    if not isinstance(statement, Executable):
        return False
    inner = getattr(statement, "element", None)
    if isinstance(inner, TextClause | SelectBase | UpdateBase) and not isinstance(
        statement, SelectBase
    ):
        return reads(inner, dialect)  # select(…).from_statement(…)
    if not isinstance(statement, SelectBase | FunctionElement):
        return False
    return not any(_writes(part, dialect) for part in visitors.iterate(statement))


def _writes(part: Any, dialect: str) -> bool:
    """Whether a part of a SELECT makes it a write."""
    if isinstance(part, UpdateBase | Sequence):
        return True
    if isinstance(part, FunctionElement):
        return _CHANGING.fullmatch(str(getattr(part, "name", "")).lower()) is not None
    if isinstance(part, TextualSelect):
        return not reads(part.element, dialect)
    if isinstance(part, TextClause):
        return _writing(part.text, dialect)
    return getattr(part, "_for_update_arg", None) is not None


def only_changes(statement: Any, dialect: str) -> bool:
    """Whether a statement is one INSERT, UPDATE, DELETE or MERGE that gives no rows back.

    Args:
        statement, dialect: see ``reads``.
    """
    if isinstance(statement, Insert | Update | Delete):
        return not len(statement.exported_columns)
    return isinstance(statement, TextClause) and _only_changes(statement.text, dialect)


@lru_cache(MOST_REMEMBERED)
def _only_changes(text: str, dialect: str) -> bool:
    words = _words(text, dialect)
    if words is None:
        return False
    if words[-1:] == [";"]:
        words.pop()
    depth, verb, before = 0, "", ""
    for word in words:
        if word == ";" or (word == "RETURNING" and before != ":"):
            return False
        depth += (word == "(") - (word == ")")
        if not verb and depth == 0 and (word in _VERBS or not (before or word == "WITH")):
            verb = word
        before = word
    return verb in _CHANGES


def reads_text(text: str, dialect: str) -> bool:
    """Whether the text of one or more statements only reads."""
    if len(text) > LONGEST:
        return _reads_text(text, dialect)
    return _remembered(text, dialect)


def _reads_text(text: str, dialect: str) -> bool:
    words = _words(text, dialect)
    if words is None:
        return False
    begins, found = True, False
    for word in words:
        if word == ";":
            begins = True
        elif begins and word != "(":
            if word not in _BEGIN_READS:
                return False
            begins, found = False, True
    return found and not _any_writes(words)


_remembered = lru_cache(MOST_REMEMBERED)(_reads_text)


@lru_cache(MOST_REMEMBERED)
def _writing(text: str, dialect: str) -> bool:
    """Whether a piece of text within a SELECT may write."""
    words = _words(text, dialect)
    return words is None or _any_writes(words)


def _any_writes(words: list[str]) -> bool:
    pairs = zip(words, [*words[1:], ""], strict=True)
    return any(
        word in _WRITE
        or (word == "FOR" and after in _LOCK)
        or (word == "LOCK" and after == "IN")
        or (after == "(" and _CHANGING.fullmatch(word.strip('"').lower()) is not None)
        for word, after in pairs
    )


@lru_cache(MOST_REMEMBERED)
def shown_of(text: str, dialect: str) -> str:
    """A text for people, without the values that stand in it; empty: it cannot be cut."""
    try:
        cut = Dialect.get_or_raise(_DIALECTS.get(dialect)).tokenize(_PARAMETER.sub("?", text))
    except (SqlglotError, RecursionError):
        return ""
    words = []
    for token in cut:
        value = token.token_type in _STRINGS or token.token_type is TokenType.NUMBER
        words.append("?" if value else token.text)
    return " ".join(words)[:LONGEST_SHOWN]


# ---------------------------------------------------------------------------- which tables

# What may stand between a word that is followed by a table and its name.
_BETWEEN = frozenset({"INTO", "ONLY", "TABLE", "IF", "NOT", "EXISTS", "OR", "IGNORE", "FROM", "("})
_FOLLOWED = frozenset({"INTO", "UPDATE", "TRUNCATE", "TABLE", "MERGE", "COPY"})


@lru_cache(MOST_REMEMBERED)
def names_of(text: str, dialect: str) -> frozenset[str] | None:
    """All words of a text that may be names of tables, in capitals; None: it cannot be cut."""
    words = _words(text, dialect)
    if words is None:
        return None
    return frozenset(_plain(word) for word in words if word and _NAME.match(word))


@lru_cache(MOST_REMEMBERED)
def targets_of(text: str, dialect: str) -> frozenset[str] | None:
    """The tables that a write names as its targets, in capitals; None: it may be any."""
    words = _words(text, dialect)
    found: set[str] = set()
    for i, word in enumerate(words or ()):
        assert words is not None
        if word in _FOLLOWED or (word == "DELETE" and words[i + 1 : i + 2] == ["FROM"]):
            found |= _tables(words, i + 1)
    return frozenset(found) or None


def _tables(words: list[str], i: int) -> set[str]:
    """The tables of a list that begins there, without their schemas."""
    found = set()
    while i < len(words) and words[i] in _BETWEEN:
        i += 1
    while i < len(words) and _NAME.match(words[i]):
        while words[i + 1 : i + 2] == ["."] and i + 2 < len(words):
            i += 2
        found.add(_plain(words[i]))
        if words[i + 1 : i + 2] != [","]:
            break
        i += 2
    return found


_NAME = re.compile(r'"|[^\W\d]')


def _plain(word: str) -> str:
    return word.strip('"').upper()


_STRINGS = frozenset(kind for kind in TokenType if kind.name.endswith("STRING"))
_COMMANDS = frozenset({TokenType.COMMAND, TokenType.SHOW, TokenType.EXECUTE, TokenType.FETCH})


def _words(text: str, dialect: str) -> list[str] | None:
    """A text's words in capitals, quoted names with their quotes, strings as one empty word each;
    None: it cannot be cut."""
    if "/*!" in text:
        return None  # MySQL carries out what stands in such comments
    try:
        cut = Dialect.get_or_raise(_DIALECTS.get(dialect)).tokenize(_PARAMETER.sub("?", text))
    except (SqlglotError, RecursionError):
        return None
    found: list[str] = []
    before: Any = None
    for token in cut:
        if token.token_type not in _STRINGS:
            found.append(
                f'"{token.text}"'
                if token.token_type is TokenType.IDENTIFIER
                else token.text.upper()
            )
        elif before is not None and before.token_type in _COMMANDS:
            # The whole rest of EXPLAIN and the like comes as one string.
            rest = _words(token.text, dialect)
            if rest is None:
                return None
            found += rest
        else:
            found.append("")
        before = token
    return found
