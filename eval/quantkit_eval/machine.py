"""Facts about where an evaluation ran, for its provenance."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from quantkit.checkpoint.memory import format_size
from quantkit_eval.records import Fact

_PACKAGES = ("quantkit", "torch", "transformers", "datasets", "lm-eval", "triton", "numpy")


def machine_facts(device: str) -> tuple[Fact, ...]:
    """Processor, cores, memory, GPU and operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = [
        Fact(name="processor", value=_processor()),
        Fact(name="instructions", value=torch.backends.cpu.get_cpu_capability()),
        Fact(name="threads", value=str(torch.get_num_threads())),
        Fact(name="memory", value=format_size(memory)),
        Fact(name="system", value=f"{platform.system()} {platform.machine()}"),
        Fact(name="device", value=device),
    ]
    if device.startswith("cuda"):
        facts.append(Fact(name="GPU", value=torch.cuda.get_device_name(device)))
    return tuple(facts)


def version_facts() -> tuple[Fact, ...]:
    """Python and the packages that numbers may depend on."""
    facts = [Fact(name="python", value=platform.python_version())]
    for name in _PACKAGES:
        try:
            facts.append(Fact(name=name, value=importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    if all(fact.name != "quantkit" for fact in facts):
        from quantkit.checkpoint.version import __version__

        facts.insert(1, Fact(name="quantkit", value=__version__))
    return tuple(facts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()
