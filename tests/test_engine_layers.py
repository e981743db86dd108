"""Figures of an engine, from every form of the inspector's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.layers import LayerSummary, summarise


def tensor(kind: str, *sizes: int, key: str = "Format/Datatype") -> dict[str, Any]:
    return {"Name": "t", "Location": "Device", "Dimensions": list(sizes), key: kind}


CONV_86 = {
    "Name": "first_stage.conv_first.conv/Conv + first_stage.conv_first/LeakyRelu",
    "LayerType": "CaskConvolution",
    "Inputs": [tensor("Channel major FP16 format where channel % 8 == 0", 1, 8, 4, 4)],
    "Outputs": [tensor("Channel major FP16 format where channel % 8 == 0", 1, 16, 4, 4)],
    "ParameterType": "Convolution",
    "Kernel": [3, 3],
    "OutMaps": 16,
    "Weights": {"Type": "Half", "Count": 1152},
    "Bias": {"Type": "Float", "Count": 16},
    "TacticName": "sm80_xmma_fprop_implicit_gemm",
    "TacticValue": "0x1",
}
REFORMAT_86 = {
    "Name": "Reformatting CopyNode for Input Tensor 0 to first_stage.conv_first.conv/Conv",
    "LayerType": "Reformat",
    "Inputs": [tensor("Row major linear FP32", 1, 8, 4, 4)],
    "Outputs": [tensor("Channel major FP16 format where channel % 8 == 0", 1, 8, 4, 4)],
    "ParameterType": "Reformat",
    "Origin": "REFORMAT",
}
BLOCK_86 = {
    "Name": "{ForeignNode[mapping.fc.0/Gemm...second_stage/Sqrt]}",
    "LayerType": "Myelin",
    "Inputs": [tensor("Row major linear FP32", 1, 512)],
    "Outputs": [tensor("Row major linear FP32", 1, 512), tensor("Row major linear BOOL", 1, 4)],
    "TacticName": "",
}


def test_a_detailed_engine_of_8_6() -> None:
    summary = summarise({"Layers": [REFORMAT_86, CONV_86, BLOCK_86], "Bindings": ["image"]})
    assert summary == LayerSummary(
        layers=3,
        detailed=True,
        by_type={"Reformat": 1, "CaskConvolution": 1, "Myelin": 1},
        by_precision={"fp16": 1, "fp32": 1},
        reformats=1,
        weight_bytes=2 * 1152 + 4 * 16,
        tensor_bytes=(4 + 2) * 128 + 2 * (128 + 256) + 4 * (512 + 512) + 4,
        convolution_flop={"fp16": 2 * 1152 * 4 * 4},
    )


def test_convolutions_count_by_the_type_they_read() -> None:
    quantized = {
        **CONV_86,
        "Inputs": [tensor("Thirty-two wide channel vectorized row major Int8 format", 1, 8, 4, 4)],
    }
    blind = {**CONV_86, "OutMaps": None}
    flop = summarise({"Layers": [CONV_86, quantized, quantized, blind]}).convolution_flop
    assert flop == {"int8": 2 * 2 * 1152 * 4 * 4, "fp16": 2 * 1152 * 4 * 4}


def test_an_engine_of_8_6_that_tells_names_alone() -> None:
    summary = summarise({"Layers": [REFORMAT_86["Name"], CONV_86["Name"]], "Bindings": ["image"]})
    assert (summary.layers, summary.reformats, summary.detailed) == (2, 1, False)
    assert not summary.by_type
    assert not summary.by_precision


def test_an_engine_of_10_says_types_in_one_word() -> None:
    layer = {
        "Name": "__myl_CastMulAdd_myl0_3",
        "LayerType": "kgen",
        "Inputs": [tensor("Float", 2, 3)],
        "Outputs": [tensor("BFloat16", 2, 3)],
        "TacticName": "__myl_CastMulAdd_0x1",
        "StreamId": 0,
        "Metadata": "[ONNX Layer: a/Cast]",
    }
    summary = summarise({"Layers": [layer]})
    assert summary.by_precision == {"bf16": 1}
    assert summary.tensor_bytes == 6 * 4 + 6 * 2


def test_an_engine_of_11_says_type_and_format_apart() -> None:
    output = {**tensor("Half", 5, key="DataType"), "Format": "Row major linear FP32 (kLINEAR)"}
    summary = summarise({"Layers": [{"Name": "x", "LayerType": "gemm", "Outputs": [output]}]})
    assert summary.by_precision == {"fp16": 1}
    assert summary.tensor_bytes == 10


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Row major linear INT32", "int32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("UInt8", "uint8"),
        ("Int64", "int64"),
        ("FP8", "fp8"),
        ("Bool", "bool"),
        ("BF16", "bf16"),
        ("Half", "fp16"),
        ("N/A due to dynamic shapes", "unknown"),
    ],
)
def test_every_element_type_is_known_by_its_texts(text: str, name: str) -> None:
    layer = {"Name": "x", "LayerType": "y", "Outputs": [tensor(text, 1)]}
    assert summarise({"Layers": [layer]}).by_precision == {name: 1}


def test_a_dynamic_tensor_counts_for_nothing() -> None:
    layer = {"Name": "x", "LayerType": "y", "Outputs": [tensor("Half", -1, 3)]}
    assert summarise({"Layers": [layer]}).tensor_bytes == 0


@pytest.mark.parametrize(
    "information",
    [
        {},
        {"Layers": None},
        {"Layers": [None, 3, {}]},
        {"Layers": [{"Name": None, "LayerType": 3, "Inputs": "x", "Outputs": [None, {}]}]},
        {"Layers": [{"Weights": 3, "Bias": {"Count": "x"}, "Outputs": [{"Dimensions": ["a"]}]}]},
    ],
)
def test_what_is_not_said_is_left_out(information: dict[str, Any]) -> None:
    summary = summarise(information)
    assert summary.weight_bytes == summary.tensor_bytes == summary.reformats == 0
    assert summary.layers == len(information.get("Layers") or [])


def test_the_figures_go_through_json() -> None:
    summary = summarise({"Layers": [CONV_86]})
    assert LayerSummary(**json.loads(json.dumps(summary.to_dict()))) == summary


def test_what_8_6_says_of_the_network_is_read() -> None:
    """A part of the real thing: mat-512 in TF32 on an H100, control characters and all."""
    text = (Path(__file__).parent / "data" / "engine_inspector_86.json").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="control character"):
        json.loads(text)
    summary = summarise(json.loads(text, strict=False))
    assert summary.layers == 42
    assert summary.detailed
    assert summary.by_type["Myelin"] == summary.by_type["CaskConvolution"] == 3
    assert summary.reformats == 3
    assert set(summary.by_precision) == {"fp32", "bool", "int32"}
    assert summary.weight_bytes > 0
    assert sum(summary.convolution_flop.values()) > 0
