from typing import Any, NamedTuple


class Limits(NamedTuple):
    cpu: float = 100.0
    memory: float = 100.0
    gpu_memory: float = 100.0


class Resources:
    def start(self) -> None: ...
    def over(self, limits: Limits) -> str | None:
        return None

    def stats(self) -> dict[str, Any]:
        return {}

    def close(self) -> None: ...
