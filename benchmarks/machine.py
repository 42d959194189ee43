"""What the numbers of a benchmark depend on, whosever machine it is."""

import os
import platform

from reappraisal.protocol.records import hardware


def machine(threads: int | None = None) -> dict:
    """Processor, cores, memory, system, load, and threads if told."""
    found, used = hardware(), {} if threads is None else {"threads": threads}
    return {
        "cpu": found["model"],
        "cores": os.cpu_count(),
        "memory_gib": found["memory"],
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 2),
    } | used
