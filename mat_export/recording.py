"""What a reference answered, in a file: parity where the reference itself cannot run.

A recording is an ``.npz``: a header (JSON: the reference's name, contract and digest, and the
versions that made it) and, for each image, the reference's outputs and mask states under the digest
of that image's inputs. Images are recorded one by one, so a candidate with another batch or with
8-bit images finds its answers as long as each image, its mask, its randomness and truncation are
the same to the last bit. The suite and the draws give the same bits on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mat_export.contract import STATE_PREFIX, Closing, GraphSpec, UserError, check_inputs
from mat_export.files import atomic_path, require_writable
from mat_export.manifest import package_version
from mat_export.runners import Runner

__all__ = ["SUFFIX", "RecordedRunner", "RecordingRunner"]

Arrays = dict[str, NDArray[Any]]

SUFFIX = ".npz"
"""How the name of a recording ends."""

FORMAT = 1
"""Version of the file; another is refused."""

_HEADER = "header"

_SHARED = ("truncation",)
"""Inputs that all images of a batch have in common."""


class RecordingRunner(Closing):
    """A runner that answers as another does, and keeps the answers for a file.

    The file is written whole when the runner is closed. If an error ends its context, or nothing
    was run, none is written.

    Args:
        runner: Whose answers they are; closed with this one.
        path: The file to write, ``.npz``.
        digest: SHA-256 of the reference's own file; by default the digest of its weights.

    Raises:
        UserError: If the name ends otherwise or cannot be written.
    """

    def __init__(self, runner: Runner, path: str | os.PathLike[str], *, digest: str = "") -> None:
        if Path(path).suffix.lower() != SUFFIX:
            raise UserError(f"a recording is named *{SUFFIX}, got '{path}'")
        require_writable(path)
        self.name, self.spec = runner.name, runner.spec
        self._runner, self._path = runner, path
        self._digest = digest or runner.spec.checkpoint
        self._answers: dict[str, Arrays] = {}
        self._batch: int | None = None

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The other runner's answer. Raises what it raises."""
        results = self._runner.run(inputs)
        batch = len(inputs["z"])
        self._batch = min(batch, self._batch or batch)
        for i in range(batch):
            self._answers[_digest_of(inputs, i)] = {
                # Mask states are 0 or 1 in any type, and a quarter of the size as bool.
                name: values[i] > 0.5 if name.startswith(STATE_PREFIX) else values[i].copy()
                for name, values in results.items()
            }
        return results

    def close(self) -> None:
        """Close the other runner and write the file; again is nothing.

        Raises:
            UserError: If the file cannot be written.
        """
        self._runner.close()
        if self._answers:
            self._write()
            self._answers = {}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._answers = {}
        super().__exit__(kind, error, trace)

    def _write(self) -> None:
        packages = ("mat-export", "numpy", "pillow")
        header = {
            "format": FORMAT,
            "reference": self.name,
            "digest": self._digest,
            "spec": self.spec.to_json(),
            "batch": self._batch,
            "versions": {name: package_version(name) for name in packages},
        }
        arrays: dict[str, Any] = {
            f"{digest}/{name}": values
            for digest, answer in self._answers.items()
            for name, values in answer.items()
        }
        arrays[_HEADER] = np.array(json.dumps(header))
        with atomic_path(self._path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)


class RecordedRunner(Closing):
    """A reference that answers from a recording, whatever the batch.

    Its ``spec`` is the recorded reference's, and ``spec.batch`` the smallest number of images that
    were recorded at once. Mask states are bool.

    Args:
        path: A file of RecordingRunner.

    Raises:
        UserError: If it is missing, damaged, no recording, or one of another version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path
        self._file: Any = None
        if not os.path.isfile(path):
            raise UserError(f"there is no file '{path}'")
        try:
            self._file = np.load(path, allow_pickle=False)
            header = json.loads(str(self._file[_HEADER][()]))
            self._read(header)
        except _UNREADABLE as error:
            self.close()
            raise UserError(
                f"'{path}' is no recording ({_sentence(error)}): make one with "
                "'mat-export parity MODEL --record FILE'"
            ) from error
        except UserError:
            self.close()
            raise

    def _read(self, header: Any) -> None:
        """Take over what the header says, and which images there are."""
        if header["format"] != FORMAT:
            raise UserError(
                f"'{self._path}' is a recording of version {header['format']} and this mat-export "
                f"knows version {FORMAT}: record it again with this version"
            )
        self.spec = GraphSpec.from_json(header["spec"]).with_changes(batch=header["batch"])
        self.digest = str(header["digest"])
        self.name = f"recording of {header['reference']}, {self.digest[:12]}"
        self._versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
        self._names: dict[str, list[str]] = {}
        for key in self._file.files:
            digest, _, name = key.partition("/")
            self._names.setdefault(digest, []).append(name)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """What the reference answered to these inputs.

        Raises:
            UserError: If they do not fit the contract, were not recorded, or the file is damaged.
        """
        if self._file is None:
            raise RuntimeError("this runner was closed")
        check_inputs(self.spec.with_changes(batch=None), inputs)
        shape = inputs["image"].shape[1:]
        images = [self._answer(_digest_of(inputs, i), shape) for i in range(len(inputs["z"]))]
        try:
            return {name: np.stack([image[name] for image in images]) for name in images[0]}
        except (KeyError, ValueError) as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        if hasattr(self._file, "close"):  # a lone array, which is no recording, has nothing open
            self._file.close()
        self._file = None

    def _answer(self, digest: str, shape: tuple[int, ...]) -> Arrays:
        """The outputs for one image of this shape, without the batch axis."""
        if digest not in self._names:
            raise UserError(
                f"the recording '{self._path}' holds other cases (it is of batch "
                f"{self.spec.batch}, made with {self._versions}): record it again with this "
                "version, for a candidate with the same batch and noise"
            )
        try:
            answer = {name: self._file[f"{digest}/{name}"] for name in self._names[digest]}
        except _UNREADABLE as error:
            raise self._damaged(error) from error
        for tensor in self.spec.outputs:  # each has the shape of the image
            values = answer.get(tensor.name)
            if values is None or values.shape != shape or str(values.dtype) != tensor.dtype:
                raise self._damaged(f"no '{tensor.name}' of {tensor.dtype} {list(shape)}")
        return answer

    def _damaged(self, reason: object) -> UserError:
        return UserError(
            f"the recording '{self._path}' is damaged ({_sentence(reason)}): record it again"
        )


_UNREADABLE = (
    *(OSError, EOFError, zipfile.BadZipFile),
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError),
)
"""What NumPy and zipfile raise for a file that is cut off or something else."""


def _sentence(reason: object) -> str:
    """The first line of what went wrong."""
    return (str(reason).strip() or type(reason).__name__).splitlines()[0]


def _digest_of(inputs: Mapping[str, NDArray[Any]], image: int) -> str:
    """SHA-256 of one image's inputs, over their names, types, shapes and bytes, as hex."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        values = inputs[name] if name in _SHARED else inputs[name][image]
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
