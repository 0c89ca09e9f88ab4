"""The most memory that a process has used. Not by `ru_maxrss`: a process inherits that from the one that started it."""

from pathlib import Path


def peak_megabytes() -> float:
    """Peak of this process since it started or since [`reset_peak`], in MB of 1e6 bytes. On Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


def reset_peak() -> None:
    """Forget what importing has taken."""
    Path("/proc/self/clear_refs").write_text("5")
