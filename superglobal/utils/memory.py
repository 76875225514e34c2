"""Control how the C library manages the memory of a process."""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process reuse freed memory instead of returning it to the system, where the C library is glibc.

    By default, glibc returns the memory of a large tensor to the system when the tensor is freed, and the system clears
    it before the next tensor can use it. On the CPU, a network allocates a feature map in every layer, so this can take
    a quarter of the time of extraction.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 (missing in other C libraries, whose mallopt may differ)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
