"""A short parity check, for engines of one model that are held against each other.

It is no proof: three masks of the suite, at one size, against ONNX Runtime. The bar is the
precision's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mat_export.parity import ParityReport, check_parity, open_candidate, open_reference
from mat_export.suite import cases

__all__ = ["QUICK_MASKS", "check_quickly", "in_words"]

QUICK_MASKS = ("one-window", "shift-seams", "random-large")
"""Masks that ask most of windows: one without a valid token, tokens that meet across the shift's
seams, and holes as they are in use."""


def check_quickly(
    candidate: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    answers: Path,
    *,
    batch: int,
    size: tuple[int, int],
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> ParityReport:
    """Hold a candidate against its reference under QUICK_MASKS.

    Args:
        candidate: An engine or ONNX file.
        reference: The ONNX file that it was made of: in FP32, or quantized as it is.
        answers: The reference's answers (``.npz``), which the first candidate's check records and
            the next ones' read.
        batch: Images at once, where candidate and reference take any number.
        size: Height and width in pixels.
        progress: Called with the next mask's name, its number and how many there are.

    Raises:
        UserError: If either cannot be opened or run.
    """
    suite = [case for case in cases(*size) if case.name in QUICK_MASKS]
    known = answers.is_file()
    with (
        open_candidate(candidate) as judged,
        open_reference(
            judged.spec,
            answers if known else reference,
            record=None if known else answers,
            any_precision=True,
        ) as held,
    ):
        return check_parity(judged, held, suite=suite, batch=batch, progress=progress)


def in_words(report: ParityReport) -> str:
    """The worst figure that the bar asks for, or what failed first."""
    failed = next((case for case in report.cases if not case.passed), None)
    if failed is not None:
        return f"parity FAILED, {failed.name}: {failed.failures[0]}"
    errors = [error for case in report.cases for error in (case.hole, case.ring)]
    masks = f"over {len(report.cases)} hard masks"
    if report.bar.relative is not None:
        worst = max(error.relative for error in errors if error.relative is not None)
        return f"relative error {worst:.1e} or less {masks}"
    return f"PSNR {min(e.psnr for e in errors if e.psnr is not None):.1f} dB or more {masks}"
