"""The keys of the configuration file: their types, bounds and defaults, and nothing else.

Every duration is in seconds.  The names are those that existing files use; how a file is found and
merged stands in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple, Self
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, Field, JsonValue, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from .alert_keys import Alerts
from .keys import (
    DAY,
    STRICT,
    Bytes,
    HttpUrl,
    Importable,
    Name,
    Percent,
    Port,
    RedisUrl,
    Seconds,
    Share,
    Status,
    StoreUrl,
    Text,
)
from .policy import Policy, check_namespace


class Keys(BaseModel):
    """A part of the file."""

    model_config = STRICT


class Settings(Keys):
    """What holds for all services."""

    enabled: bool = True
    """False makes every circuit a pass-through that counts nothing."""
    monitoring_enabled: bool = True
    """Whether metrics are collected and served."""
    metrics_port: Port = 9090
    """Where the stand-alone server serves metrics."""
    health_check_port: Port = 8080
    """Where the stand-alone server serves health."""
    auto_recovery: bool = True
    """False: an open circuit stays open until an operator resets it."""
    cleanup_on_shutdown: bool = True
    """Whether what is recorded is flushed when the process ends."""
    default_failure_threshold: int = Field(default=5, ge=1, le=1_000_000)
    """Where a section is silent: bad outcomes in a row that open a circuit."""
    default_timeout: float = Field(default=60.0, ge=0.001, le=30 * DAY)
    """Where a section is silent: seconds before recovery is tried."""
    default_success_threshold: int = Field(default=3, ge=1, le=1_000)
    """Where a section is silent: successful probes that close a circuit."""
    environment: Name = "development"
    """Names the overlay beside the file: circuit_breakers.<environment>.json."""
    config_version: int = Field(default=0, ge=0, le=9_000_000_000_000_000)
    """Raise it with every change of a circuit's numbers: in the fleet the highest version rules."""
    redis_url: StoreUrl | None = None
    """Where the circuits' state lives; unset: the Redis that the caches name; memory://: in each
    process for itself."""
    namespace: Annotated[str, AfterValidator(check_namespace)] = "default"
    """Fleets with different namespaces in one Redis have nothing to do with each other."""
    alerts: Alerts = Alerts()
    """Who is told when something is wrong; nobody, while no channel is named."""


class Circuit(Keys):
    """The numbers of a section's circuits; see ``Policy``."""

    failure_threshold: int = Field(default=5, ge=1, le=1_000_000)
    """Bad outcomes in a row that open the circuit."""
    timeout: float = Field(default=60.0, ge=0.001, le=30 * DAY)
    """Seconds that the circuit stays open before a probe is allowed (the open interval)."""
    success_threshold: int = Field(default=3, ge=1, le=1_000)
    """Successful probes that close the circuit."""
    failure_rate: float | None = Field(default=0.5, ge=0.0001, le=1)
    """Share of failed calls in the window that opens the circuit; null switches the rule off."""
    window: float = Field(default=60.0, ge=0.1, le=DAY)
    """Seconds that the rates look back over."""
    minimum_calls: int = Field(default=10, ge=1, le=1_000_000)
    """Calls in the window below which the rates are not looked at."""
    slow_call_duration: float | None = Field(default=None, ge=0.000001, le=DAY)
    """Seconds from which a call is slow; null: no slow-call rule."""
    slow_call_rate: float = Field(default=0.5, ge=0.0001, le=1)
    """Share of slow calls in the window that opens the circuit."""
    open_interval_max: float | None = Field(default=None, ge=0.001, le=30 * DAY)
    """Upper bound when the open interval grows; null keeps it constant."""
    backoff_multiplier: float = Field(default=2.0, ge=1, le=100)
    """Factor by which the open interval grows from one attempt to the next."""
    jitter: float = Field(default=0.1, ge=0, le=1)
    """Share by which an open interval is lengthened at random."""
    half_open_permits: int | None = Field(default=None, ge=1, le=16)
    """Probes at a time in the whole fleet; null: as many as success_threshold allows."""
    permit_lease: float = Field(default=30.0, ge=0.01, le=DAY)
    """Seconds after which a probe that never ended gives its permit back."""
    quorum: int = Field(default=2, ge=1, le=8)
    """Processes that must have seen failures before the fleet's circuit opens."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.half_open_permits is not None and self.half_open_permits > self.success_threshold:
            raise ValueError(
                f"half_open_permits ({self.half_open_permits}) is more than success_threshold "
                f"({self.success_threshold}), so some could never be used: lower it"
            )
        if self.open_interval_max is not None and self.open_interval_max < self.timeout:
            raise ValueError(
                f"open_interval_max ({self.open_interval_max:g}) is below timeout "
                f"({self.timeout:g}), with which the interval begins: raise it"
            )
        return self

    def policy(self, settings: Settings, circuit: str = "") -> Policy:
        """What these numbers are to a circuit, which is the last part of its name."""
        return Policy(
            failure_threshold=self.failure_threshold,
            failure_rate=self.failure_rate,
            window=self.window,
            minimum_calls=self.minimum_calls,
            slow_call_duration=self.slow_call_duration,
            slow_call_rate=self.slow_call_rate,
            open_interval=self.timeout,
            open_interval_max=self.open_interval_max,
            backoff_multiplier=self.backoff_multiplier,
            jitter=self.jitter,
            success_threshold=self.success_threshold,
            half_open_permits=self.half_open_permits,
            permit_lease=self.permit_lease,
            quorum=self.quorum,
            version=settings.config_version,
            auto_recovery=settings.auto_recovery,
        )


class Database(Circuit):
    """A service's database."""

    read_timeout: Seconds = 5.0
    """Seconds that a read may take."""
    write_timeout: Seconds = 10.0
    """Seconds that a write may take."""
    connection_timeout: Seconds = 3.0
    """Seconds that connecting may take."""
    enable_read_only_fallback: bool = True
    """Whether the service goes on reading while writes fail or are slow."""
    enable_cache_fallback: bool = True
    """Whether stored results are served while the read circuit is open."""
    enable_write_queue: bool = True
    """Whether single writes wait in a durable outbox while the write circuit is open."""
    cache_ttl: Seconds = 300.0
    """Seconds for which a stored result counts as fresh."""
    stale_ttl: float = Field(default=3_600.0, ge=0, le=30 * DAY)
    """Seconds beyond which a stored result is not served even while the circuit is open."""
    slow_query_threshold: Seconds = 2.0
    """Seconds from which a query is slow."""
    enable_query_analysis: bool = True
    """Whether slow queries are counted and their text is kept, without parameters."""
    enable_pool_monitoring: bool = True
    """Whether the connection pool is watched."""
    pool_check_interval: Seconds = 30.0
    """Seconds between looks at the pool."""
    max_pool_failures: int = Field(default=3, ge=1, le=1_000)
    """Exhaustions in a row from which the pool counts as unhealthy."""
    max_retries: int = Field(default=2, ge=0, le=20)
    """How often a read is tried again."""
    url: Text | None = None
    """SQLAlchemy's URL of the database, where no session is given."""
    read_url: Text | None = None
    """The same of a replica for reads."""
    outbox_path: Text | None = None
    """The file in which queued writes wait."""

    def policy(self, settings: Settings, circuit: str = "") -> Policy:
        """The same; slow queries end writing, so that what is left of the database is for reads."""
        policy = super().policy(settings)
        own = policy.slow_call_duration is not None or not self.enable_read_only_fallback
        if circuit != "write" or own:
            return policy
        return replace(policy, slow_call_duration=self.slow_query_threshold)


class Cache(Circuit):
    """A service's Redis cache, and the tiers behind it."""

    redis_host: Text = "localhost"
    """Host of the cache's Redis."""
    redis_port: Port = 6379
    """Its port."""
    redis_db: int = Field(default=0, ge=0, le=1_000)
    """Its database."""
    redis_password: str | None = Field(default=None, repr=False)
    """Its password."""
    redis_url: RedisUrl | None = Field(default=None, repr=False)
    """All of these in one, and what they cannot say; it beats them."""
    connection_timeout: Seconds = 2.0
    """Seconds that connecting may take."""
    socket_timeout: Seconds = 2.0
    """Seconds that an answer may take."""
    enable_memory_fallback: bool = True
    """Whether values are kept in this process's memory, too."""
    memory_cache_size: int = Field(default=1_000, ge=1, le=10_000_000)
    """How many values memory holds."""
    max_memory_usage: Share = 0.8
    """Share of memory_cache_bytes from which values move to disk."""
    memory_cache_bytes: Bytes = 64 * 1024 * 1024
    """How many bytes memory holds."""
    enable_disk_fallback: bool = True
    """Whether values that memory gives up are kept on disk."""
    disk_cache_dir: Text | None = None
    """The folder of the disk tier; unset: one of the user's cache folder."""
    disk_cache_bytes: int = Field(default=512 * 1024 * 1024, ge=2**20, le=2**40)
    """How many bytes the disk tier holds, at least a megabyte."""
    default_ttl: Seconds = 3_600.0
    """Seconds for which a value lives that is set without a time to live."""
    stale_ttl: float = Field(default=3_600.0, ge=0, le=30 * DAY)
    """Seconds beyond its life for which a value may be served while the circuit is open."""
    warm_share: float = Field(default=1.0, ge=0, le=1)
    """Share of the keys whose values are kept in the tiers when they are read from Redis; of the
    others only what is set or loaded here."""
    cache_key_prefix: str = Field(default="nightscan:", max_length=100)
    """What every key begins with."""
    health_check_key: Text | None = None
    """A key that is read once the open interval is over, so that no call needs to be the probe."""
    outbox_path: Text | None = None
    """The file in which writes wait while Redis is away."""

    @property
    def address(self) -> str:
        """The URL of the cache's Redis."""
        if self.redis_url is not None:
            return self.redis_url
        access = f":{quote(self.redis_password, safe='')}@" if self.redis_password else ""
        host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
        return f"redis://{access}{host}:{self.redis_port}/{self.redis_db}"


class HttpType(Circuit):
    """HTTP calls to one kind of service."""

    base_url: HttpUrl | None = None
    """What relative paths are relative to."""
    service_name: Text | None = None
    """How the service is called in messages and metrics."""
    connect_timeout: Seconds = 3.0
    """Seconds that connecting may take."""
    read_timeout: Seconds = 10.0
    """Seconds between two pieces of the answer."""
    total_timeout: Seconds = 30.0
    """Seconds that a request may take with all its retries."""
    max_retries: int = Field(default=3, ge=0, le=20)
    """How often a request is tried again."""
    backoff_factor: float = Field(default=0.3, ge=0, le=60)
    """Seconds before the first retry; each further one waits twice as long."""
    retry_on_status: list[Status] = [500, 502, 503, 504]
    """Answers after which a request is tried again."""
    pool_connections: int = Field(default=10, ge=1, le=10_000)
    """Hosts to which connections are kept."""
    pool_maxsize: int = Field(default=20, ge=1, le=10_000)
    """Connections that are kept to each."""
    max_redirects: int = Field(default=3, ge=0, le=50)
    """How many redirects are followed."""
    expected_status_codes: list[Status] | None = None
    """Statuses of valid answers; null: all below 400."""
    validate_response_json: bool = False
    """Whether an answer that is not JSON is a failure."""
    max_response_size: Bytes = 10_485_760
    """Bytes that an answer may have."""
    health_check_url: Text | None = None
    """What is asked while the circuit is open, as its probe: a URL, or a path below base_url."""
    health_check_interval: Seconds = 60.0
    """Seconds after which a closed circuit's health check is asked again."""
    health_check_timeout: Seconds = 5.0
    """Seconds that a health check may take."""
    enable_cached_response_fallback: bool = True
    """Whether stored answers are served while the circuit is open."""
    default_response: JsonValue = None
    """What is answered while the circuit is open and nothing is stored; null: nothing is."""
    enable_request_queue: bool = False
    """Whether requests that ask for it wait in a durable outbox while the circuit is open."""
    retry_budget: Share = 0.1
    """Retries as a share of a process's requests, beyond which none is made."""
    stale_ttl: float = Field(default=3_600.0, ge=0, le=30 * DAY)
    """Seconds for which a stored answer may be served while the circuit is open."""
    outbox_path: Text | None = None
    """The file in which requests wait."""
    refuse_private_hosts: bool = False
    """Whether requests to addresses that are not public are refused, also after redirects."""


class Http(HttpType):
    """A service's HTTP calls, and what is different for single kinds of service."""

    service_types: dict[Name, dict[str, JsonValue]] = {}
    """By service_type: the keys above that differ."""

    @model_validator(mode="after")
    def _types_are_right(self) -> Self:
        wrong: list[InitErrorDetails] = []
        for name in self.service_types:
            try:
                self.of_type(name)
            except ValidationError as error:
                wrong += [
                    InitErrorDetails(
                        type=one["type"],
                        loc=("service_types", name, *one["loc"]),
                        input=one["input"],
                        ctx=one.get("ctx", {}),
                    )
                    for one in error.errors()
                ]
        if wrong:
            raise ValidationError.from_exception_data("service_types", wrong)
        return self

    def of_type(self, name: str) -> HttpType:
        """The keys for one service_type; one that is not listed has this section's own."""
        own = {key: getattr(self, key) for key in HttpType.model_fields}
        return HttpType.model_validate(own | self.service_types.get(name, {}))


class Ml(Circuit):
    """A service's model."""

    model_path: Text | None = None
    """The model's file."""
    model_factory: Importable | None = None
    """package.module:function that makes the module whose weights the file has."""
    fallback_model_path: Text | None = None
    """A lighter model for when it fails."""
    fallback_model_factory: Importable | None = None
    """What makes the lighter model's module; null: model_factory."""
    safe_globals: list[Importable] = []
    """package.module:Class that a file with a whole module may hold."""
    model_device: Text = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    worker: Literal["thread", "process", "host"] = "thread"
    """Where the model runs: in a thread; in a process of its own, which a deadline kills; or in one
    process for all of the host."""
    max_model_memory_mb: int = Field(default=2_048, ge=1, le=10_000_000)
    """Megabytes that the model may take."""
    inference_timeout: Seconds = 30.0
    """Seconds that a prediction may take."""
    batch_inference_timeout: Seconds = 120.0
    """Seconds that a batch may take."""
    max_batch_size: int = Field(default=32, ge=1, le=100_000)
    """Inputs in one batch."""
    batch_wait: float = Field(default=0.0, ge=0, le=10)
    """Seconds that a prediction waits for others to be run with it; those that wait are anyway."""
    max_cpu_usage: Percent = 90.0
    """Percent of the processors beyond which calls are put off."""
    max_memory_usage: Percent = 85.0
    """Percent of memory beyond which calls are put off."""
    max_gpu_memory_usage: Percent = 90.0
    """Percent of the GPU's memory beyond which calls are put off."""
    max_queue_size: int = Field(default=100, ge=1, le=1_000_000)
    """Calls that may wait."""
    queue_timeout: Seconds = 300.0
    """Seconds that a call may wait."""
    health_check_interval: Seconds = 60.0
    """Seconds between health checks."""
    warmup_on_start: bool = True
    """Whether the model is loaded and tried before its first call."""
    warmup_input: Text | None = None
    """A file with an input to try it on."""
    warmup_shape: list[Annotated[int, Field(ge=1, le=100_000_000)]] | None = None
    """The shape of an input of zeros to try it on."""
    reload_on_change: bool = True
    """Whether a changed file is loaded while running."""
    output_shape: list[Annotated[int, Field(ge=0)] | None] | None = None
    """The shape that outputs must have; null in it: any size."""
    allow_non_finite: bool = False
    """Whether NaN and infinity are valid outputs."""
    minimum_confidence: Share | None = None
    """The confidence below which a prediction is weak; null: none is."""
    low_confidence_rate: Share = 0.5
    """The share of weak ones among the last from which on they count as slow calls do."""
    confidence_window: int = Field(default=50, ge=1, le=100_000)
    """How many of the last predictions are looked at for that."""
    enable_lightweight_fallback: bool = True
    """Whether the lighter model answers when the model cannot."""
    quantize_fallback: bool = False
    """Whether the lighter model is made of the model, by dynamic quantization."""
    enable_cached_fallback: bool = True
    """Whether stored predictions are served when the model cannot answer."""
    default_prediction: JsonValue = None
    """What is answered when nothing else can; null: nothing is."""
    cache_predictions: bool = True
    """Whether predictions are stored."""
    share_predictions: bool = False
    """Whether they are stored in the service's cache, too."""
    prediction_cache_size: int = Field(default=1_000, ge=1, le=10_000_000)
    """How many are."""
    prediction_cache_bytes: Bytes = 67_108_864
    """Bytes that they may take in this process."""
    prediction_cache_ttl: Seconds = 3_600.0
    """Seconds for which they are."""
    prediction_stale_ttl: float = Field(default=86_400.0, ge=0, le=30 * DAY)
    """Seconds for which a prediction may be served after that, when the model cannot answer."""


class Service(Keys):
    """One service: the parts that it uses."""

    enabled: bool = True
    """False makes this service's circuits a pass-through."""
    database: Database | None = None
    """Its database."""
    cache: Cache | None = None
    """Its cache."""
    http: Http | None = None
    """Its HTTP calls."""
    ml: Ml | None = None
    """Its model."""


SECTIONS: dict[str, type[Circuit]] = {
    "database": Database,
    "cache": Cache,
    "http": Http,
    "ml": Ml,
}
KINDS = tuple(SECTIONS)
# What has no section of its own goes by another one's.
SECTION_OF = {"tasks": "cache"}
# A database has one circuit for reads and one for writes; a replica has its own.
PARTS = {"database": ("read", "write")}


def circuit_names(
    service: str, kind: str, part: str = "", section: Circuit | None = None
) -> dict[str, str]:
    """The circuits of one part of a service, by the last part of their names."""
    name = ".".join(filter(None, (service, kind, part)))
    parts = PARTS.get(kind, ())
    if isinstance(section, Database) and section.read_url is not None:
        parts = ("replica", *parts)
    return {own: f"{name}.{own}" for own in parts} or {part or kind: name}


class CircuitSpec(NamedTuple):
    """One circuit that the file asks for."""

    service: str
    kind: str
    policy: Policy
    enabled: bool


class Configuration(Keys):
    """The whole file."""

    schema_: str | None = Field(default=None, alias="$schema")
    """Where editors find the schema."""
    settings: Settings = Settings()
    """What holds for all services."""
    services: dict[Name, Service] = {}
    """The services by their names."""

    @property
    def redis_url(self) -> str:
        """Where the circuits live: what settings say, else the one Redis that the caches name, else
        localhost."""
        if self.settings.redis_url is not None:
            return self.settings.redis_url
        return next(iter(self.cache_addresses()), "redis://localhost:6379/0")

    def cache_addresses(self) -> list[str]:
        """The Redis servers that the caches name, each once."""
        caches = [service.cache for service in self.services.values() if service.cache]
        return list(dict.fromkeys(cache.address for cache in caches))

    @model_validator(mode="after")
    def _the_circuits_have_one_home(self) -> Self:
        if self.settings.redis_url is None and len(self.cache_addresses()) > 1:
            raise ValueError(
                "the caches name several Redis servers: say in settings.redis_url which of them "
                "holds the circuits"
            )
        return self

    def section(self, service: str, kind: str, part: str = "") -> Circuit | None:
        """What is said of one part of a service (of ``http``, a service_type); None: nothing."""
        parts, kind = self.services.get(service), SECTION_OF.get(kind, kind)
        section: Circuit | None = getattr(parts, kind, None) if kind in KINDS else None
        return section.of_type(part) if part and isinstance(section, Http) else section

    def enabled(self, service: str) -> bool:
        """Whether the circuits of a service are more than a pass-through."""
        parts = self.services.get(service)
        return self.settings.enabled and (parts is None or parts.enabled)

    def circuits(self) -> dict[str, CircuitSpec]:
        """Every circuit that the services have, by its name."""
        return dict(self._circuits())

    def _circuits(self) -> Iterator[tuple[str, CircuitSpec]]:
        for service, kind in product(self.services, KINDS):
            section = self.section(service, kind)
            if section is None:
                continue
            types = section.service_types if isinstance(section, Http) else {}
            for part in ("", *types):
                numbers = self.section(service, kind, part) or section
                on = self.enabled(service)
                for circuit, name in circuit_names(service, kind, part, numbers).items():
                    policy = numbers.policy(self.settings, circuit)
                    yield name, CircuitSpec(service, kind, policy, on)


def schema() -> dict[str, Any]:
    """The file's JSON Schema."""
    made = Configuration.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}
