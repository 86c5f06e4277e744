"""What notebooks ask `torch.cuda`, answered for a machine without CUDA: the processor, its memory, this process's peak.

The names and arguments are torch's.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, NamedTuple

from rustune import info


class DeviceProperties(NamedTuple):
    """The machine in the words of `torch.cuda.get_device_properties`.

    Attributes:
        name: The processor's model.
        total_memory: RAM in bytes.
        major: 0: it has no compute capability.
        minor: 0.
        multi_processor_count: Processors granted to this process.
    """

    name: str
    total_memory: int
    major: int
    minor: int
    multi_processor_count: int


def get_device_properties(device: Any = None) -> DeviceProperties:
    """Describes the machine.

    Args:
        device: Makes no difference: there is one.

    Returns:
        The processor's name and the memory in bytes.
    """
    facts = info()
    return DeviceProperties(get_device_name(), int(facts["total_memory_bytes"] or 0), 0, 0, int(facts["cpus"]))


def get_device_name(device: Any = None) -> str:
    """Names the processor.

    Args:
        device: Makes no difference.

    Returns:
        Its model.
    """
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "CPU"


def get_device_capability(device: Any = None) -> tuple[int, int]:
    """Returns (0, 0): below every capability a notebook asks for.

    Args:
        device: Makes no difference.

    Returns:
        Zeros.
    """
    return 0, 0


def max_memory_reserved(device: Any = None) -> int:
    """Returns the most memory this process has held so far.

    Args:
        device: Makes no difference.

    Returns:
        Bytes of the peak resident set.
    """
    return int(info()["peak_rss_bytes"] or 0)


def memory_reserved(device: Any = None) -> int:
    """Returns the memory this process holds now.

    Args:
        device: Makes no difference.

    Returns:
        Bytes of the resident set; of its peak where the system tells nothing else.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return max_memory_reserved()


max_memory_allocated = max_memory_reserved
memory_allocated = memory_reserved


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Returns free and total memory.

    Args:
        device: Makes no difference.

    Returns:
        Bytes available and bytes of RAM.
    """
    facts = info()
    return int(facts["available_memory_bytes"] or 0), int(facts["total_memory_bytes"] or 0)


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    """Says in a line what is used.

    Args:
        device: Makes no difference.
        abbreviated: Makes no difference.

    Returns:
        The line.
    """
    now, peak = memory_reserved() / 2**30, max_memory_reserved() / 2**30
    return f"this process holds {now:.2f} GiB of memory, {peak:.2f} GiB at most so far; there is no CUDA device"


def current_device() -> int:
    """Returns 0, the only device."""
    return 0


def empty_cache() -> None:
    """Does nothing: there is no cache."""


def ipc_collect() -> None:
    """Does nothing: there is no cache."""


def reset_peak_memory_stats(device: Any = None) -> None:
    """Does nothing: the system keeps the peak for the life of the process.

    Args:
        device: Makes no difference.
    """


reset_max_memory_allocated = reset_peak_memory_stats


def synchronize(device: Any = None) -> None:
    """Does nothing: every call has finished when it returns.

    Args:
        device: Makes no difference.
    """


def is_available() -> bool:
    """Returns False: there is no CUDA."""
    return False


def is_initialized() -> bool:
    """Returns False: there is no CUDA."""
    return False


def device_count() -> int:
    """Returns 0: there is no CUDA."""
    return 0


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Returns False: there is no CUDA.

    Args:
        including_emulation: Makes no difference.

    Returns:
        False.
    """
    return False


def manual_seed_all(seed: int) -> None:
    """Does nothing: a run takes its seed from its settings.

    Args:
        seed: Any number.
    """


manual_seed = manual_seed_all
