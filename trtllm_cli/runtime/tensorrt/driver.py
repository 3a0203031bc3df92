"""Waking the NVIDIA driver early: it needs about as long to open a GPU as Python needs to import torch."""

from __future__ import annotations

import ctypes
import threading

_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")


def wake() -> threading.Thread:
    """Begin to open the first visible GPU, in a thread; torch then finds it open. Without one, nothing happens.

    What the driver has to say about a failure is said when torch asks again.
    """
    thread = threading.Thread(target=_open, name="wake the driver", daemon=True)
    thread.start()
    return thread


def _open() -> bool:
    for name in _LIBRARIES:
        try:
            driver = ctypes.CDLL(name)  # whose calls let other threads run
        except OSError:
            continue
        device, context = ctypes.c_int(), ctypes.c_void_p()
        # the primary context is the one that torch and TensorRT use; it stays for the life of the process
        return bool(
            driver.cuInit(0) == 0
            and driver.cuDeviceGet(ctypes.byref(device), 0) == 0
            and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
        )
    return False
