"""The plugins on a GPU: every operator through build, CUDA graph and run, against the reference.

CI has no GPU, so this is started by hand, on a machine with one, PyTorch and nvcc. From the
repository's root:

    python -m pip install --no-deps --target headers kernel-lens==2.0.1
    PYTHONPATH=.:tests python tests/gpu/plugins.py headers/kernel_lens/include/tensorrt

The argument is a folder of TensorRT's headers, of 8.6 or from 10 on; give both to hold both
generations of plugins. No TensorRT is needed: the harness plays its part, as in
``test_plugin_v2.py`` and ``test_plugin_v3.py``, with the kernels that nvcc makes and tensors in the
GPU's memory. Exit code 1 if a case fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from attention_cases import BARS, DENSE, NETWORK
from epilogue_cases import FORMS, HARD
from epilogue_cases import NETWORK as EPILOGUES
from plugin_harness import Harness

from engines.plugins.library import build_library, describe_library
from engines.plugins.toolchain import find_headers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("headers", type=Path, nargs="+", help="folders of TensorRT's headers")
    failed = 0
    for folder in parser.parse_args().headers:
        headers = find_headers(folder)
        version = "v2" if headers.major == 8 else "v3"
        dtypes = [dtype for dtype in BARS if version == "v3" or dtype != torch.bfloat16]
        print(f"TensorRT {headers.version}, plugins {version}")
        with TemporaryDirectory() as scratch:
            library = build_library(Path(scratch, "libmat_plugins.so"), tensorrt_include=folder)
            print(f"  the library: {describe_library(library)}")
            harness = Harness(version, headers.folder, Path(scratch), gpu=True)
            for what, check in checks(harness, dtypes):
                try:
                    found = check()
                except AssertionError as failure:
                    print(f"  {what}: FAILED {failure}")
                    failed += 1
                else:
                    print(f"  {what}: passed" + (f", {found:.1e}" if found else ""))
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


def checks(
    harness: Harness, dtypes: list[torch.dtype]
) -> Iterator[tuple[str, Callable[[], float | None]]]:
    """What is checked, and how; attention gives its error."""
    for name, case in {**DENSE, **NETWORK}.items():
        for dtype in dtypes:
            typed, what = replace(case, dtype=dtype), str(dtype).removeprefix("torch.")
            yield f"{name}, {what}", partial(harness.check, typed)
            if dtype != torch.float32:
                yield f"on maps, {name}, {what}", partial(harness.check_maps, typed)
    for name, epilogue in {**HARD, **EPILOGUES}.items():
        for form, changes in FORMS.items():
            if changes["dtype"] in dtypes:
                check = partial(harness.check_epilogue, replace(epilogue, **changes))
                yield f"epilogue, {name}, {form}", check


if __name__ == "__main__":
    sys.exit(main())
