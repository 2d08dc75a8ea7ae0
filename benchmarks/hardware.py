"""What every printed result states: hardware, versions, date."""

from __future__ import annotations

import datetime
import platform

import torch

from surgery.reverting.provenance import versions


def statement() -> str:
    """One line: processor (and GPU), Python, library versions, date."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        name = ""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    libraries = ", ".join(f"{package} {number}" for package, number in versions().items())
    threads = torch.get_num_threads()
    processor = f"{threads} thread{'s' if threads > 1 else ''} of {name or platform.machine()}{gpu}"
    return f"{processor}; Python {platform.python_version()}, {libraries}; {datetime.date.today()}"
