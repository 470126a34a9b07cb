"""How much memory this process has used at most."""

import resource
import sys

import jax


def peak() -> str:
    """Of the host, and where the devices count theirs of the fullest one: "peak memory 18.4 GB, 8.9 GB of a device"."""
    said = f"peak memory {_host() / 1e9:.1f} GB"
    used = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    return f"{said}, {max(used) / 1e9:.1f} GB of a device" if any(used) else said


def _host() -> int:
    """Bytes that were resident at once, pages of files that were mapped among them."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
