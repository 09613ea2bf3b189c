"""The services of one process: from a configuration to circuits and clients, kept up to date.

A change of the file is checked and then applied while calls go on: policies are offered to the
fleet, where the highest ``config_version`` rules; a file that cannot be used changes nothing, and
that is said.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from .breaker import CircuitBreaker
from .clients.cache import CacheClient
from .clients.client import Client, ManyHosts
from .clients.tasks import TaskClient, TaskQueue
from .config import ConfigurationError, Loaded, load
from .policy import Policy
from .process import Follower, OwnLock, before_uwsgi_forks, follow_process, uwsgi_without_threads
from .registry import CircuitBreakerRegistry
from .sections import KINDS, SECTION_OF, Configuration, circuit_names
from .workers import start_thread

if TYPE_CHECKING:
    from .clients.database import DatabaseClient
    from .clients.http import HttpClient
    from .clients.ml import MlClient

LOOK_EVERY = 1.0  # s between looks at the files
CLIENTS: dict[str, type[Client]] = {
    **dict.fromkeys(KINDS, Client),
    "cache": CacheClient,
    "tasks": TaskClient,
}

Stamp = tuple[int, int, int]  # time of change, size, inode

log = logging.getLogger("distributed_breaker")

# What is begun beside the services that the getters use, closed before them, and told of forks.
# Monitoring, which stands above this file, enters itself here.
companions: list[Callable[[Services], Follower]] = []


class Status(NamedTuple):
    """What there is to know of a configuration in force.

    Attributes:
        files: the files that it came from.
        environment: which overlay.
        version: ``settings.config_version``.
        loaded_at: seconds since 1970.
        problem: why a later state of the files is not in force; empty: it is.
    """

    files: tuple[str, ...]
    environment: str
    version: int
    loaded_at: float
    problem: str


class UnknownService(LookupError):
    """There is no such service, or it has no such part."""


class Services:
    """The circuits and clients that one configuration asks for.

    Args:
        path, environment, environ, overrides: see ``load``.
        registry: where the circuits come from; None: the configuration's own.

    Raises:
        ConfigurationError: the configuration cannot be used.
    """

    _lock = OwnLock()

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        environment: str | None = None,
        environ: Mapping[str, str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        registry: CircuitBreakerRegistry | None = None,
    ) -> None:
        self._path = path
        self._arguments: dict[str, Any] = {
            "environment": environment,
            "environ": environ,
            "overrides": overrides,
        }
        self._loaded = self._load()
        # Not known yet: the first look reads once more what may have changed while it was read.
        self._stamps: dict[Path, Stamp | None] = {}
        self._loaded_at = time.time()
        self._problem = ""
        settings = self.configuration.settings
        self.registry = registry or CircuitBreakerRegistry.from_url(
            self.configuration.redis_url, settings.namespace
        )
        self.registry.flush_at_exit = settings.cleanup_on_shutdown
        self._clients: dict[tuple[str, str, str], Client] = {}
        self._alone: dict[str, CircuitBreaker] = {}  # wanted without a client
        self.beside: list[Follower] = []
        self._stopping = threading.Event()
        self._watch()
        follow_process(self)

    def _load(self) -> Loaded:
        return load(self._path, **self._arguments)

    @property
    def configuration(self) -> Configuration:
        """The values in force."""
        return self._loaded.configuration

    @property
    def loaded(self) -> Loaded:
        """The same, and where they came from."""
        return self._loaded

    @property
    def status(self) -> Status:
        """What there is to know of the configuration in force."""
        settings = self.configuration.settings
        files = tuple(str(file) for file in self._loaded.files)
        return Status(
            files, settings.environment, settings.config_version, self._loaded_at, self._problem
        )

    # ------------------------------------------------------------------ clients

    def client(self, kind: str, service: str, part: str = "", **explicit: Any) -> Client:
        """The client of one part of a service; the same object for the same part.

        Args:
            kind: ``database``, ``cache``, ``http``, ``ml`` or ``tasks``.
            service: the service's name in the file.
            part: of ``http``, the service_type.
            explicit: what beats the file, such as ``base_url``; None says nothing.

        Raises:
            UnknownService: the file has no such service, or no such part of it.
        """
        key = (kind, service, part)
        client = self._clients.get(key)
        if client is None:
            with self._lock:
                client = self._clients.get(key)
                if client is None:
                    client = self._clients[key] = self._make(key, explicit)
                    return client
        client.use(**explicit)
        return client

    def shares_predictions(self, service: str) -> bool:
        """Whether the predictions of a service are kept in its cache, too."""
        parts = self.configuration.services.get(service)
        return bool(parts and parts.cache and parts.ml and parts.ml.share_predictions)

    def circuit(self, name: str) -> CircuitBreaker:
        """A circuit of the file by its name, without a client: for what only looks at it.

        Raises:
            UnknownService: the file asks for no such circuit.
        """
        if (known := self._alone.get(name)) is not None:
            return known
        circuits = self.configuration.circuits()
        if name not in circuits:
            raise UnknownService(
                f"no circuit {name!r}: {self._loaded.files[0]} has {', '.join(circuits) or 'none'}"
            )
        _, kind, policy, on = circuits[name]
        with self._lock:
            found = self.registry.breaker(name, _class_of(kind).policy(policy), disabled=not on)
            self._alone[name] = found
        return found

    def clients(self) -> list[Client]:
        """Those that were asked for in this process."""
        return list(self._clients.values())

    def _make(self, key: tuple[str, str, str], explicit: Mapping[str, Any]) -> Client:
        kind, service, part = key
        values = self.configuration
        section = values.section(service, kind, part)
        if section is None:
            raise UnknownService(self._what_there_is(kind, service))
        made, off = _class_of(kind), not values.enabled(service)
        circuits = {
            own: self.registry.breaker(
                name, made.policy(section.policy(values.settings, own)), disabled=off
            )
            for own, name in circuit_names(service, kind, part, section).items()
        }
        client = made(".".join(filter(None, (service, kind, part))), circuits, section, explicit)
        if isinstance(client, ManyHosts):
            main = client.breaker.name
            client.further = lambda host: self.registry.breaker(
                f"{main}@{host}", client.breaker.policy, disabled=client.breaker.disabled
            )
        return client

    def _what_there_is(self, kind: str, service: str) -> str:
        services = self.configuration.services
        file = self._loaded.files[0]
        if service not in services:
            return f"unknown service {service!r}: {file} has {', '.join(services) or 'none'}"
        has = [k for k in KINDS if getattr(services[service], k) is not None]
        wanted = SECTION_OF.get(kind, kind)
        return f"service {service!r} has no section {wanted!r} in {file}, only {', '.join(has)}"

    # ------------------------------------------------------------------ changes of the file

    def reload(self) -> bool:
        """Look at the files again, and go by them.  Returns whether they can be used; if not, what
        was in force stays, and ``status.problem`` says why."""
        with self._lock:
            stamps = _stamps(self._loaded.watched)
            try:
                loaded = self._load()
            except ConfigurationError as error:
                self._stamps = stamps
                if str(error) != self._problem:
                    log.error("the configuration is not in force, the one before it is: %s", error)
                self._problem = str(error)
                return False
            self._stamps = stamps if loaded.watched == self._loaded.watched else {}
            self._problem = ""
            if loaded.configuration != self.configuration:
                self._apply(loaded)
        return True

    def _apply(self, loaded: Loaded) -> None:
        old, new = self.configuration, loaded.configuration
        self._loaded, self._loaded_at = loaded, time.time()
        moved = (old.redis_url, old.settings.namespace) != (new.redis_url, new.settings.namespace)
        if moved:
            log.warning(
                "settings.redis_url and settings.namespace are read at the start only: circuits "
                "stay where they are until this process is started again"
            )
        self.registry.flush_at_exit = new.settings.cleanup_on_shutdown
        for (kind, service, part), client in self._clients.items():
            section = new.section(service, kind, part)
            if section is None:
                log.warning("%s is gone from the configuration; it stays in use here", client.name)
                continue
            on = new.enabled(service)
            for own, circuit in client.circuits.items():
                _renew(circuit, type(client).policy(section.policy(new.settings, own)), on)
            client.configure(section)
        specs = new.circuits()
        for name in self._alone.keys() & specs.keys():
            _, kind, policy, on = specs[name]
            _renew(self._alone[name], _class_of(kind).policy(policy), on)
        version = new.settings.config_version
        log.info("the configuration has changed: version %d is in force", version)

    def _watch(self) -> None:
        if sys.is_finalizing() or before_uwsgi_forks() or uwsgi_without_threads():
            return
        # Where no thread can be started, the file is read at the start only.
        with contextlib.suppress(RuntimeError):
            start_thread("circuit-breaker-config", self._keep_looking)

    def _keep_looking(self) -> None:
        """Look at the files every second.  Asking for their stamps works on every file system, and
        sees the links that Kubernetes changes; notifications do not."""
        stopping = self._stopping
        while not stopping.wait(LOOK_EVERY):
            if self._stopping is not stopping:
                return
            try:
                if _stamps(self._loaded.watched) != self._stamps:
                    self.reload()
            except Exception:
                log.exception("the configuration cannot be looked at")

    # ------------------------------------------------------------------ the process

    def close(self) -> None:
        """Stop looking at the files; close clients and registry.  Safe to call twice."""
        self._stopping.set()
        for companion in self.beside:
            companion.close()
        for client in self._clients.values():
            client.close()
        self.registry.close()

    def forked(self) -> None:
        """A child has none of its parent's threads."""
        vars(self).pop("_lock", None)
        if not self._stopping.is_set():
            self._stopping = threading.Event()
            self._watch()
        for companion in self.beside:
            companion.forked()

    def accompany(self) -> None:
        """Begin what runs beside them: see ``companions``.  None of it may keep them from work."""
        for begin in companions:
            try:
                self.beside.append(begin(self))
            except Exception:
                log.exception("what runs beside the circuit breakers cannot be begun")


def _class_of(kind: str) -> type[Client]:
    """What makes the clients of a kind; some need packages that not everybody has."""
    try:
        if kind == "http":
            from .clients.http import HttpClient

            return HttpClient
        if kind == "database":
            from .clients.database import DatabaseClient

            return DatabaseClient
        if kind == "ml":
            from .clients.ml import MlClient

            return MlClient
    except ImportError as error:
        what = {"http": "HTTP calls need", "database": "a database needs", "ml": "a model needs"}[
            kind
        ]
        raise ImportError(
            f"{what} the package {error.name}: install distributed-breaker[{kind}]"
        ) from error
    return CLIENTS[kind]


def _renew(circuit: CircuitBreaker, policy: Policy, on: bool) -> None:
    if policy != circuit.policy:
        circuit.adopt(policy)
    if on is circuit.disabled:
        circuit.switch(on=on)


def _stamps(files: list[Path]) -> dict[Path, Stamp | None]:
    """What changes when a file does."""
    found: dict[Path, Stamp | None] = {}
    for file in files:
        try:
            about = file.stat()
            found[file] = (about.st_mtime_ns, about.st_size, about.st_ino)
        except OSError:
            found[file] = None
    return found


# ---------------------------------------------------------------------------- the process's own


class _Current:
    """The services that the getters use."""

    lock = OwnLock()
    services: Services | None = None

    def forked(self) -> None:
        vars(self).pop("lock", None)

    def close(self) -> None:
        """They follow the process themselves."""


_current = _Current()
follow_process(_current)


def initialize(config_file: str | os.PathLike[str] | None = None, **arguments: Any) -> Services:
    """Load the configuration, and make it the one that the getters use.

    Without a call of this the first getter does it, with the defaults.  Called again, it replaces
    the services before, whose clients go on with what they know.

    Args:
        config_file: see ``load``, as for the others: ``environment``, ``environ``, ``overrides``.

    Raises:
        ConfigurationError: the configuration cannot be used, and nothing has changed.
    """
    with _current.lock:
        made = Services(config_file, **arguments)
        made.accompany()
        before, _current.services = _current.services, made
    if before is not None:
        before.close()
    return made


def current() -> Services:
    """The services that the getters use, loaded when they are first wanted."""
    found = _current.services
    if found is None:
        with _current.lock:
            found = _current.services
            if found is None:
                found = Services()
                found.accompany()
                _current.services = found
    return found


def shut_down() -> None:
    """Close the services that the getters use, if there are any; the next getter loads anew."""
    with _current.lock:
        found, _current.services = _current.services, None
    if found is not None:
        found.close()


def get_database_circuit_breaker(service: str, db_session: Any = None) -> DatabaseClient:
    """The client of a service's database.

    Args:
        service: its name in the file.
        db_session: SQLAlchemy's Session, scoped_session, sessionmaker or Engine, one of their twins
            for asyncio, or a URL; None: what was given before, else the file's ``url``.  A single
            Session is used only in the thread or task that gives it.

    Raises:
        UnknownService: the file has no such service, or it has no database.
        ConfigurationError: the file cannot be used.
        TypeError, ValueError: sessions cannot come from ``db_session``.
    """
    return cast("DatabaseClient", current().client("database", service, db_session=db_session))


def get_cache_circuit_breaker(service: str) -> CacheClient:
    """The client of a service's cache; for errors see ``get_database_circuit_breaker``."""
    return cast(CacheClient, current().client("cache", service))


def get_task_queue(service: str, app: Any) -> TaskQueue:
    """The task queue of a service: ``<service>.tasks`` is the circuit of its broker.

    Policy and folder are those of the service's cache.

    Args:
        service: its name in the file.
        app: the Celery application whose broker it is; the first one stays.

    For errors see ``get_database_circuit_breaker``.
    """
    return cast(TaskClient, current().client("tasks", service, app=app)).queue


def get_http_circuit_breaker(
    service: str, service_type: str | None = None, base_url: str | None = None
) -> HttpClient:
    """The client of a service's HTTP calls.

    Args:
        service: its name in the file.
        service_type: what is called; each has a circuit of its own.
        base_url: what relative paths are relative to; None: the one given before, else the file's.

    For errors see ``get_database_circuit_breaker``.
    """
    made = current().client("http", service, service_type or "", base_url=base_url)
    return cast("HttpClient", made)


def get_ml_circuit_breaker(service: str, model_path: str | None = None, **options: Any) -> MlClient:
    """The client of a service's model.

    Args:
        service: its name in the file.
        model_path: the model's file; None: the one given before, else the file's.
        options: further ones of ``MlClient``, such as ``model``, ``factory`` or ``default``.

    For errors see ``get_database_circuit_breaker``; TypeError: an option that there is not.
    """
    services = current()
    if "shared" not in options and services.shares_predictions(service):
        options["shared"] = services.client("cache", service)
    return cast("MlClient", services.client("ml", service, model_path=model_path, **options))
