"""Holds what opens and writes bytes to full coverage, after the tests have run.

What only the tests of an absent service can cover is left out, and named; nothing is left out
where every service is required.
"""

from __future__ import annotations

import os
import sys

from coverage.cmdline import main as coverage
from services import REQUIRE_SERVICES, missing, say

FULL = (
    "lightning_secure/crypto/*",
    "lightning_secure/data/format/columns.py",
    "lightning_secure/data/format/header.py",
)


def main() -> int:
    """Return coverage's exit code: 2 if a line was missed."""
    absent = [] if os.environ.get(REQUIRE_SERVICES) else missing()
    left_out = [path for service in absent for path in service.covers]
    omit = [f"--omit={','.join(left_out)}"] if left_out else []
    code = coverage(["report", "--fail-under=100", f"--include={','.join(FULL)}", *omit])
    for service in absent:
        without = f", and {' '.join(service.covers)} not held to 100 %" if service.covers else ""
        say(f"{service.package} is missing: its tests were skipped{without} (make services)")
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
