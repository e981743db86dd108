"""The kernels behind the operators ``mat::masked_window_attention`` and ``mat::mask_propagation``.

``mat_export`` may not know this package, nor this package its models. So the two meet by name: in
torch's registry of operators, and as an entry point of the group ``mat_export.kernels``, by which
``mat_export.ops`` calls `use_kernels` when it has defined the operators. Where this package lies on
the path and was not installed, that call is the user's.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from engines.plugins.kernels import TYPES, KernelLibrary, Tokens, open_kernels
from mat_export.contract import OPERATOR_DOMAIN, UserError

__all__ = ["use_kernels", "warm_up"]

ATTENTION = f"{OPERATOR_DOMAIN}::masked_window_attention"
PROPAGATION = f"{OPERATOR_DOMAIN}::mask_propagation"

_WINDOWS = (8, 16)
_LARGEST_HEAD = 32
_NO_KERNELS = "the attention operators stay plain PyTorch on this GPU"


def use_kernels() -> None:
    """Let the operators run the CUDA kernels wherever their tensors are on a GPU.

    It holds for the whole process, for eager calls, under ``torch.compile`` and in CUDA graphs;
    ``set_kernel_enabled("cuda", enabled=False)`` of an operator takes it back for a while. Nothing
    is compiled yet: the first call on a GPU does that, or ``warm_up``. What the kernels do not have
    (FP64, other windows, heads above 32 features, BF16 before Ampere) stays with PyTorch, and so
    does everything where nvcc is missing, with one warning.

    Raises:
        RuntimeError: If ``mat_export.ops`` was not imported, so that there are no operators.
    """
    _register("cuda", _kernels_on)


def warm_up(device: torch.device | str | int | None = None) -> bool:
    """Compile the kernels for a GPU if need be, load them, and launch each of them once.

    A CUDA graph may then be captured at once.

    Args:
        device: The GPU, by default the current one.

    Returns:
        Whether there are kernels; else a warning said why not.
    """
    device = torch.empty(0, device="cuda" if device is None else device).device
    library = _kernels_on(device)
    if library is None:
        return False
    # A window of 16 has one kernel for few heads and one for many.
    many = torch.cuda.get_device_properties(device).multi_processor_count
    types = [getattr(torch, name) for name in TYPES]
    for dtype in types if torch.cuda.get_device_capability(device) >= (8, 0) else types[:2]:
        for window, heads in ((8, 1), (16, 1), (16, many)):
            tokens = torch.zeros(1, window, window, 2 * heads, dtype=dtype, device=device)
            attend(library, tokens, tokens, tokens, None, window, 0, heads)
    for window in _WINDOWS:
        valid = torch.zeros(1, 1, window, window, dtype=torch.bool, device=device)
        propagate(library, valid, window, 0)
    torch.cuda.synchronize(device)
    return True


@functools.cache
def _register(device_type: str, kernels_on: Callable[[torch.device], KernelLibrary | None]) -> None:
    """Put the kernels before what the operators do on a type of device; again does nothing."""
    key = getattr(torch._C.DispatchKey, device_type.upper())
    keys = torch._C.DispatchKeySet(key)
    try:
        references = {n: torch.library.get_kernel(n, key) for n in (ATTENTION, PROPAGATION)}
    except RuntimeError as error:
        raise RuntimeError(f"{error}: import mat_export.ops, which defines it, before") from error

    def attention(
        q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, shift: int, heads: int
    ) -> Tensor:
        window, shift = _cut(q.shape[1], q.shape[2], window, shift)
        if _attention_fits(q, k, v, valid, window, heads):
            library = kernels_on(q.device)
            if library is not None:
                return attend(library, q, k, v, valid, window, shift, heads)
        arguments = (q, k, v, valid, window, shift, heads)
        y: Tensor = references[ATTENTION].call_boxed(keys, *arguments)
        return y

    def propagation(valid: Tensor, window: int, shift: int) -> Tensor:
        window, shift = _cut(valid.shape[-2], valid.shape[-1], window, shift)
        if _propagation_fits(valid, window):
            library = kernels_on(valid.device)
            if library is not None:
                return propagate(library, valid, window, shift)
        out: Tensor = references[PROPAGATION].call_boxed(keys, valid, window, shift)
        return out

    torch.library.register_kernel(ATTENTION, device_type, attention)
    torch.library.register_kernel(PROPAGATION, device_type, propagation)


# -- one call --------------------------------------------------------------------------------------


def attend(
    library: KernelLibrary,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    window: int,
    shift: int,
    heads: int,
) -> Tensor:
    """Masked window attention by a kernel, on the current stream.

    Args:
        library: The kernels for the tensors' device.
        q: Queries [B, H, W, C], scaled by 1/√(C/heads) already; a view of a wider tensor is taken
            as it lies.
        k: Keys, likewise.
        v: Values, likewise.
        valid: Bool [B or 1, 1, H, W], or None if every token is valid.
        window: 8 or 16.
        shift: Tokens the grid is rolled by.
        heads: Attention heads.

    Returns:
        [B, H, W, C], contiguous.

    Raises:
        UserError: For a size or type that the kernels do not have.
    """
    batch, height, width, channels = q.shape
    y = v.new_empty(v.shape)
    q, k, v = (x if _lies_as_tokens(x) else x.contiguous() for x in (q, k, v))
    if valid is not None:
        valid = valid.expand(batch, 1, height, width).contiguous()
    with _on_device_of(q):
        library.attention(
            *(Tokens(x.data_ptr(), x.stride(2)) for x in (q, k, v, y)),
            shape=(batch, height, width),
            heads=heads,
            head_size=channels // heads,
            window=window,
            shift=shift,
            dtype=str(q.dtype).removeprefix("torch."),
            valid=None if valid is None else valid.data_ptr(),
            stream=_stream_of(q),
        )
    return y


def propagate(library: KernelLibrary, valid: Tensor, window: int, shift: int) -> Tensor:
    """Mask propagation by a kernel, on the current stream. valid: bool [B, 1, H, W] → likewise."""
    batch, _, height, width = valid.shape
    out = valid.new_empty(valid.shape)
    valid = valid.contiguous()
    shape = (batch, height, width)
    with _on_device_of(valid):
        library.propagate(
            *(valid.data_ptr(), out.data_ptr()),
            shape=shape,
            window=window,
            shift=shift,
            stream=_stream_of(valid),
        )
    return out


def _lies_as_tokens(x: Tensor) -> bool:
    """Whether a tensor's tokens lie at one even stride, their features side by side."""
    batch, height, width, _ = x.shape
    token, row, image = x.stride(2), x.stride(1), x.stride(0)
    return (
        x.stride(3) == 1
        and token % 2 == 0
        and token >= x.shape[3]
        and (height == 1 or row == width * token)
        and (batch == 1 or image == height * width * token)
        and x.data_ptr() % 4 == 0
    )


def _on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _stream_of(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


# -- which calls -----------------------------------------------------------------------------------


def _cut(height: int, width: int, window: int, shift: int) -> tuple[int, int]:
    """Window and shift on a grid: a side of at most the window becomes the window, unshifted."""
    side = min(height, width)
    return (side, 0) if side <= window else (window, shift)


def _attention_fits(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, window: int, heads: int
) -> bool:
    """Whether the kernels have this call; all others are PyTorch's, wrong ones among them."""
    batch, height, width, channels = q.shape
    head_size, left = divmod(channels, heads)
    masked = valid is None or (
        valid.dtype == torch.bool
        and valid.device == q.device
        and tuple(valid.shape) in ((batch, 1, height, width), (1, 1, height, width))
    )
    return (
        masked
        and all((x.shape, x.dtype, x.device) == (q.shape, q.dtype, q.device) for x in (k, v))
        and str(q.dtype).removeprefix("torch.") in TYPES
        and _tiles(height, width, window)
        and q.numel() > 0
        and not left
        and head_size % 2 == 0
        and head_size <= _LARGEST_HEAD
        and (q.dtype != torch.bfloat16 or not q.is_cuda or _capability(q.device) >= (8, 0))
    )


def _propagation_fits(valid: Tensor, window: int) -> bool:
    return (
        valid.dtype == torch.bool
        and valid.ndim == 4
        and valid.shape[1] == 1
        and valid.numel() > 0
        and _tiles(valid.shape[2], valid.shape[3], window)
    )


def _tiles(height: int, width: int, window: int) -> bool:
    return window in _WINDOWS and height % window == 0 and width % window == 0


# -- the library -----------------------------------------------------------------------------------


def _kernels_on(device: torch.device) -> KernelLibrary | None:
    """The kernels for a GPU, or None where they cannot be had."""
    capability = _capability(device)
    if capability not in _opened and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the kernels cannot be compiled while a CUDA graph is captured: call "
            "engines.plugins.torch_operators.warm_up() before"
        )
    if capability not in _opened:
        try:
            _opened[capability] = open_kernels(capability)
        except UserError as error:
            warnings.warn(f"{_NO_KERNELS}: {error}", RuntimeWarning, stacklevel=2)
            _opened[capability] = None
    return _opened[capability]


_opened: dict[tuple[int, int], KernelLibrary | None] = {}
"""The libraries of this process by compute capability; None where there is none to be had."""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
