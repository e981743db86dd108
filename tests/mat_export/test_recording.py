"""A recording answers for its reference: exactly, for every batch, and for nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeRunner
from numpy.typing import NDArray

from mat_export.contract import GraphSpec, UserError
from mat_export.parity import ParityReport, check_parity, open_candidate, open_reference
from mat_export.recording import RecordedRunner, RecordingRunner
from mat_export.runners import OrtRunner, Runner
from mat_export.suite import MASKS, Case, photograph
from mat_torch import draw
from mat_torch.config import preset

Arrays = dict[str, NDArray[Any]]
TINY = preset("mat-tiny-256")


class WithMasks(FakeRunner):
    """The stand-in, with one mask state as a float."""

    def __init__(self, *, masks: bool = True, **fields: Any) -> None:
        super().__init__(**{"checkpoint": "c" * 64, "source": "w.safetensors", **fields})
        self.masks, self.closed = masks, False

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        results = super().run(inputs)
        if self.masks:
            keep = inputs["mask"].reshape(len(inputs["z"]), 1, 256, 256) > (
                127 if self.spec.io == "uint8" else 0.5
            )
            results["mask_state/conv_first"] = keep[:, :, ::2, ::2].astype(np.float32)
        return results

    def close(self) -> None:
        self.closed = True


def suite() -> list[Case]:
    return [
        Case(name, photograph("coffee", 256, 256), MASKS[name](256, 256), seed)
        for seed, name in enumerate(("random-large", "all-hole"))
    ]


def inputs_of(seeds: tuple[int, ...], truncation: float = 1.0) -> Arrays:
    rng = np.random.default_rng(7)
    return {
        "image": rng.uniform(-1, 1, (len(seeds), 3, 256, 256)).astype(np.float32),
        "mask": (rng.random((len(seeds), 1, 256, 256)) < 0.5).astype(np.float32),
        "truncation": np.full(1, truncation, np.float32),
        **draw(TINY, seeds),
    }


def judged(candidate: Runner, reference: Runner) -> ParityReport:
    return check_parity(candidate, reference, suite=suite())


def recorded(path: Path, *inputs: Arrays, runner: Runner | None = None) -> Path:
    with RecordingRunner(runner or WithMasks(), path) as recording:
        for one in inputs:
            recording.run(one)
    return path


# -- the answers ----------------------------------------------------------------------------------


def test_answers_come_back_bit_for_bit_whatever_the_batch(tmp_path: Path) -> None:
    three = inputs_of((1, 2, 3))
    expected = WithMasks().run(three)
    path = recorded(tmp_path / "a.npz", three)
    with RecordedRunner(path) as found:
        for chosen in ([0, 1, 2], [2, 0], [1]):
            part = {k: v if k == "truncation" else v[chosen] for k, v in three.items()}
            results = found.run(part)
            assert set(results) == {"output", "mask_state/conv_first"}
            assert results["output"].dtype == np.float32
            for name, values in results.items():
                np.testing.assert_array_equal(values, expected[name][chosen])


@pytest.mark.parametrize("name", ["image", "mask", "z", "truncation", "gate_tokens"])
def test_a_changed_input_is_another_case(name: str, tmp_path: Path) -> None:
    inputs = inputs_of((1,))
    path = recorded(tmp_path / "a.npz", inputs)
    inputs[name].flat[-1] += 1.0
    with (
        RecordedRunner(path) as found,
        pytest.raises(UserError, match=r"holds other cases.*numpy.*record it again with this ver"),
    ):
        found.run(inputs)


def test_it_says_whose_answers_they_are(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.npz", inputs_of((1, 2)))
    with RecordedRunner(path) as found:
        assert found.spec == WithMasks(batch=2).spec
        assert found.name == f"recording of fake, {'c' * 12}"
    with RecordingRunner(WithMasks(), path, digest="d" * 64) as again:
        again.run(inputs_of((1,)))
        again.run(inputs_of((2, 3)))
    with RecordedRunner(path) as found:
        assert found.digest == "d" * 64
        assert found.spec.batch == 1


def test_inputs_are_held_against_the_contract_and_a_closed_one_does_not_answer(
    tmp_path: Path,
) -> None:
    found = RecordedRunner(recorded(tmp_path / "a.npz", inputs_of((1,))))
    with pytest.raises(UserError, match="'z' is missing"):
        found.run({k: v for k, v in inputs_of((1,)).items() if k != "z"})
    found.close()
    found.close()
    with pytest.raises(RuntimeError, match="closed"):
        found.run(inputs_of((1,)))


# -- the file -------------------------------------------------------------------------------------


def test_the_file_is_written_once_it_is_whole_and_the_runner_closed(tmp_path: Path) -> None:
    inner = WithMasks()
    with RecordingRunner(inner, tmp_path / "a.npz") as recording:
        recording.run(inputs_of((1,)))
        assert not list(tmp_path.iterdir())
    assert inner.closed
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_an_error_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.npz", inputs_of((1,)))
    before = path.read_bytes()
    inner = WithMasks()
    recording = RecordingRunner(inner, path)
    recording.run(inputs_of((2,)))
    with pytest.raises(ZeroDivisionError), recording:
        raise ZeroDivisionError
    assert inner.closed
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["a.npy", "a", "absent/a.npz"])
def test_a_name_that_cannot_be_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"named \*\.npz|cannot be written"):
        RecordingRunner(WithMasks(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def lone_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def other_arrays(path: Path) -> None:
    np.savez(path, x=np.zeros(3))


def objects(path: Path) -> None:
    np.savez(path, header=np.array({"format": 1}, dtype=object))


def later_version(path: Path) -> None:
    np.savez(path, header=np.array(json.dumps({"format": 99})))


def half_a_header(path: Path) -> None:
    np.savez(path, header=np.array(json.dumps({"format": 1, "spec": GraphSpec(TINY).to_json()})))


def cut_off(path: Path) -> None:
    data = recorded(path, inputs_of((1,))).read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b""), "no recording"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)), "no recording"),
        (lone_array, "no recording"),
        (other_arrays, "no recording"),
        (objects, "no recording"),
        (half_a_header, "no recording"),
        (cut_off, "no recording"),
        (later_version, "version 99.*record it again"),
    ],
    ids=["absent", "empty", "picture", "array", "arrays", "objects", "header", "cut", "later"],
)
def test_what_is_no_recording_is_a_user_error(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(UserError, match=said) as caught:
        RecordedRunner(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_damage(tmp_path: Path) -> None:
    inputs = inputs_of((1,))
    path = recorded(tmp_path / "a.npz", inputs)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1  # within the output, by far the largest array
    path.write_bytes(data)
    with RecordedRunner(path) as found, pytest.raises(UserError, match="damaged"):
        found.run(inputs)


def test_an_output_of_another_shape_is_damage(tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.npz", inputs_of((1,)))
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    key = next(name for name in arrays if name.endswith("/output"))
    for wrong in (arrays[key][:, :-1], arrays[key].astype(np.float64), None):
        changed = {**arrays, key: wrong} if wrong is not None else dict(arrays)
        if wrong is None:
            del changed[key]
        np.savez(path, **changed)
        with RecordedRunner(path) as found, pytest.raises(UserError, match="no 'output' of float"):
            found.run(inputs_of((1,)))


# -- parity ---------------------------------------------------------------------------------------


def test_a_verdict_is_the_same_with_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    with RecordingRunner(WithMasks(), path) as reference:
        live = judged(WithMasks(shade=1e-3), reference)
    with RecordedRunner(path) as found:
        again = judged(WithMasks(shade=1e-3), found)
        assert not live.passed
        assert again.cases == live.cases
        assert judged(WithMasks(), found).passed


@pytest.mark.parametrize("fields", [{"batch": 1}, {"batch": 2}, {"io": "uint8"}], ids=str)
def test_a_candidate_with_another_batch_or_type_finds_its_answers(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    with RecordingRunner(WithMasks(), tmp_path / "a.npz") as reference:
        judged(WithMasks(), reference)
    with RecordedRunner(tmp_path / "a.npz") as found:
        report = judged(WithMasks(**fields), found)
        assert report.passed, [case.failures for case in report.cases]
        assert report.unchecked == ()
        assert not judged(WithMasks(shade=0.1, **fields), found).passed
        with pytest.raises(UserError, match=r"batch 2.*record it again"):
            judged(WithMasks(batch=3), found)


def test_masks_are_compared_with_the_recorded_ones(tmp_path: Path) -> None:
    class Wrong(WithMasks):
        def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
            results = super().run(inputs)
            results["mask_state/conv_first"][0, 0, 5, 5] = (
                1.0 - results["mask_state/conv_first"][0, 0, 5, 5]
            )
            return results

    with RecordingRunner(WithMasks(), tmp_path / "a.npz") as reference:
        judged(WithMasks(), reference)
    with RecordedRunner(tmp_path / "a.npz") as found:
        report = judged(Wrong(), found)
        assert [case.wrong_masks for case in report.cases] == [("conv_first",)] * 2
        assert not report.passed
        without = judged(WithMasks(masks=False), found)
    assert without.unchecked == ("mask states: the candidate gives none",)


def test_the_reference_of_an_export_can_be_recorded_and_read(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    path = tmp_path / "reference.npz"
    with open_candidate(tiny_onnx) as candidate:
        with open_reference(candidate.spec, near=tiny_onnx, record=path) as reference:
            live = judged(candidate, reference)
        with open_reference(candidate.spec, path, near=tiny_onnx) as found:
            assert isinstance(found, RecordedRunner)
            assert found.name.startswith("recording of PyTorch ")
            assert found.spec.precision == "fp32"
            again = judged(candidate, found)
    assert live.passed
    assert again.cases == live.cases
    assert all(case.masks == 10 for case in again.cases)
    assert again.unchecked == ()


def test_a_recording_of_other_weights_or_noise_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    path = recorded(tmp_path / "a.npz", inputs_of((1,)))
    spec = OrtRunner(tiny_onnx).spec
    with pytest.raises(UserError, match=r"a\.npz' does not hold the candidate's weights"):
        open_reference(spec, path)
    same = spec.with_changes(checkpoint="c" * 64)
    with open_reference(same, path) as found:
        assert isinstance(found, RecordedRunner)
    with pytest.raises(UserError, match="recorded with --noise const and the candidate"):
        open_reference(same.with_changes(noise="input"), path)
