"""The command ``breakers`` from a checkout, without an installation."""

from __future__ import annotations

import sys
from pathlib import Path

# Python has put this file's folder first; the package is in the one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed_breaker.cli import main

if __name__ == "__main__":
    main()
