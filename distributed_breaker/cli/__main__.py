"""``python -m distributed_breaker.cli``."""

from . import main

main()
