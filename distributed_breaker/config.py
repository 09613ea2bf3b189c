"""From the configuration file, its overlay and the environment to checked values, or to a list of
everything that is wrong with them.

A value comes from the last of these that has it: the defaults, ``settings.default_…``, the file,
the overlay beside it (``circuit_breakers.<environment>.json``), the environment's variables, the
caller's own ``overrides``.  Nothing is loaded halfway.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote

from pydantic import BaseModel, ValidationError

from .address import redacted
from .alert_keys import VARIABLE, Alerts, Channel, Rule
from .sections import (
    KINDS,
    SECTIONS,
    CircuitSpec,
    Configuration,
    Service,
    Settings,
    schema,
)

__all__ = [
    "CircuitSpec",
    "Configuration",
    "ConfigurationError",
    "Loaded",
    "Problem",
    "load",
    "schema",
    "shown",
    "without_file",
]

DEFAULT_FILE = "config/circuit_breakers.json"
MOST_BYTES = 4_000_000
DEFAULTED = ("failure_threshold", "timeout", "success_threshold")
SECRET = re.compile(r"password|token|secret|webhook|(^|_)url$")
CHANNEL = re.compile(r"settings\.alerts\.channels\.[^.]+\.(url$|headers\.)")

Keys = tuple[str, ...]


class Problem(NamedTuple):
    """One thing that is wrong: in which file (or variable), at which key, with which value."""

    file: str
    path: str
    value: object
    message: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.path}" if self.path else self.file
        return f"{where}: {self.message}"


class ConfigurationError(ValueError):
    """The configuration cannot be used; nothing of it was loaded.

    Attributes:
        problems: everything that is wrong with it.
    """

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return f"{len(self.problems)} problems in the configuration:\n{lines}"


@dataclass(frozen=True)
class Loaded:
    """A configuration, and where it came from.

    Attributes:
        configuration: the values.
        sources: for each key, dotted, where its value came from: ``default``,
            ``settings.default_timeout``, a file, a variable's name, or ``argument``.
        files: the files that were read.
        watched: the files whose change would change it, also those that are not there.
    """

    configuration: Configuration
    sources: dict[str, str]
    files: list[Path]
    watched: list[Path]

    @property
    def values(self) -> dict[str, Any]:
        """Each value by its dotted key, secrets included; see ``shown``."""
        return dict(_leaves(self.configuration))


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    environment: str | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read the configuration.

    Args:
        path: the file; None: what ``CIRCUIT_BREAKER_CONFIG`` names, else
            ``config/circuit_breakers.json``.
        environment: which overlay; None: what ``ENVIRONMENT`` says, else the file's own
            ``settings.environment``.
        environ: the environment's variables; None: the process's.
        overrides: values that beat all others, nested as in the file.

    Raises:
        ConfigurationError: with everything that is wrong.
    """
    variables = os.environ if environ is None else environ
    file = Path(path or variables.get("CIRCUIT_BREAKER_CONFIG") or DEFAULT_FILE)
    merging = _Merging()
    base = _read(file)
    merging.add(base, str(file))
    named = environment or variables.get("ENVIRONMENT") or _get(base, "settings", "environment")
    overlay = _overlay(file, named) if isinstance(named, str) else file
    files = [file]
    if overlay != file and overlay.exists():
        merging.add(_read(overlay), str(overlay))
        files.append(overlay)
    for keys, value, name in _from_environment(variables, merging.values):
        merging.put(keys, value, name)
    if environment:
        merging.put(("settings", "environment"), environment, "argument")
    merging.add(dict(overrides or {}), "argument")
    merging.fill_defaults()
    configuration = merging.validated(str(file))
    return Loaded(configuration, merging.all_sources(configuration), files, [file, overlay])


def without_file(environ: Mapping[str, str] | None = None) -> Configuration:
    """What the environment's variables say by themselves, for whoever has no file.

    Raises:
        ConfigurationError: with everything that is wrong.
    """
    merging = _Merging()
    for keys, value, name in _from_environment(os.environ if environ is None else environ, {}):
        merging.put(keys, value, name)
    return merging.validated("the environment")


def shown(path: str, value: object) -> object:
    """The value of a key as people may see it: passwords are hidden, and URLs lose theirs.

    A channel's URL is a secret as a whole, since whoever knows it may post there.
    """
    if isinstance(value, dict):
        return {key: shown(f"{path}.{key}", one) for key, one in value.items()}
    if CHANNEL.match(path):
        named = isinstance(value, str) and VARIABLE.fullmatch(value)
        return value if value is None or named else "***"
    if value is None or not SECRET.search(path.rpartition(".")[2]):
        return value
    return redacted(value) if isinstance(value, str) and "://" in value else "***"


# ---------------------------------------------------------------------------- files


def _overlay(file: Path, environment: str) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", environment):
        message = "an environment's name has letters, digits, _ and - only"
        _fail("ENVIRONMENT", "settings.environment", environment, message)
    return file.with_name(f"{file.stem}.{environment}{file.suffix}")


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_BYTES:
            _fail(str(file), "", None, f"is larger than {MOST_BYTES:,} bytes")
        text = file.read_text("utf-8")
    except FileNotFoundError:
        message = "there is no such file: name it in CIRCUIT_BREAKER_CONFIG, or create it"
        _fail(str(file), "", None, message)
    except (OSError, UnicodeDecodeError) as error:
        _fail(str(file), "", None, f"cannot be read: {error}")
    problems: list[Problem] = []

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            twice = sorted({key for key, _ in pairs if sum(k == key for k, _ in pairs) > 1})
            problems.append(Problem(str(file), "", twice, f"has a key twice: {', '.join(twice)}"))
        return made

    def no_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number of JSON")

    try:
        values = json.loads(text, object_pairs_hook=object_of, parse_constant=no_number)
    except json.JSONDecodeError as error:
        where = f"{file}:{error.lineno}:{error.colno}"
        _fail(where, "", None, f"is not JSON: {error.msg}")
    except (ValueError, RecursionError) as error:
        _fail(str(file), "", None, f"is not JSON: {error}")
    if not isinstance(values, dict):
        problems.append(Problem(str(file), "", None, "must hold a JSON object"))
    if problems:
        raise ConfigurationError(problems)
    assert isinstance(values, dict)
    return values


def _fail(file: str, path: str, value: object, message: str) -> NoReturn:
    raise ConfigurationError([Problem(file, path, value, message)])


def _get(values: object, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


# ---------------------------------------------------------------------------- the environment


def _from_environment(
    variables: Mapping[str, str], values: dict[str, Any]
) -> Iterator[tuple[Keys, Any, str]]:
    """What the variables say, as (keys, value, variable).  An empty variable says nothing."""
    env = {name: value for name, value in variables.items() if value != ""}
    enabled = env.get("CIRCUIT_BREAKERS_ENABLED")
    if enabled is not None:
        yield ("settings", "enabled"), _boolean(enabled), "CIRCUIT_BREAKERS_ENABLED"
    if "ENVIRONMENT" in env:
        yield ("settings", "environment"), env["ENVIRONMENT"], "ENVIRONMENT"
    sections = [
        (service, kind)
        for service, parts in (_get(values, "services") or {}).items()
        for kind in KINDS
        if isinstance(_get(parts, kind), dict)
    ]
    caches: list[Keys] = [("services", s, kind) for s, kind in sections if kind == "cache"]
    said = _get(values, "settings", "redis_url") is not None
    yield from _redis(env, caches, said or not caches)
    if "MODEL_PATH" in env:
        for service, kind in sections:
            if kind == "ml":
                yield ("services", service, kind, "model_path"), env["MODEL_PATH"], "MODEL_PATH"


def _redis(
    env: Mapping[str, str], caches: list[Keys], alone: bool
) -> Iterator[tuple[Keys, Any, str]]:
    """Where Redis is: CIRCUIT_BREAKER_REDIS_URL for the circuits; REDIS_URL, else REDIS_HOST,
    REDIS_PORT and REDIS_PASSWORD, for them and for the caches, whose Redis is the circuits' own
    unless that stands ``alone``."""
    address = "settings", "redis_url"
    single = [n for n in ("REDIS_HOST", "REDIS_PORT", "REDIS_PASSWORD") if n in env]
    if "CIRCUIT_BREAKER_REDIS_URL" in env:
        name = "CIRCUIT_BREAKER_REDIS_URL"
        yield address, env[name], name
    elif "REDIS_URL" in env:
        yield address, env["REDIS_URL"], "REDIS_URL"
    elif "REDIS_HOST" in env and alone:
        access = f":{quote(env['REDIS_PASSWORD'], safe='')}@" if "REDIS_PASSWORD" in env else ""
        url = f"redis://{access}{env['REDIS_HOST']}:{env.get('REDIS_PORT', '6379')}/0"
        yield address, url, "REDIS_HOST"
    for cache in caches:
        if "REDIS_URL" in env:
            yield (*cache, "redis_url"), env["REDIS_URL"], "REDIS_URL"
            continue
        if single:
            yield (*cache, "redis_url"), None, single[0]
        for name in single:
            value: Any = env[name]
            if name == "REDIS_PORT" and re.fullmatch(r"[0-9]{1,9}", value):
                value = int(value)
            yield (*cache, name.lower()), value, name


def _boolean(text: str) -> bool | str:
    """The text itself if it is neither, so that the error shows it."""
    words = {"true": True, "1": True, "yes": True, "on": True}
    words |= {"false": False, "0": False, "no": False, "off": False}
    return words.get(text.strip().lower(), text)


# ---------------------------------------------------------------------------- merging, checking


class _Merging:
    """Values of all sources, and for each where it came from."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._sources: dict[Keys, str] = {}

    def add(self, values: dict[str, Any], source: str, under: Keys = ()) -> None:
        """Merge an object: objects key by key, anything else as a whole."""
        for key, value in values.items():
            keys = (*under, str(key))
            if isinstance(value, Mapping) and not _is_one_value(keys):
                if not isinstance(_get(self.values, *keys), dict):
                    self.put(keys, {}, source)
                self.add(dict(value), source, keys)
            else:
                self.put(keys, value, source)

    def put(self, keys: Keys, value: Any, source: str) -> None:
        """Set one value."""
        into = self.values
        for key in keys[:-1]:
            found = into.get(key)
            if not isinstance(found, dict):
                found = into[key] = {}
            into = found
        into[keys[-1]] = value
        for known in [k for k in self._sources if k[: len(keys)] == keys]:
            del self._sources[known]
        self._sources[keys] = source

    def fill_defaults(self) -> None:
        """Where a section is silent, ``settings.default_…`` speaks."""
        for service, parts in dict(_get(self.values, "services") or {}).items():
            for kind in KINDS:
                section = _get(parts, kind)
                if not isinstance(section, dict):
                    continue
                for key in DEFAULTED:
                    value = _get(self.values, "settings", f"default_{key}")
                    if key not in section and value is not None:
                        source = f"settings.default_{key}"
                        self.put(("services", service, kind, key), value, source)

    def validated(self, file: str) -> Configuration:
        try:
            return Configuration.model_validate(self.values)
        except ValidationError as error:
            problems = [self._problem(dict(one), file) for one in error.errors(include_url=False)]
        # What is wrong with a default or a variable is said once, not for each service.
        once = {(p.file, p.path if "." in p.file else p.message): p for p in reversed(problems)}
        said = [p for p in problems if p in once.values()]
        raise ConfigurationError([p for p in said if not p.file.startswith("settings.")])

    def _problem(self, error: dict[str, Any], file: str) -> Problem:
        keys = tuple(str(key) for key in error["loc"] if key != "[key]")
        path, value = ".".join(keys), error["input"]
        if error["type"] == "extra_forbidden":
            message = f"unknown key{_suggestion(keys)}"
        else:
            said = str(error["msg"]).removeprefix("Value error, ")
            message = said[:1].lower() + said[1:]
            if not isinstance(value, dict | list | BaseModel):
                message += f", not {shown(path, value)!r}"
        return Problem(self._source(keys, file), path, shown(path, value), message)

    def _source(self, keys: Keys, otherwise: str) -> str:
        """Where a key's value came from, else what stands around it or in it."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._sources:
                return self._sources[keys[:length]]
        inside = [source for k, source in self._sources.items() if k[: len(keys)] == keys]
        return inside[-1] if inside else otherwise

    def all_sources(self, configuration: Configuration) -> dict[str, str]:
        """Where each value came from, the defaults included."""
        known = {".".join(keys): source for keys, source in self._sources.items()}
        return {path: known.get(path, "default") for path, _ in _leaves(configuration)}


def _is_one_value(keys: Keys) -> bool:
    return keys[-1] == "default_response"


def _leaves(configuration: Configuration) -> Iterator[tuple[str, Any]]:
    """Each value with its dotted key."""

    def walk(values: dict[str, Any], under: Keys) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            keys = (*under, key)
            if isinstance(value, dict) and value and not _is_one_value(keys):
                yield from walk(value, keys)
            else:
                yield ".".join(keys), value

    return walk(configuration.model_dump(mode="json", by_alias=True), ())


def _suggestion(keys: Keys) -> str:
    known = _known_keys(keys[:-1])
    near = difflib.get_close_matches(keys[-1], known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here are {', '.join(known)}"


# What stands in settings.alerts, by where and how deep.
_MODELS: dict[tuple[str | int, ...], type[BaseModel]] = {
    ("alerts", 2): Alerts,
    ("alerts", "channels", 4): Channel,
    ("alerts", "rules", 4): Rule,
}


def _known_keys(keys: Keys) -> list[str]:
    """The keys that are allowed below this one."""
    model: type[BaseModel] = Configuration
    if keys[:1] == ("settings",):
        model = _MODELS.get((*keys[1:3], len(keys)), Settings)
    elif keys[:1] == ("services",) and len(keys) > 1:
        model = SECTIONS[keys[2]] if len(keys) > 2 else Service
    return [field.alias or name for name, field in model.model_fields.items()]
