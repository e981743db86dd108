"""The forms of each operator agree: PyTorch reference, torch.library operator, ONNX function.

The CUDA kernels join wherever they have the window, on a CPU that plays a GPU, and so do the
TensorRT plugins of each generation whose headers are here: in FP32, FP16 and BF16, on the numbers
that the other forms have in FP32.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from attention_cases import BARS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import as_integers, call_kernels
from numpy.typing import NDArray
from onnx import TensorProto, helper
from plugin_harness import Harness
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engines.plugins.kernels import KernelLibrary
from engines.plugins.toolchain import find_headers
from mat_export import functions, ops
from mat_export.contract import OPERATOR_DOMAIN, UserError
from mat_torch import attention
from mat_torch.config import LRELU_SLOPE

OPSETS = (17, 20)
FLOOR = 0.1
"""What b counts for at least, root mean square: a few numbers may cancel to almost nothing."""

SHIFT_ARITHMETIC = {"Range", "Less", "Equal", "Mod", "ScatterElements"}
"""What the order of windows and the shift mask are made of."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One call of the operators, and how its numbers are drawn.

    Attributes:
        side: What `grid` counts in: the window, or less where the window is larger than the grid.
        tiles: Rows and columns of the grid, in sides.
        window: As the network has it, before the grid has its say.
        shift: Likewise.
        kept: ``none``, ``all``, ``one`` token, ``random``, or ``first`` window only.
        masks: Masks in the batch: as many as images, or one for all.
        dtype: What queries, keys and values are rounded to, and what the kernels compute in.
    """

    side: int
    tiles: tuple[int, int]
    window: int
    shift: int = 0
    heads: int = 1
    head_dim: int = 3
    batch: int = 1
    kept: str = "random"
    masks: int = 1
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def grid(self) -> tuple[int, int]:
        return self.side * self.tiles[0], self.side * self.tiles[1]

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def has_kernel(self) -> bool:
        cut, _ = attention.effective_window(*self.grid, self.window, self.shift)
        whole = all(side % cut == 0 for side in self.grid)
        return cut in (8, 16) and whole and self.head_dim % 2 == 0


def cases() -> st.SearchStrategy[Case]:
    @st.composite
    def build(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Case:
        side = draw(st.sampled_from([1, 2, 3, 4, 8, 8, 8, 16]))
        most = {8: 3, 16: 2}.get(side, 4)
        tiles = (draw(st.integers(1, most)), draw(st.integers(1, most)))
        # Only a grid of one row or column of windows may be smaller than the window.
        window = side + (draw(st.integers(0, 3)) if min(tiles) == 1 else 0)
        batch = draw(st.integers(1, 3))
        return Case(
            side,
            tiles,
            window,
            shift=draw(st.integers(0, window - 1)),
            heads=draw(st.integers(1, 3)),
            head_dim=draw(st.sampled_from([2, 4, 6, 30, 32] if side >= 8 else [1, 2, 3, 4, 5])),
            batch=batch,
            kept=draw(st.sampled_from(["none", "all", "one", "random", "first"])),
            masks=draw(st.sampled_from([1, batch])),
            seed=draw(st.integers(0, 2**32 - 1)),
            dtype=draw(st.sampled_from(list(BARS))) if side >= 8 else torch.float32,
        )

    return build()


HARD = {
    "window_without_a_valid_token": Case(4, (2, 2), 4, heads=2, kept="first"),
    "shifted_window_without_a_valid_token": Case(4, (2, 2), 4, 2, heads=2, kept="first"),
    "all_invalid": Case(4, (2, 3), 4, 2, heads=2, batch=2, kept="none", masks=2),
    "all_valid": Case(4, (3, 2), 4, 2, heads=2, batch=2, kept="all", masks=2),
    "one_token_valid": Case(4, (2, 2), 4, 2, heads=3, kept="one"),
    "grid_of_one_token": Case(1, (1, 1), 1),
    "windows_of_one_token": Case(1, (3, 5), 1, heads=2),
    "shift_seams_of_rows_and_columns": Case(4, (3, 4), 4, 3, heads=2, kept="all"),
    "shift_by_one": Case(4, (2, 2), 4, 1, kept="all"),
    "grid_is_the_window": Case(4, (1, 1), 4, 2, heads=2),
    "grid_is_smaller_than_the_window": Case(3, (1, 1), 8, 4, heads=2),
    "short_grid_is_cut_by_its_shorter_side": Case(2, (1, 4), 8, 4, heads=2, batch=2, masks=2),
    "narrow_grid_is_cut_by_its_shorter_side": Case(2, (3, 1), 3, 1),
    "windows_of_the_network": Case(8, (2, 2), 8, 4, heads=2, head_dim=8, batch=2, masks=2),
    "large_windows_of_the_network": Case(16, (2, 2), 16, 8, heads=1, head_dim=30),
    "heads_without_padding": Case(8, (2, 1), 8, 4, heads=2, head_dim=32, kept="first"),
    "grid_cut_to_a_window_of_eight": Case(8, (1, 2), 16, 8, heads=2, head_dim=6, batch=2),
}


# -- numbers ---------------------------------------------------------------------------------------


def validity(case: Case) -> NDArray[np.bool_]:
    """Bool [masks, 1, H, W]."""
    height, width = case.grid
    shape = (case.masks, 1, height, width)
    if case.kept == "random":
        return np.random.default_rng(case.seed).random(shape) < 0.3
    valid = np.full(shape, case.kept == "all")
    if case.kept == "one":
        valid[:, :, height // 2, width - 1] = True
    if case.kept == "first":
        side = min(case.window, height, width)
        valid[:, :, :side, :side] = True
    return valid


def arrays(case: Case) -> Arrays:
    """The inputs of every operator."""
    rng = np.random.default_rng(case.seed + 1)
    height, width = case.grid
    C = case.channels

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    tokens = {name: normal(case.batch, height, width, C) for name in ("q", "k", "v", "x", "y")}
    # The caller normalises queries and keys; logits up to ±4 make the softmax uneven.
    for name, scale in (("q", 4.0), ("k", 1.0)):
        norm = np.linalg.norm(tokens[name], axis=-1, keepdims=True)
        tokens[name] *= np.float32(scale) / norm
    for name in ("q", "k", "v"):
        tokens[name] = torch.from_numpy(tokens[name]).to(case.dtype).float().numpy()
    tokens["x"][:, -1, -1] *= np.float32(1e-9)  # a direction nonetheless
    tokens["x"][:, 0, 0] = 0.0  # as a token that no kept pixel reaches
    return {
        **tokens,
        "valid": validity(case),
        "query_key_weight": normal(C, 2 * C),
        "query_key_bias": normal(2 * C),
        "value_weight": normal(C, C),
        "fuse_weight": normal(2 * C, C),
        "fuse_bias": normal(C),
        "fc1_weight": normal(C, 2 * C),
        "fc1_bias": normal(2 * C),
        "fc2_weight": normal(2 * C, C),
        "fc2_bias": normal(C),
        "d": normal(case.batch, 4 * case.heads, height, width),
        # Three layers of four channels, two of them demodulated.
        "style": normal(case.batch, 5),
        "style_weight": normal(5, 12),
        "style_bias": normal(12),
        "energy": normal(2, 4, 6) ** 2,
        "norm": np.array([[0.5], [3.0]], np.float32),
    }


STYLE_SCALES = ("style", "style_weight", "style_bias", "energy", "norm")
FUSE_MLP = ("x", "y", *(f"{n}_{p}" for n in ("fuse", "fc1", "fc2") for p in ("weight", "bias")))
QUERY_KEY_VALUE = ("x", "query_key_weight", "query_key_bias", "value_weight")


# -- forms -----------------------------------------------------------------------------------------


def by_reference(case: Case, inputs: Arrays) -> dict[str, Tensor]:
    """The training model's functions, or plain PyTorch."""
    t = {name: torch.from_numpy(array) for name, array in inputs.items()}
    window, shift, heads = case.window, case.shift, case.heads

    def attend(valid: Tensor | None) -> Tensor:
        return attention.masked_window_attention(
            t["q"], t["k"], t["v"], valid, window=window, shift=shift, heads=heads
        )

    both = F.linear(F.normalize(t["x"], dim=-1), t["query_key_weight"].T, t["query_key_bias"])
    q, k = both.chunk(2, dim=-1)
    h = torch.cat([t["x"], t["y"]], dim=-1)
    for name in ("fuse", "fc1"):
        h = F.leaky_relu(F.linear(h, t[f"{name}_weight"].T, t[f"{name}_bias"]), LRELU_SLOPE)
    styles = F.linear(t["style"], t["style_weight"].T, t["style_bias"]).reshape(-1, 3, 4)
    magnitude = styles.abs().amax(dim=2)
    s = styles / magnitude[:, :, None]
    sums = torch.einsum("bci,cio->bco", s[:, :2] ** 2, t["energy"])
    factor = torch.rsqrt(sums + 5e-9 / (magnitude[:, :2, None] * t["norm"]) ** 2)
    deep = torch.unflatten(t["d"], 1, (4, -1)).transpose(1, 2).flatten(1, 2)
    return {
        "attended": attend(t["valid"]),
        "attended_unmasked": attend(None),
        "propagated": attention.mask_propagation(t["valid"], window=window, shift=shift),
        "queries": q,
        "keys": k,
        "values": t["x"] @ t["value_weight"],
        "fused": F.linear(h, t["fc2_weight"].T, t["fc2_bias"]),
        "scale": s.reshape(-1, 12, 1, 1),
        "factor": factor.reshape(-1, 12, 1, 1),
        "magnitude": magnitude.reshape(-1, 3, 1, 1),
        "interleaved": F.pixel_shuffle(deep, 2),
    }


def by_operator(case: Case, inputs: Arrays) -> dict[str, Tensor]:
    """The torch.library operators."""
    t = {name: torch.from_numpy(array) for name, array in inputs.items()}
    qkv, cut = (t["q"], t["k"], t["v"]), (case.window, case.shift)
    q, k, v = ops.query_key_value(*(t[name] for name in QUERY_KEY_VALUE))
    scale, factor, magnitude = ops.style_scales(*(t[name] for name in STYLE_SCALES))
    return {
        "attended": ops.masked_window_attention(*qkv, t["valid"], *cut, case.heads),
        "attended_unmasked": ops.masked_window_attention(*qkv, None, *cut, case.heads),
        "propagated": ops.mask_propagation(t["valid"], *cut),
        "queries": q,
        "keys": k,
        "values": v,
        "fused": ops.fuse_mlp(*(t[name] for name in FUSE_MLP)),
        "scale": scale,
        "factor": factor,
        "magnitude": magnitude,
        "interleaved": ops.depth_to_space(t["d"]),
    }


def onnx_model(case: Case, opset: int, *, dynamic: bool, batch: str | int) -> onnx.ModelProto:
    """A model of one node an operator, as the exporter writes them."""
    height, width = case.grid
    cut = {"window": case.window, "shift": case.shift}
    if not dynamic:
        window, shift = attention.effective_window(height, width, case.window, case.shift)
        cut = {"window": window, "shift": shift, "height": height, "width": width}

    def node(
        name: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int
    ) -> onnx.NodeProto:
        made = helper.make_node(name, inputs, outputs, name=name, domain=OPERATOR_DOMAIN)
        made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        return made

    qkv = ("q", "k", "v")
    nodes = [
        node(functions.ATTENTION, (*qkv, "valid"), ["attended"], **cut, heads=case.heads),
        node(functions.UNMASKED_ATTENTION, qkv, ["attended_unmasked"], **cut, heads=case.heads),
        node(functions.PROPAGATION, ["valid"], ["propagated"], **cut),
        node(functions.QUERY_KEY_VALUE, QUERY_KEY_VALUE, ["queries", "keys", "values"]),
        node(functions.FUSE_MLP, FUSE_MLP, ["fused"]),
        node(
            functions.STYLE_SCALES,
            STYLE_SCALES,
            ["scale", "factor", "magnitude"],
            width=4,
            demodulated=2,
        ),
        helper.make_node("DepthToSpace", ["d"], ["interleaved"], blocksize=2, mode="DCR"),
    ]

    def declared(name: str, array: NDArray[Any]) -> onnx.ValueInfoProto:
        kind = TensorProto.BOOL if array.dtype == np.bool_ else TensorProto.FLOAT
        shape: list[str | int] = list(array.shape)
        if array.ndim == 4:
            if isinstance(batch, str):
                shape[0] = "masks" if name == "valid" else batch
            axis = 2 if name in ("valid", "d") else 1
            if dynamic:
                shape[axis : axis + 2] = ["height", "width"]
        return helper.make_tensor_value_info(name, kind, shape)

    outputs = [name for made in nodes for name in made.output]
    graph = helper.make_graph(
        nodes,
        "operators",
        [declared(name, array) for name, array in arrays(case).items()],
        [
            helper.make_tensor_value_info(
                name,
                TensorProto.BOOL if name == "propagated" else TensorProto.FLOAT,
                [f"{name}_{i}" for i in range(4)],
            )
            for name in outputs
        ],
    )
    model = helper.make_model(
        graph,
        ir_version=8,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(OPERATOR_DOMAIN, 1)],
        functions=functions.function_library(opset, dynamic=dynamic),
    )
    onnx.checker.check_model(model)
    return model


def session(model: onnx.ModelProto, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def by_onnx(
    case: Case, inputs: Arrays, opset: int, *, dynamic: bool, batch: str | int
) -> dict[str, Tensor]:
    """The ONNX functions in ONNX Runtime."""
    made = session(onnx_model(case, opset, dynamic=dynamic, batch=batch))
    names = [output.name for output in made.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, made.run(names, inputs)), strict=True))


def by_kernel(case: Case, inputs: Arrays, library: KernelLibrary) -> dict[str, Tensor]:
    """The CUDA kernels on a CPU that plays a GPU."""
    t = {name: torch.from_numpy(array) for name, array in inputs.items()}
    window, shift = attention.effective_window(*case.grid, case.window, case.shift)
    cut: dict[str, Any] = {"window": window, "shift": shift, "heads": case.heads}
    q, k, v = (t[name].to(case.dtype) for name in ("q", "k", "v"))
    valid = t["valid"]
    masked = call_kernels(library, q, k, v, valid, **cut)
    assert masked.alone is not None
    assert masked.tidy
    assert torch.equal(masked.behind, masked.alone)
    return {
        "attended": masked.y,
        "attended_unmasked": call_kernels(library, q, k, v, None, **cut).y,
        "propagated": masked.alone.bool()[: case.masks, None],
    }


def by_plugin(case: Case, inputs: Arrays, harness: Harness) -> dict[str, Tensor]:
    """The TensorRT plugins around the kernels."""
    t = {name: torch.from_numpy(array) for name, array in inputs.items()}
    window, shift = attention.effective_window(*case.grid, case.window, case.shift)
    cut = f"window={window} shift={shift}"
    qkv = [t[name].to(case.dtype) for name in ("q", "k", "v")]
    masks = as_integers(t["valid"])
    own = masks.expand(case.batch, -1, -1, -1).contiguous()  # a mask an image
    results = {
        "attended": torch.full_like(qkv[2], torch.nan),
        "attended_unmasked": torch.full_like(qkv[2], torch.nan),
        "propagated": torch.full_like(masks, -1),
    }
    calls = (
        (functions.ATTENTION, f"{cut} heads={case.heads}", [*qkv, own]),
        (functions.UNMASKED_ATTENTION, f"{cut} heads={case.heads}", qkv),
        (functions.PROPAGATION, cut, [masks]),
    )
    for (name, attributes, tensors), out in zip(calls, results.values(), strict=True):
        assert harness.play(name, attributes, tensors, out) == 0, (name, harness.last_line)
    propagated = results["propagated"].bool()
    assert torch.equal(results["propagated"], propagated.to(masks.dtype))
    return {**results, "propagated": propagated}


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Harness]:
    """The plugins of each generation of TensorRT whose headers are here."""
    found = {}
    for version, major, include in (
        ("v2", 8, os.environ.get("TENSORRT86_INCLUDE")),
        ("v3", 10, None),
    ):
        with contextlib.suppress(UserError):
            headers = find_headers(include, major).folder
            found[version] = Harness(version, headers, tmp_path_factory.mktemp(version))
    return found


# -- one property ----------------------------------------------------------------------------------


def check_agreement(
    form: str,
    results: dict[str, Tensor],
    expected: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Results in a type are within its bar of those expected, in FP32; masks are equal."""
    assert results.keys() == expected.keys()
    for name, reference in expected.items():
        result = results[name]
        kind = torch.bool if reference.dtype == torch.bool else dtype
        assert result.dtype == kind, (form, name)
        assert result.shape == reference.shape, (form, name)
        if reference.dtype == torch.bool:
            assert torch.equal(result, reference), (form, name)
        else:
            assert bool(torch.isfinite(reference).all()), (form, name)
            error, size = float((result.float() - reference).norm()), float(reference.norm())
            size = max(size, FLOOR * reference.numel() ** 0.5)
            assert error <= BARS[dtype] * size, (form, name, error, size)


def check_forms(case: Case, kernels: KernelLibrary, plugins: dict[str, Harness]) -> None:
    """Every form of every operator gives what the reference gives."""
    inputs = arrays(case)
    expected = by_reference(case, inputs)
    check_agreement("torch.library", by_operator(case, inputs), expected)
    if case.has_kernel:
        results = by_kernel(case, inputs, kernels)
        own = {name: expected[name] for name in results}
        check_agreement("CUDA kernels", results, own, case.dtype)
        for version, harness in plugins.items():
            if (version, case.dtype) == ("v2", torch.bfloat16):
                continue  # TensorRT 8.6 has no such plugins
            results = by_plugin(case, inputs, harness)
            check_agreement(f"plugins of TensorRT, {version}", results, own, case.dtype)
    for opset in OPSETS:
        for dynamic in (False, True):
            batch = case.batch if opset == 17 else "batch"
            results = by_onnx(case, inputs, opset, dynamic=dynamic, batch=batch)
            form = f"ONNX, opset {opset}, {'dynamic' if dynamic else 'fixed'} grid"
            check_agreement(form, results, expected)


@given(case=cases())
@settings(max_examples=60, deadline=None)
def test_all_forms_of_every_operator_agree(
    case: Case, paper_kernels: KernelLibrary, plugins: dict[str, Harness]
) -> None:
    check_forms(case, paper_kernels, plugins)


HARD_IN_TYPES = [
    (name, dtype)
    for name, case in HARD.items()
    for dtype in BARS
    if case.has_kernel or dtype == torch.float32
]


@pytest.mark.parametrize(("name", "dtype"), HARD_IN_TYPES, ids=str)
def test_all_forms_agree_in_the_hard_case(
    name: str, dtype: torch.dtype, paper_kernels: KernelLibrary, plugins: dict[str, Harness]
) -> None:
    check_forms(replace(HARD[name], dtype=dtype), paper_kernels, plugins)


# -- what the hard cases are for -------------------------------------------------------------------


def test_a_window_without_valid_tokens_attends_to_all_of_its_tokens_alike() -> None:
    inputs = arrays(HARD["window_without_a_valid_token"])
    inputs["k"] = np.zeros_like(inputs["k"])  # no key stands out, so only masks could
    y = by_operator(HARD["window_without_a_valid_token"], inputs)["attended"]
    mean = torch.from_numpy(inputs["v"][:, 4:, 4:]).mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(y[:, 4:, 4:], mean.expand(-1, 4, 4, -1))


def test_tokens_that_only_the_shift_brought_together_do_not_see_each_other() -> None:
    case = HARD["shift_seams_of_rows_and_columns"]
    inputs = arrays(case)
    before = by_operator(case, inputs)["attended"]
    inputs["v"][:, 0, :] += 1.0  # row 0 is rolled to the last rows' windows
    after = by_operator(case, inputs)["attended"]
    changed = (before != after).any(dim=-1)[0]
    assert bool(changed[:3].all())
    assert not bool(changed[3:].any())


def test_a_token_becomes_valid_through_its_own_window_only() -> None:
    case = HARD["one_token_valid"]
    state = by_operator(case, arrays(case))["propagated"][0, 0]
    # The token (4, 7) lies in the shifted window of rows 2 to 5 that wraps at the right border.
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, [6, 7, 0, 1]] = True
    assert torch.equal(state, expected)


# -- registration ----------------------------------------------------------------------------------


def operator_calls() -> Iterable[tuple[str, Any, tuple[Any, ...]]]:
    case = HARD["windows_of_the_network"]
    t = {name: torch.from_numpy(array) for name, array in arrays(case).items()}
    qkv = (t["q"], t["k"], t["v"])
    attend = ops.masked_window_attention
    yield "masked_window_attention", attend, (*qkv, t["valid"], 8, 4, case.heads)
    yield "masked_window_attention_unmasked", attend, (*qkv, None, 8, 0, case.heads)
    turned = (*(x.transpose(1, 2) for x in qkv), t["valid"].transpose(2, 3))
    yield "masked_window_attention_transposed", attend, (*turned, 8, 4, case.heads)
    yield "mask_propagation", ops.mask_propagation, (t["valid"], 8, 4)
    yield "mask_propagation_transposed", ops.mask_propagation, (turned[3], 1, 0)
    yield "mask_propagation_of_one_token", ops.mask_propagation, (t["valid"], 1, 0)
    yield "query_key_value", ops.query_key_value, tuple(t[name] for name in QUERY_KEY_VALUE)
    yield "fuse_mlp", ops.fuse_mlp, tuple(t[name] for name in FUSE_MLP)
    yield "style_scales", ops.style_scales, tuple(t[name] for name in STYLE_SCALES)
    yield "depth_to_space", ops.depth_to_space, (t["d"],)


CALLS = {name: (operator, args) for name, operator, args in operator_calls()}


def test_every_operator_is_among_those_checked() -> None:
    assert {operator._qualname for operator, _ in CALLS.values()} == {
        f"mat::{n}" for n in ops.__all__
    }


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_registered_soundly(name: str) -> None:
    operator, args = CALLS[name]
    results = torch.library.opcheck(operator, args)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_a_fake_kernel_gives_the_shape_type_and_layout_of_the_real_one(
    name: str, dtype: torch.dtype
) -> None:
    operator, args = CALLS[name]

    def cast(arg: Any) -> Any:
        return arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg

    args = tuple(map(cast, args))
    real = operator(*args)
    with FakeTensorMode() as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
    for a, b in pairs:
        assert (b.shape, b.dtype, b.stride()) == (a.shape, a.dtype, a.stride())


def test_a_gradient_is_refused_with_what_has_one() -> None:
    q = torch.zeros(1, 8, 8, 2, requires_grad=True)
    y = ops.masked_window_attention(q, q, q, None, 8, 0, 1)
    with pytest.raises(RuntimeError, match=r"train with mat_torch\.attention"):
        y.sum().backward()


# -- what is left at run time ----------------------------------------------------------------------


def op_types(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    return {node.op_type for node in nodes}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("batch", [2, "batch"], ids=["fixed_batch", "dynamic_batch"])
def test_a_fixed_grid_leaves_no_shift_arithmetic_after_loading(
    batch: str | int, opset: int, tmp_path: Path
) -> None:
    case = HARD["windows_of_the_network"]
    model = onnx_model(case, opset, dynamic=False, batch=batch)
    written = op_types(node for function in model.functions for node in function.node)
    assert written >= SHIFT_ARITHMETIC  # so that their absence says something
    session(model, tmp_path / "optimized.onnx")
    optimized = onnx.load(tmp_path / "optimized.onnx")
    left = op_types(optimized.graph.node) | op_types(
        node for function in optimized.functions for node in function.node
    )
    assert not left & (SHIFT_ARITHMETIC | {functions.WINDOW_ORDER}), left
    assert "Softmax" in left
    assert not {node.domain for node in optimized.graph.node} & {OPERATOR_DOMAIN}
