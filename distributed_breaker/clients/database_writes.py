"""What a write gives back, and how one is written down so that it can be carried out later.

A statement is compiled as its driver would be sent it, and its values are kept as JSON: what is
carried out later is what would have been sent now.  Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Dialect, Engine, Insert, TextClause, Update, exc, inspect
from sqlalchemy.dialects import postgresql, sqlite

from ..fallback.outbox import JsonValue
from .database_values import NotKept, decode, encode

LARGEST = 2**20  # bytes of one write, so that a replay never holds too many

# What tells the parameters apart is the dialect's, and how they are sent the driver's: JSON and the
# like become text by these dialects, which know no driver.
_DRIVERLESS: dict[str, type[Dialect]] = {
    "postgresql": postgresql.base.PGDialect,
    "sqlite": sqlite.base.SQLiteDialect,
}


class Written(int):
    """How many rows a write has changed; 0 while it waits.

    Attributes:
        queued: whether it waits on disk, to be carried out once the database admits it.
        key: what the database will know it by then; None: it does not wait.
    """

    queued: bool
    key: str | None

    def __new__(cls, changed: int = 0, queued: bool = False, key: str | None = None) -> Written:
        """A count of rows that says what has become of the write."""
        self = super().__new__(cls, changed)
        self.queued = queued
        self.key = key
        return self

    def __repr__(self) -> str:
        return f"<queued write {self.key}>" if self.queued else super().__repr__()


class CannotWait(exc.InvalidRequestError):
    """A write that could not be carried out later as it is now.  The message names the remedy, and
    no value."""


class Statement(NamedTuple):
    """What a driver is given."""

    sql: str
    values: Any
    """A dictionary or a tuple, or a list of such for several executions."""


# ---------------------------------------------------------------------------- statements


def write_down(statement: Any, params: Any, engine: Engine) -> dict[str, Any]:
    """A write as it can be kept.

    Args:
        statement: text, or an INSERT, UPDATE or DELETE of Core or the ORM, without rows as its
            answer.
        params: its values by name, or a list of such.
        engine: what will carry it out; it is not asked.

    Raises:
        CannotWait: it could not be carried out later as it is now.
    """
    dialect = engine.dialect
    if dialect.name not in _DRIVERLESS:
        raise CannotWait(f"writes wait for PostgreSQL and SQLite only, not for {dialect.name}")
    if dialect.name == "sqlite" and engine.url.database in (None, "", ":memory:"):
        raise CannotWait("a database in memory is another one in each thread and process")
    levels = (
        getattr(dialect, "_on_connect_isolation_level", None),
        engine.get_execution_options().get("isolation_level"),
    )
    if "AUTOCOMMIT" in levels:
        raise CannotWait("an engine in AUTOCOMMIT has no transactions")
    many = isinstance(params, Sequence)
    try:
        statement, sets = _prepared(statement, list(params) if many else [params or {}], many)
        options = {**engine.get_execution_options(), **statement.get_execution_options()}
        schemas = options.get("schema_translate_map")
        compiled = statement.compile(
            dialect=dialect,
            column_keys=None if isinstance(statement, TextClause) else list(sets[0]),
            for_executemany=many,
            **(
                {"schema_translate_map": schemas, "render_schema_translate": True}
                if schemas
                else {}
            ),
        )
        made = [_values(compiled, values) for values in sets]
    except CannotWait:
        raise
    except exc.SQLAlchemyError as error:
        # Some of SQLAlchemy's messages hold values.
        raise CannotWait(f"it cannot be compiled: {type(error).__name__}") from error
    payload = {
        "sql": made[0][0],
        "style": dialect.paramstyle,
        "many": many,
        "values": [values for _, values in made],
    }
    if len(json.dumps(payload)) > LARGEST:
        raise CannotWait(f"it has more than {LARGEST} bytes: split it")
    return payload


def _prepared(statement: Any, sets: list[Any], many: bool) -> tuple[Any, list[dict[str, Any]]]:
    """A statement that asks for nothing back, and its sets of values by names that it knows."""
    if not sets or any(set(one) != set(sets[0]) for one in sets):
        raise CannotWait("all of several executions must have the same parameters")
    if isinstance(statement, TextClause):
        return statement, sets
    if isinstance(statement, Insert):
        statement = statement.inline()  # nothing is fetched, neither before nor after
    entity = statement.entity_description.get("entity")
    mapper: Any = None if entity is None else inspect(entity, raiseerr=False)
    if mapper is not None:
        if mapper.polymorphic_on is not None or len(mapper.tables) > 1:
            raise CannotWait(f"{entity.__name__} has heirs or several tables: use its table")
        if many and isinstance(statement, Update):
            raise CannotWait("the ORM's update by primary keys cannot wait: use the table's")
        if isinstance(statement, Insert):
            names = {attr.key: attr.columns[0].key for attr in mapper.column_attrs}
            sets = [{names.get(name, name): value for name, value in one.items()} for one in sets]
    return statement, sets


def _values(compiled: Any, given: dict[str, Any]) -> tuple[str, JsonValue]:
    """The text and the values of one execution."""
    if compiled.effective_returning:
        raise CannotWait("it gives rows back")
    binds = compiled.binds
    known = {bind.key for bind in binds.values()}.union(binds)
    if compiled.isinsert or compiled.isupdate or compiled.isdelete:
        for name in given:
            if name not in known:
                raise CannotWait(f"it has no parameter {name!r}")
    values = compiled.construct_params(given, escape_names=False)
    _add_defaults(compiled, values)
    types = _driverless(compiled.dialect)
    for name, value in values.items():
        values[name] = _processed(name, binds[name], value, types)
    state = compiled.construct_expanded_state(values)
    found: dict[str, JsonValue] = {}
    for name, value in state.parameters.items():
        try:
            found[name] = encode(value)
        except NotKept as error:
            raise CannotWait(f"the parameter {name!r} {error}") from None
        except RecursionError:
            raise CannotWait(f"the parameter {name!r} is nested too deeply") from None
    if state.positiontup is None:
        return state.statement, dict(found)
    return state.statement, [found[name] for name in state.positiontup]


def _add_defaults(compiled: Any, values: dict[str, Any]) -> None:
    """What the columns' own defaults give, once and now."""
    columns = compiled.insert_prefetch if compiled.isinsert else ()
    columns = compiled.update_prefetch if compiled.isupdate else columns
    for column in columns:
        default = column.default if compiled.isinsert else column.onupdate
        try:
            if column.key not in values or not (default.is_scalar or default.is_callable):
                raise TypeError("it is none of Python's")
            # Nobody executes anything yet, so there is no context to look at.
            values[column.key] = default.arg(None) if default.is_callable else default.arg
        except Exception as error:
            raise CannotWait(
                f"the default of the column {column.key!r} cannot be told before the statement is "
                f"executed: give a value"
            ) from error


def _driverless(dialect: Dialect) -> Dialect:
    found = _DRIVERLESS[dialect.name]()
    for name in ("_json_serializer", "_json_deserializer"):
        setattr(found, name, getattr(dialect, name, None))
    return found


def _processed(name: str, bind: Any, value: Any, dialect: Dialect) -> Any:
    process = bind.type.dialect_impl(dialect).bind_processor(dialect)
    if process is None:
        return value
    try:
        if bind.expanding:
            return [process(one) for one in value]
        return process(value)
    except Exception as error:
        raise CannotWait(
            f"the parameter {name!r} is a {type(value).__name__}, which is nothing for its column"
        ) from error


def take_up(payload: Any, dialect: Dialect) -> Statement:
    """What ``write_down`` has kept.

    Raises:
        ValueError, TypeError, KeyError, ArithmeticError: it is none, or not for this driver.
    """
    sql, style, many, sets = (payload[name] for name in ("sql", "style", "many", "values"))
    if style != dialect.paramstyle:
        raise ValueError(f"it is for a driver with parameters as {style}, not {dialect.paramstyle}")
    made: list[Any] = []
    for values in sets:
        if isinstance(values, dict):
            made.append({name: decode(value) for name, value in values.items()})
        else:
            made.append(tuple(decode(value) for value in values))
    return Statement(str(sql), made if many else made[0])
