"""Arrays of pycuda, on a machine that has it and a GPU."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from engines import cuda
from engines.arrays import DeviceArray, as_device_array
from mat_export.contract import UserError

pytest.importorskip("pycuda", reason="pycuda is not installed: it is built with a CUDA toolkit")


def test_arrays_of_pycuda_are_taken_as_they_lie() -> None:
    try:
        importlib.import_module("pycuda.autoprimaryctx")  # engines use the GPU's primary context
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pycuda finds no GPU: {error}")
    gpuarray = importlib.import_module("pycuda.gpuarray")

    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    array = gpuarray.to_gpu(values)
    device = cuda.device_info().index
    taken = as_device_array(array, name="x", device=device, stream=0)
    assert taken is not None
    assert (taken.pointer, taken.shape) == (int(array.gpudata), values.shape)
    assert taken.dtype == values.dtype
    with pytest.raises(UserError, match="contiguous"):
        as_device_array(array.T, name="x", device=device, stream=0)
    with pytest.raises(UserError, match="lies on GPU"):
        as_device_array(array, name="x", device=device + 1, stream=0)
    ours = DeviceArray(taken.pointer, taken.shape, taken.dtype, device, owner=array)
    theirs = gpuarray.GPUArray(ours.shape, ours.dtype, gpudata=ours.pointer)
    assert np.array_equal((theirs + 1).get(), values + 1)
