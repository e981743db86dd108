"""One interface over TensorRT 8.6, 10.13 and later, 11, and TensorRT-RTX.

What differs between them is known in this package and nowhere else. Their modules are imported on
use alone.
"""

from __future__ import annotations

from engines.backend.base import Backend
from engines.backend.finding import Absent, find_backends, is_for_weak_types, open_backend
from engines.backend.gpu import Gpu, find_gpu
from engines.backend.hooks import BuildHooks, Progress

__all__ = [
    "Absent",
    "Backend",
    "BuildHooks",
    "Gpu",
    "Progress",
    "find_backends",
    "find_gpu",
    "is_for_weak_types",
    "open_backend",
]
