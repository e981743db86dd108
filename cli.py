"""The command line `mat-export`.

Every command imports what it needs inside itself, so that ``--help`` and the commands that run
exported models need the base dependencies alone. Exit codes: 0 done, 1 a check failed, 2 bad input
or usage.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mat_export.openers import register_opener

if TYPE_CHECKING:
    from engines.choice import Contest
    from engines.options import BuildOptions
    from mat_export.parity import ParityReport
    from mat_export.runners import Runner
    from mat_torch import Checkpoint, GeneratorConfig

ENGINE_SUFFIXES = (".plan", ".engine")
"""Ends of an engine's name, by which every command knows it."""

for suffix in ENGINE_SUFFIXES:
    register_opener(suffix, "engines.runner:EngineRunner")

app = typer.Typer(
    name="mat-export",
    help="MAT inpainting (Mask-Aware Transformer, CVPR 2022) from a checkpoint to production.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow every "[default: …]"
)

DEFAULT_ONNX = Path("mat.onnx")
"""What `onnx` writes and other commands take where no file is named."""


class Size(str, Enum):
    """Image sizes a graph takes."""

    native = "native"
    dynamic = "dynamic"


class Noise(str, Enum):
    """Where stage two's noise comes from."""

    const = "const"
    input = "input"


class Io(str, Enum):
    """Types of images and masks."""

    float = "float"
    uint8 = "uint8"


class Dtype(str, Enum):
    """Types of weights in a file."""

    float32 = "float32"
    float16 = "float16"


class BackendName(str, Enum):
    """What builds and runs engines."""

    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class TrialName(str, Enum):
    """What runs the model that is on trial."""

    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class Precision(str, Enum):
    """What a graph computes in."""

    fp32 = "fp32"
    tf32 = "tf32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class Plugins(str, Enum):
    """Whether an engine calls our plugin library."""

    auto = "auto"
    on = "on"
    off = "off"


class Device(str, Enum):
    """Where PyTorch runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class MaskKind(str, Enum):
    """The published samplers of masks."""

    large = "large"
    small = "small"


class TrainingMasks(str, Enum):
    """What masks training draws."""

    large = "large"
    small = "small"
    mixed = "mixed"


class Hole(str, Enum):
    """Colour of the hole in a mask picture."""

    black = "black"
    white = "white"


BuildableArgument = Annotated[
    Path, typer.Argument(help="An FP32 file of 'mat-export onnx', or one of 'calibrate'.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        help="The authors' pickle, a state dict (.pth, .pt) or safetensors. "
        "[default: the shipped model]"
    ),
]
PresetOption = Annotated[
    str | None, typer.Option(help="A network by name, with --random-weights: mat-512, …")
]
RandomOption = Annotated[
    int | None, typer.Option("--random-weights", metavar="SEED", help="Untrained weights.")
]
KeyOption = Annotated[str, typer.Option(help="Which network of a pickle to take.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads. [default: all]")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the figures as JSON.")]


@app.command()
def convert(
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors to write.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Any checkpoint we read. [default: the shipped model]")
    ] = None,
    preset: PresetOption = None,
    random_weights: RandomOption = None,
    key: KeyOption = "G_ema",
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.")] = Dtype.float32,
) -> None:
    """Turn any checkpoint into safetensors with its configuration in the metadata."""
    from mat_export.console import note
    from mat_export.contract import UserError
    from mat_export.files import require_other, require_writable
    from mat_torch import CheckpointError, save_checkpoint

    require_other(output, checkpoint)
    require_writable(output)
    loaded = _weights(checkpoint, preset, random_weights, key)
    try:
        save_checkpoint(loaded, output, dtype=dtype.value)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    note(f"wrote {output}: {loaded.config.name}, {output.stat().st_size / 1e6:.1f} MB")


@app.command()
def onnx(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.")
    ] = DEFAULT_ONNX,
    checkpoint: CheckpointOption = None,
    preset: PresetOption = None,
    random_weights: RandomOption = None,
    key: KeyOption = "G_ema",
    batch: Annotated[str, typer.Option(metavar="N|dynamic", help="Images at once.")] = "1",
    size: Annotated[Size, typer.Option(help="The native size, or multiples of it.")] = Size.native,
    noise: Annotated[
        Noise, typer.Option(help="The checkpoint's noise maps, or inputs (needed off native size).")
    ] = Noise.const,
    io: Annotated[
        Io, typer.Option(help="float: NCHW in [-1, 1]; uint8: NHWC image, NHW mask, NHWC out.")
    ] = Io.float,
    coarse: Annotated[bool, typer.Option("--coarse", help="Give stage one's image too.")] = False,
    opset: Annotated[int, typer.Option(help="17 to 20; TensorRT 8.6 parses 17.")] = 20,
) -> None:
    """Export a checkpoint to one ONNX file that any ONNX runtime runs."""
    from mat_export.console import note
    from mat_export.contract import GraphSpec
    from mat_export.files import require_other, require_writable
    from mat_export.manifest import manifest_path
    from mat_export.shipped import PRESET
    from mat_torch.config import preset as preset_of

    def spec_of(config: GeneratorConfig) -> GraphSpec:
        return GraphSpec(
            config,
            batch=_batch(batch),
            dynamic_size=size is Size.dynamic,
            noise=noise.value,
            io=io.value,
            coarse=coarse,
        )

    spec_of(preset_of(preset or PRESET))  # options that clash fail before the work
    require_other(output, checkpoint)
    require_writable(output)
    from mat_export.export import export_onnx
    from mat_export.inference import REWRITES

    note("reading the weights")
    loaded = _weights(checkpoint, preset, random_weights, key)
    report = export_onnx(loaded, output, spec_of(loaded.config), opset=opset, progress=note)
    note("rewrites, each exact:")
    for name, places in report.rewrites.items():
        note(f"  {name} (×{places}): {REWRITES[name]}")
    note(
        f"wrote {output} and {manifest_path(output)}: {report.nodes} nodes "
        f"({report.inlined_nodes} once inlined), opset {report.opset}, "
        f"{report.bytes / 1e6:.1f} MB, {report.seconds:.1f} s"
    )
    note(f"prove it: mat-export parity {output}")


@app.command()
def calibrate(
    model: Annotated[
        Path, typer.Argument(help="An FP32 file of 'mat-export onnx'.")
    ] = DEFAULT_ONNX,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of photographs. [default: three of ours, for checks too]"),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The quantized file to write.")
    ] = Path("mat-int8.onnx"),
    target_db: Annotated[
        float, typer.Option(help="Mean PSNR in the hole against FP32 that the result must reach.")
    ] = 35.0,
    recipe: Annotated[
        Path | None, typer.Option(help="Replay the layers of this file, whatever they cost.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Measurements to take or to write. [default: beside the output]"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples that ranges are counted on.")] = 16,
    checks: Annotated[
        int,
        typer.Option(help="Other samples, of other pictures, that the rest is measured on."),
    ] = 6,
    seed: Annotated[int, typer.Option(help="What all samples are drawn from.")] = 0,
    filters: Annotated[
        bool, typer.Option("--filters", help="Let resampling filters and skips be INT8 too.")
    ] = False,
    json_file: JsonOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Quantize an exported model to INT8: as many layers as the picture allows."""
    import json

    from calib.calibrate import COLUMNS, CalibrationOptions, recipe_path
    from calib.calibrate import calibrate as run
    from mat_export.console import note, show_table, tracker
    from mat_export.files import atomic_write, require_other, require_writable

    model = _exported(model)
    if json_file is not None:
        require_other(json_file, model, output, recipe, record)
        require_writable(json_file)
    options = CalibrationOptions(
        images=images,
        samples=samples,
        checks=checks,
        seed=seed,
        target_db=target_db,
        filters=filters,
        threads=threads,
    )
    with tracker("calibrate") as progress:
        done = run(
            model, output, options, record=record, recipe=recipe, progress=progress, note=note
        )
    show_table("", COLUMNS, done.rows())
    note(
        f"wrote {output} and {recipe_path(output)}: {len(done.recipe.layers)} of "
        f"{len(done.candidates.all)} layers in INT8, {100.0 * done.share:.0f} % of the "
        f"convolutions' work; in the hole {done.quality.mean_db:.1f} dB against FP32, at worst "
        f"{done.quality.worst_db:.1f} dB"
    )
    if json_file is not None:
        atomic_write(json_file, json.dumps(done.to_dict(), indent=2) + "\n")
    note(f"build it: mat-export trt {output} --int8")


@app.command()
def trt(
    model: BuildableArgument = DEFAULT_ONNX,
    output: Annotated[Path, typer.Option("-o", "--output", help="The engine to write.")] = Path(
        "mat.plan"
    ),
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision. [default]")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16, from TensorRT 10 on.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Single precision throughout.")] = False,
    tf32: Annotated[bool, typer.Option("--tf32", help="FP32 on TF32 tensor cores.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="A file of 'mat-export calibrate', the rest in half.")
    ] = False,
    backend: Annotated[
        BackendName, typer.Option(help="auto takes what this machine's GPU, or --target, supports.")
    ] = BackendName.auto,
    target: Annotated[
        str | None,
        typer.Option(metavar="sm_NN", help="Build for this GPU without having it (RTX)."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Where it is dynamic. [default: 1:1:8]"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="HxW each, where it is dynamic. [default: native:native:twice]",
        ),
    ] = None,
    level: Annotated[
        int | None, typer.Option(help="Optimization, 0 to 5. [default: TensorRT's own]")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="Most scratch memory of a layer.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Runs on later TensorRT versions too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="Runs on other GPUs too, Ampere on.")
    ] = False,
    refittable: Annotated[
        bool, typer.Option("--refittable", help="Weights can be swapped by 'mat-export refit'.")
    ] = False,
    mask_states: Annotated[
        bool,
        typer.Option("--mask-states", help="Give the masks of stage one too, to prove them."),
    ] = False,
    tactic_sources: Annotated[
        str | None, typer.Option(metavar="A,B", help="TensorRT's tactic sources to use.")
    ] = None,
    timing_iterations: Annotated[
        int | None, typer.Option(metavar="N", help="Timings to average for each kernel.")
    ] = None,
    plugins: Annotated[
        Plugins,
        typer.Option(help="auto builds with and without our kernels and keeps the faster engine."),
    ] = Plugins.auto,
    plugin_library: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The kernels. [default: cached, or built if nvcc is here]"
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Kernel timings. [default: in the user's cache folder]")
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="PLAN",
            help="Time the engine beside this one of the same network, and say which is faster.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even what is built.")] = False,
) -> None:
    """Build a TensorRT engine of an exported model."""
    from engines.options import BuildOptions, parse_batch, parse_size
    from mat_export.contract import UserError

    wanted = {"fp16": fp16, "bf16": bf16, "fp32": fp32, "tf32": tf32, "int8": int8}
    chosen = [name for name, given in wanted.items() if given] or ["fp16"]
    if len(chosen) > 1:
        raise UserError(f"give one precision, got --{' and --'.join(chosen)}")
    options = BuildOptions(
        backend=backend.value,
        target=target,
        batch=None if batch is None else parse_batch(batch),
        size=None if size is None else parse_size(size),
        level=level,
        workspace_mib=workspace,
        tf32=chosen[0] == "tf32",
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refittable=refittable,
        tactic_sources=None if tactic_sources is None else tuple(tactic_sources.split(",")),
        timing_iterations=timing_iterations,
        plugins=plugins.value,
    )
    model = _exported(model)
    _build(
        model,
        output,
        Precision(chosen[0]),
        options,
        mask_states,
        plugin_library,
        timing_cache,
        compare,
        force,
    )


def _build(
    model: Path,
    output: Path,
    precision: Precision,
    options: BuildOptions,
    mask_states: bool,
    plugin_library: Path | None,
    timing_cache: Path | None,
    compare: Path | None,
    force: bool,
) -> None:
    """What `trt` does, its options read."""
    from engines.backend import open_backend
    from engines.choice import build_chosen, find_library
    from engines.comparison import check_comparable, compare_engines
    from engines.profiles import best_of
    from mat_export.bench import example_inputs
    from mat_export.console import note, tracker
    from mat_export.engine_graph import calibration_of, prepare_model, spec_of
    from mat_export.files import file_digest, require_other, require_writable
    from mat_export.manifest import manifest_path
    from mat_export.parity import load_onnx

    require_other(output, model, manifest_path(model))
    require_other(manifest_path(output), model, manifest_path(model))
    require_other(output, compare)
    _require_engine_name(output)
    require_writable(output)
    if timing_cache is not None:
        _require_cache(timing_cache, output)
    found = open_backend(options.backend, target=options.target)
    found.check_precision(precision.value)
    if timing_cache is not None and not found.has_timing_cache:
        note(f"{found.label} times no kernels: --timing-cache is not used")
    loaded = load_onnx(model)
    spec = spec_of(loaded, f"'{model}'")
    other = None if compare is None else check_comparable(spec, options, compare)
    with tracker("plugins") as progress:
        library, why = find_library(
            found, options, precision.value, spec, plugin_library, progress=progress
        )
    command = ["mat-export", "trt", str(model), f"--{precision.value}", "-o", str(output)]
    command += [part for part in options.to_arguments() if part != "--tf32"]
    command += ["--mask-states"] if mask_states else []
    command += [] if plugin_library is None else ["--plugin-library", str(plugin_library)]

    def prepare(plugins: bool) -> tuple[bytes, dict[str, Any]]:
        graph = prepare_model(
            loaded,
            precision.value,
            opset=found.opset,
            weakly_typed=found.weakly_typed,
            mask_states=mask_states,
            plugins=plugins,
            label=f"'{model}'",
        )
        return graph.model.SerializeToString(), {
            "checkpoint": graph.spec.checkpoint,
            "onnx": {"path": str(model), "sha256": file_digest(model)},
            "passes": graph.passes,
            "calibration": calibration_of(loaded),
            "command": command,
        }

    note(f"preparing the graph for {found.label}: {precision.value}, opset {found.opset}")
    with tracker("build") as progress:
        report = build_chosen(
            prepare,
            output,
            options,
            library,
            why,
            _contest(model),
            progress=progress,
            note=note,
            force=force,
            timing_cache=timing_cache,
        )
    if report.cached:
        note(f"{output} is what this request builds: nothing to do (--force builds it again)")
    else:
        layers = f", {report.layers['layers']} layers" if report.layers else ""
        note(
            f"wrote {output} and {manifest_path(output)}: {report.backend}, {precision.value}"
            f"{', with plugins' if report.plugins else ''}{layers}, {report.bytes / 1e6:.1f} MB, "
            f"{report.seconds:.1f} s"
        )
    if report.missed is not None:
        note(
            f"{report.missed}: {output} is there, but neither it nor the one with plugins passes "
            f"against '{model}'; try another precision"
        )
        raise typer.Exit(1)
    if other is not None:
        note(str(compare_engines(output, other, example_inputs(spec, *best_of(spec, options)))))
    elif precision is Precision.int8 and not options.target:
        note(
            "whether INT8 is the faster one is for the GPU to say: build --fp16 of the FP32 file "
            "too, and name that engine with --compare"
        )
    note(f"prove it: mat-export parity {output}")


def _contest(model: Path) -> Contest:
    """How `trt` compares an engine with plugins and one without."""
    import importlib.util
    import json

    from engines.choice import Contest, Verdict
    from mat_export.bench import example_inputs
    from mat_export.quick_parity import check_quickly, in_words

    def judge(plan: Path, batch: int, size: tuple[int, int], progress: Any) -> Verdict:
        answers = plan.with_name("answers.npz")
        report = check_quickly(plan, model, answers, batch=batch, size=size, progress=progress)
        return Verdict(report.passed, in_words(report), json.loads(report.to_json()))

    found = importlib.util.find_spec("onnxruntime")
    problem = "" if found else "there is no onnxruntime, which their parity is checked against"
    return Contest(judge, example_inputs, problem)


@app.command()
def refit(
    plan: Annotated[Path, typer.Argument(help="An engine built with --refittable.")],
    checkpoint: Annotated[
        Path, typer.Option(help="The new weights: a checkpoint, or an ONNX file of them.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="[default: over the engine]")
    ] = None,
    key: KeyOption = "G_ema",
    prove: Annotated[
        bool, typer.Option("--parity/--no-parity", help="Hold the result against the weights.")
    ] = True,
) -> None:
    """Swap the weights of an engine in seconds, without building it again."""
    import shlex
    from tempfile import TemporaryDirectory

    from engines.papers import open_plan, read_engine_manifest, save_engine
    from engines.refit import refit_plan
    from mat_export.console import note
    from mat_export.contract import UserError, require_exportable
    from mat_export.engine_graph import calibration_of, prepare_model
    from mat_export.files import file_digest, require_other, require_writable
    from mat_export.parity import load_onnx

    target = output or plan
    require_other(target, checkpoint)
    _require_engine_name(target)
    require_writable(target)
    opened = open_plan(plan)
    passes = opened.manifest["sources"].get("passes", {})
    opset, weakly_typed = opened.backend.opset, opened.backend.weakly_typed
    states = "mask_states" in passes
    plugins = "plugins" in passes
    precision = opened.spec.precision
    build = [str(part) for part in opened.manifest["command"]]
    if "-o" in build:
        build[build.index("-o") + 1] = str(target)
    sources: dict[str, Any] = {}
    if checkpoint.suffix.lower() == ".onnx":
        loaded = load_onnx(checkpoint)
        graph = prepare_model(
            loaded,
            precision,
            opset=opset,
            weakly_typed=weakly_typed,
            mask_states=states,
            plugins=plugins,
            label=f"'{checkpoint}'",
        )
        sources["onnx"] = {"path": str(checkpoint), "sha256": file_digest(checkpoint)}
        sources["calibration"] = calibration_of(loaded)
        command = [*build[:2], str(checkpoint), *build[3:]]
    else:
        weights = _weights(checkpoint, None, None, key)
        from mat_export.export import build_model  # needs torch

        require_exportable(weights.config)
        if weights.config != opened.spec.config:
            raise UserError(
                f"'{checkpoint}' is of {weights.config.name} and the engine of "
                f"{opened.spec.config.name}: weights of the same network are needed"
            )
        spec = opened.spec.with_changes(
            precision="fp32", checkpoint=weights.digest, source=weights.source
        )
        note("exporting the new weights")
        model, _ = build_model(weights, spec, progress=note)
        graph = prepare_model(
            model,
            precision,
            opset=opset,
            weakly_typed=weakly_typed,
            mask_states=states,
            plugins=plugins,
        )
        exported = target.with_suffix(".onnx")
        export = ["mat-export", "onnx", "--checkpoint", str(checkpoint), "--key", key]
        export += [*spec.to_arguments(), "-o", str(exported)]
        rebuild = [*build[:2], str(exported), *build[3:]]
        command = ["sh", "-c", f"{shlex.join(export)} && {shlex.join(rebuild)}"]
    if not prove:
        report = refit_plan(opened, graph.model, target, command=command, sources=sources)
    else:
        # The engine that is there stays until the new one is proved.
        with TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            fresh = Path(folder) / target.name
            report = refit_plan(opened, graph.model, fresh, command=command, sources=sources)
            quantized = sources.get("calibration") is not None
            result = _judge(fresh, None if quantized else checkpoint, near=target)
            _record_parity(fresh, result)
            if not result.passed:
                note(f"'{target}' is as it was: what the new weights gave is not kept")
                raise typer.Exit(1)
            save_engine(fresh.read_bytes(), target, read_engine_manifest(fresh))
    note(f"wrote {target}: {report.weights} weights swapped in {report.seconds:.1f} s")


@app.command()
def lower(
    model: BuildableArgument = DEFAULT_ONNX,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="[default: the model's name and the precision]"),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of what is computed.")] = Precision.fp16,
    opset: Annotated[
        int, typer.Option(min=17, max=22, help="At most; TensorRT 8.6 parses 17.")
    ] = 20,
    mask_states: Annotated[
        bool, typer.Option("--mask-states", help="Give the masks of stage one too.")
    ] = False,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="Leave calls that 'plugins build' makes a library for")
    ] = False,
) -> None:
    """Write the graph that 'trt' builds engines of, for trtexec, Polygraphy and others."""
    from engines.backend import is_for_weak_types
    from mat_export.console import note
    from mat_export.engine_graph import prepare_model
    from mat_export.files import file_digest, require_other, require_writable
    from mat_export.manifest import manifest_path, save_model
    from mat_export.parity import load_onnx

    model = _exported(model)
    target = output or model.with_name(f"{model.stem}-{precision.value}.onnx")
    require_other(target, model, manifest_path(model))
    require_other(manifest_path(target), model, manifest_path(model))
    require_writable(target)
    graph = prepare_model(
        load_onnx(model),
        precision.value,
        opset=opset,
        weakly_typed=is_for_weak_types(opset),
        mask_states=mask_states,
        plugins=plugins,
        label=f"'{model}'",
    )
    facts = {
        "graph": graph.spec,
        "passes": graph.passes,
        "onnx": {"path": str(model), "sha256": file_digest(model)},
    }
    _, size = save_model(graph.model, target, facts)
    note(
        f"wrote {target} and {manifest_path(target)}: {len(graph.model.graph.node)} nodes, "
        f"{precision.value}, opset {graph.passes['opset']}, {size / 1e6:.1f} MB"
    )


@app.command()
def debug(
    model: Annotated[
        Path, typer.Argument(help="An FP32 file of 'mat-export onnx'.")
    ] = DEFAULT_ONNX,
    precision: Annotated[Precision, typer.Option(help="Of the run on trial.")] = Precision.fp16,
    backend: Annotated[TrialName, typer.Option(help="What runs it.")] = TrialName.onnxruntime,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error. [default: by precision]")
    ] = None,
    json_file: JsonOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Name the first layer where a backend parts from FP32 on ONNX Runtime; exit 1 if one does."""
    from mat_export.bench import example_inputs
    from mat_export.console import note, show_table, tracker
    from mat_export.contract import UserError
    from mat_export.debugging import HEADINGS, find_divergence, run_onnxruntime
    from mat_export.engine_graph import prepare_model
    from mat_export.files import atomic_write, require_other, require_writable
    from mat_export.parity import load_onnx

    model = _exported(model)
    if precision is Precision.int8:
        raise UserError(
            "debug holds a graph against its own FP32 form, and an INT8 file has none: "
            "'mat-export calibrate' prints what each layer costs"
        )
    if json_file is not None:
        require_other(json_file, model)
        require_writable(json_file)
    opset, weakly_typed = 22, False
    if backend is not TrialName.onnxruntime:
        from engines.backend import open_backend

        chosen = open_backend(backend.value)
        chosen.check_precision(precision.value)
        opset, weakly_typed = chosen.opset, chosen.weakly_typed
    loaded = load_onnx(model)
    graph = prepare_model(
        loaded, precision.value, opset=opset, weakly_typed=weakly_typed, label=f"'{model}'"
    )
    reference = prepare_model(loaded, "fp32", opset=opset, label=f"'{model}'")

    def on_cpu(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return run_onnxruntime(model, inputs, threads=threads)

    def on_trial(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        from engines.trial import run_tensorrt

        return run_tensorrt(model, inputs, backend.value, tf32=precision is Precision.tf32)

    bars = {"fp32": 1e-3, "tf32": 2e-2, "fp16": 5e-2, "bf16": 3e-1}
    with tracker("debug") as progress:
        found = find_divergence(
            graph.model,
            on_cpu if backend is TrialName.onnxruntime else on_trial,
            on_cpu,
            example_inputs(graph.spec, 1),
            tolerance=bars[precision.value] if tolerance is None else tolerance,
            reference=reference.model,
            at_once=40,  # of a few hundred: enough that runs are few, and memory bounded
            progress=progress,
        )
    show_table("", HEADINGS, found.rows())
    note(str(found))
    if json_file is not None:
        atomic_write(json_file, found.to_json())
    if found.first is not None:
        raise typer.Exit(1)


@app.command()
def parity(
    candidate: Annotated[
        Path, typer.Argument(help="The model to judge: an engine, ONNX or a checkpoint.")
    ] = DEFAULT_ONNX,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, ONNX or recording (.npz). [default: what the candidate was made of]"
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Record the reference's answers (.npz), to judge by where it cannot run"),
    ] = None,
    json_file: JsonOption = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page with pictures and plot.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Hold a model against its reference over hard masks on photographs; exit 1 if it differs."""
    from mat_export.console import note
    from mat_export.files import atomic_write, require_folder, require_other, require_writable
    from mat_export.manifest import manifest_path
    from mat_export.report import write_report

    candidate = _exported(candidate)
    if json_file is not None:
        require_other(json_file, candidate, reference, manifest_path(candidate))
        require_writable(json_file)
    if record is not None:
        require_other(record, candidate, reference, manifest_path(candidate))
        require_writable(record)
    if report is not None:
        require_folder(report)
    result = _judge(candidate, reference, record, threads, keep_pictures=report is not None)
    if json_file is not None:
        atomic_write(json_file, result.to_json())
    if report is not None:
        note(f"the page is {write_report(result, report)}")
    _record_parity(candidate, result)
    if not result.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    models: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Engines, ONNX files and checkpoints (PyTorch). [default: the shipped model]"
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Images at once, where it is dynamic.")] = 1,
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time models side by side, each in its own process, taking turns."""
    from mat_export.bench import bench as measure
    from mat_export.console import show_table, tracker
    from mat_export.files import atomic_write, require_other, require_writable
    from mat_export.shipped import shipped_model

    chosen = models or [shipped_model()]
    if json_file is not None:
        require_other(json_file, *chosen)
        require_writable(json_file)
    with tracker("bench") as progress:
        result = measure(
            chosen, runs=runs, warmup=warmup, batch=batch, threads=threads, progress=progress
        )
    first = result.models[0].p50
    show_table(
        f"{runs} runs each, in turns, {result.threads} threads, {result.machine['cpu']}",
        ["model", "runner", "batch", "p50 ms", "p90 ms", "p99 ms", "host MiB", "of the first"],
        [
            [
                m.model,
                m.runner,
                str(m.batch),
                *(f"{value:.1f}" for value in (m.p50, m.p90, m.p99)),
                f"{m.peak_mib:.0f}",
                f"{m.p50 / first:.2f}",
            ]
            for m in result.models
        ],
    )
    if json_file is not None:
        atomic_write(json_file, result.to_json())


@app.command()
def inpaint(
    image: Annotated[Path, typer.Argument(help="A picture, or a folder of them.")],
    mask: Annotated[Path, typer.Argument(help="White is kept, black is filled; file or folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File or folder to write.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Engine, ONNX or checkpoint. [default: the shipped model]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Names the answer; 0 to 2**64 - 1.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Answers for each picture.")] = 1,
    truncation: Annotated[
        float, typer.Option(help="0 to 2: 0 the mean style, 1 the model's own range.")
    ] = 1.0,
    hole: Annotated[Hole, typer.Option(help="Colour of the hole in the mask.")] = Hole.black,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet here.")] = None,
    threads: ThreadsOption = None,
) -> None:
    """Fill the holes of photographs of any size; kept pixels come back bit-exact."""
    from mat_export.console import note, tracker
    from mat_export.contract import UserError
    from mat_export.files import require_other
    from mat_export.images import check_output
    from mat_export.inpaint import Inpainter
    from mat_export.jobs import Outcome, inpaint_paths
    from mat_export.sheet import ContactSheet

    if not 0.0 <= truncation <= 2.0:
        raise UserError(f"truncation is from 0 to 2, got {truncation}")
    for path in (image, mask):
        if not path.exists():
            raise UserError(f"there is no file or folder '{path}'")
    if sheet is not None:
        if sheet == output:
            raise UserError(f"'{sheet}' is the output and the contact sheet: name two files")
        require_other(sheet, image, mask, model)
        check_output(sheet, "RGB")
    contact = ContactSheet() if sheet is not None else None
    with _runner(model, threads) as runner, tracker("inpaint") as advance:

        def progress(done: int, total: int, outcome: Outcome) -> None:
            for text in outcome.notes:
                note(f"{outcome.source.name}: {text}")
            advance(outcome.source.name, done, total)

        outcomes = inpaint_paths(
            Inpainter(runner),
            image,
            mask,
            output,
            seed=seed,
            count=count,
            truncation=truncation,
            hole=hole.value,
            sheet=contact,
            progress=progress,
        )
    failed = [outcome for outcome in outcomes if outcome.error]
    written = [path for outcome in outcomes for path in outcome.outputs]
    note(f"wrote {len(written)} of {len(outcomes) * count} pictures to {output}")
    if contact is not None and sheet is not None and written:
        contact.save(sheet)
        note(f"the contact sheet is {sheet}")
    for outcome in failed:
        note(f"failed: {outcome.source.name}: {outcome.error}")
    if failed:
        raise typer.Exit(2)


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="Pictures: a folder, a .tar, or a folder of them.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the run is kept.")],
    preset: Annotated[
        str, typer.Option(help="published, or small (the default model's).")
    ] = "small",
    network: Annotated[
        str | None, typer.Option(help="Another network for it: mat-512, mat-256, mat-tiny-256.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a value of the preset."),
    ] = None,
    images: Annotated[
        int | None, typer.Option(min=1, help="Length of the run. [default: the preset's]")
    ] = None,
    masks: Annotated[TrainingMasks, typer.Option(help="Kind of the masks.")] = TrainingMasks.large,
    share: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Crops' side as a share of the picture's."),
    ] = None,
    jitter: Annotated[float, typer.Option(help="Change of colours, 0 to below 1.")] = 0.0,
    max_side: Annotated[
        int | None, typer.Option(min=1, help="Bring pictures down to this side first.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare samples.")] = 4,
    vgg: Annotated[
        Path | None,
        typer.Option(help="VGG-19 weights, the published loss. [default: EfficientNet-Lite0]"),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Fine-tune: begin with this model's weights, and train its network."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
    export: Annotated[
        Path | None, typer.Option(help="Write the averaged generator here at the end.")
    ] = None,
) -> None:
    """Train a model on pictures; Ctrl-C saves, and --resume goes on exactly.

    Several GPUs of one machine: torchrun --nproc-per-node=2 $(command -v mat-export) train …
    """
    import os
    from dataclasses import replace

    import torch

    from mat_export.console import note
    from mat_export.contract import UserError
    from mat_export.files import require_writable
    from mat_torch.config import ConfigError
    from mat_torch.config import preset as network_preset
    from mat_torch.data import CropOptions, DataError
    from mat_torch.features import FeatureError
    from mat_torch.training_options import FINE_TUNING, TrainingError, training_preset
    from mat_torch.training_run import TrainingData, changed, run_training
    from mat_torch.training_state import (
        InitialWeights,
        export_ema,
        latest_checkpoint,
        read_options,
    )

    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    say = note if first else (lambda line: None)
    if export is not None:
        require_writable(export)
    try:
        options, initial = training_preset(preset), None
        newest = latest_checkpoint(output / "checkpoints") if resume else None
        if newest is not None:
            earlier, origin = read_options(newest)
            options = replace(options, config=earlier.config)
            say(f"goes on from {newest.name}" + (", --init is not read" if init else ""))
        elif init is not None:
            initial = InitialWeights.load(init)
            options = replace(options, config=initial.generator.config)
            beside = "its discriminator" if initial.discriminator else "a new discriminator"
            say(f"begins with {initial.generator.source}, {beside}")
        if initial is not None or (newest is not None and origin is not None):
            options = replace(options, **FINE_TUNING)
        if network is not None:
            options = replace(options, config=network_preset(network))
        if options.compile and not torch.cuda.is_available():
            options = replace(options, compile=False)  # on a CPU it would take minutes to begin
        options = changed(options, settings or ())
        options = options if images is None else replace(options, images=images)
        crops = CropOptions(share=_share(share), jitter=jitter, masks=masks.value)
        pictures = TrainingData(data, crops, max_side=max_side, workers=workers)
        state = run_training(
            options, pictures, output, vgg=vgg, initial=initial, resume=resume, report=say
        )
        if export is not None and first:
            export_ema(state, export)
            note(f"wrote {export}")
    except (TrainingError, DataError, FeatureError, ConfigError) as error:
        raise UserError(str(error)) from error
    if state.counters.images < options.images:
        say(f"stopped after {state.counters.images} images: --resume goes on from there")
        raise typer.Exit(130)


@app.command(name="evaluate")
def evaluate_command(
    data: Annotated[Path, typer.Option(help="Pictures: a folder, a .tar, or a folder of them.")],
    models: Annotated[
        list[Path] | None,
        typer.Option(
            "--model", help="A model file, several times if you like. [default: the shipped one]"
        ),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="OpenCV's two classical methods too.")
    ] = False,
    count: Annotated[
        int | None, typer.Option(min=2, help="Crops in all. [default: one a picture]")
    ] = None,
    masks: Annotated[MaskKind, typer.Option(help="Kind of the masks.")] = MaskKind.large,
    answers: Annotated[
        int, typer.Option(min=1, help="Fillings of each hole; two or more tell diversity.")
    ] = 1,
    features: Annotated[
        Path | None, typer.Option(help="Inception weights, for FID. [default: EfficientNet-Lite0]")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures filled at once.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of crops, masks and answers.")] = 0,
    truncation: Annotated[float, typer.Option(help="psi.")] = 1.0,
    by_bin: Annotated[bool, typer.Option("--by-bin", help="By size of the hole too.")] = False,
    device: Annotated[
        Device, typer.Option(help="Of checkpoints and feature networks; auto: a GPU if there is.")
    ] = Device.auto,
    json_file: JsonOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure models on photographs: feature distance, PSNR, SSIM and more, in one table."""
    import contextlib
    import json

    from mat_export.console import note, tracker
    from mat_export.contract import UserError
    from mat_export.evaluating import EvaluationSet, evaluate_all, names_of, runner_fill
    from mat_export.files import atomic_write, require_other, require_writable
    from mat_export.runners import torch_device
    from mat_export.shipped import PRESET
    from mat_torch.evaluation import EvaluationError, Fill, comparison_table, opencv_fill
    from mat_torch.metrics import MetricError, require_packages

    if json_file is not None:
        require_other(json_file, *(models or ()))
        require_writable(json_file)
    classical: dict[str, Fill] = {}
    try:
        require_packages()
        if baselines:
            classical["Telea"] = opencv_fill("telea")
            classical["Navier-Stokes"] = opencv_fill("navier-stokes")
    except (EvaluationError, MetricError) as error:
        raise UserError(str(error)) from error
    where = torch_device(device.value)
    if where == "cuda":
        from torch.backends import cudnn

        cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # by default it is TF32
    chosen: list[tuple[Path | None, str]] = [(None, PRESET)]
    if models:
        chosen = [*names_of(models).items()]
    with contextlib.ExitStack() as stack:
        runners = {
            name: stack.enter_context(_runner(path, threads, where)) for path, name in chosen
        }
        sides = {runner.spec.config.resolution for runner in runners.values()}
        if len(sides) > 1:
            raise UserError(f"the models are of different native sizes: {sorted(sides)}")
        pictures = EvaluationSet(data, sides.pop(), count, masks=masks.value, seed=seed)
        methods = {n: runner_fill(r, truncation=truncation) for n, r in runners.items()}
        with tracker("evaluate") as progress:
            results = evaluate_all(
                methods | classical,
                pictures,
                features=features,
                batch=batch,
                seed=seed,
                answers=answers,
                device=where,
                progress=progress,
                note=note,
            )
    typer.echo(comparison_table(results, by_bin=by_bin))
    if json_file is not None:
        atomic_write(json_file, json.dumps([r.to_dict() for r in results], indent=2) + "\n")


def _share(text: str | None) -> tuple[float, float] | None:
    """``LOW:HIGH`` as numbers."""
    if text is None:
        return None
    from mat_export.contract import UserError

    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise UserError(f"--share is LOW:HIGH, such as 0.3:1, got '{text}'") from error
    return low, high


@app.command()
def info(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="A checkpoint, ONNX model, engine, manifest or picture. "
            "[default: the shipped model]"
        ),
    ] = None,
) -> None:
    """Say what a file is."""
    from mat_export.console import show_facts
    from mat_export.inspection import describe
    from mat_export.shipped import shipped_model

    show_facts(describe(file or shipped_model()))


@app.command()
def doctor() -> None:
    """Say what is installed, which backends work, and why others do not."""
    from engines.checks import examine_engines
    from mat_export.console import show_table
    from mat_export.inspection import Check, examine

    words = {True: "works", False: "FAILS", None: "absent"}
    checks = [*examine(), *(Check(*row) for row in examine_engines())]
    show_table("", ["what", "", "details"], [[c.name, words[c.works], c.detail] for c in checks])
    if any(check.works is False for check in checks):
        raise typer.Exit(1)


plugins_app = typer.Typer(help="The operators as plugins of TensorRT.", no_args_is_help=True)
app.add_typer(plugins_app, name="plugins")


@plugins_app.command("build")
def plugins_build(
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="TensorRT's headers; looked for if left out."),
    ] = None,
    arch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="sm_NN|all", help="A GPU to compile for, all if left out; repeatable."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The library to write.")] = Path(
        "libmat_plugins.so"
    ),
) -> None:
    """Compile the plugin library for TensorRT 8.6 or from 10 on, as its headers are."""
    from engines.plugins.library import build_library, describe_library
    from mat_export.console import note, show_facts, tracker
    from mat_export.files import file_digest

    wanted = None if arch is None or "all" in arch else arch
    with tracker("plugins") as progress:
        build_library(
            output, tensorrt_include=tensorrt_include, architectures=wanted, progress=progress
        )
    made = describe_library(output)
    show_facts(
        {
            "library": str(output),
            "TensorRT": f"{made.tensorrt_major}, headers of {made.tensorrt}",
            "plugins": f"IPlugin{made.interface}",
            "GPUs": ", ".join(made.architectures),
            "compiler": f"nvcc {made.compiler}",
            "digest": file_digest(output),
            "sources": made.sources,
        }
    )
    note(
        f"build an engine with it: mat-export trt MODEL.onnx --plugins on --plugin-library {output}"
    )
    note(f"or load it yourself: trtexec --dynamicPlugins={output.absolute()} …")


# -- shared by commands -------------------------------------------------------------------------


def _weights(
    checkpoint: Path | None, preset: str | None, random_weights: int | None, key: str
) -> Checkpoint:
    """The weights that the options name; by default those of the shipped model."""
    from mat_export.console import note
    from mat_export.contract import UserError
    from mat_export.runners import read_checkpoint
    from mat_export.shipped import PRESET, shipped_model
    from mat_torch import preset as preset_of
    from mat_torch import random_checkpoint

    if checkpoint is not None:
        if preset is not None or random_weights is not None:
            raise UserError("give a checkpoint, or --preset with --random-weights, not both")
        return read_checkpoint(checkpoint, key)
    if preset is not None and random_weights is None:
        preset_of(preset)  # an unknown name is the first thing to hear of
        raise UserError("a preset has no weights of its own: add --random-weights SEED")
    if random_weights is None:
        return read_checkpoint(shipped_model())
    config = preset_of(preset or PRESET)
    note(f"weights of {config.name} are untrained (seed {random_weights}): pictures will be noise")
    try:
        return random_checkpoint(config, random_weights)
    except ValueError as error:
        raise UserError(str(error)) from error


def _runner(model: Path | None, threads: int | None, device: str = "cpu") -> Runner:
    """The runner of a model file; by default the shipped model in PyTorch."""
    from mat_export.runners import TorchRunner, open_runner

    if model is not None:
        return open_runner(model, threads=threads, device=device)
    return TorchRunner(_weights(None, None, None, "G_ema"), threads=threads, device=device)


def _exported(model: Path) -> Path:
    """The model; where it is the default one and not there, a sentence says how to get it."""
    from mat_export.contract import UserError

    if model == DEFAULT_ONNX and not model.exists():
        raise UserError(
            f"there is no '{model}' here: write it with 'mat-export onnx', or name a model"
        )
    return model


def _require_engine_name(output: Path) -> None:
    """Raise UserError unless other commands know a file of this name for an engine."""
    from mat_export.contract import UserError

    if output.suffix.lower() not in ENGINE_SUFFIXES:
        raise UserError(
            f"the name of an engine ends in {' or '.join(ENGINE_SUFFIXES)}, by which other "
            f"commands know it, got '{output}'"
        )


def _require_cache(path: Path, output: Path) -> None:
    """Raise UserError unless kernel timings may be saved to a file."""
    from engines.worker import CacheFile
    from mat_export.contract import UserError
    from mat_export.manifest import manifest_path

    if path.absolute() in (output.absolute(), manifest_path(output).absolute()):
        raise UserError(f"'{path}' is to be the engine's: name another file with --timing-cache")
    CacheFile(path).require_cache()


def _batch(text: str) -> int | None:
    """``dynamic`` or a number of images."""
    from mat_export.contract import UserError

    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch is 'dynamic' or a number from 1 up, got '{text}'")
    return int(text)


def _judge(
    candidate: Path,
    reference: Path | None,
    record: Path | None = None,
    threads: int | None = None,
    *,
    near: Path | None = None,
    keep_pictures: bool = False,
) -> ParityReport:
    """Check parity and show the result."""
    from mat_export.console import tracker
    from mat_export.parity import check_parity, open_candidate, open_reference

    with open_candidate(candidate, threads=threads) as judged:
        found = open_reference(
            judged.spec, reference, near=near or candidate, record=record, threads=threads
        )
        with found as held, tracker("parity") as progress:
            result = check_parity(judged, held, progress=progress, keep_pictures=keep_pictures)
    _show_parity(result)
    return result


def _show_parity(result: ParityReport) -> None:
    """The table of a parity check, and its verdict."""
    import math

    from mat_export.console import note, show_table
    from mat_export.parity import RegionError

    def figures(error: RegionError) -> list[str]:
        if error.relative is None or error.psnr is None:
            return ["–", "–"]
        psnr = "∞" if math.isinf(error.psnr) else f"{error.psnr:.1f}"
        return [f"{error.relative:.1e}", psnr]

    show_table(
        f"{result.candidate} against {result.reference}",
        ["case", "hole rel.", "hole dB", "ring rel.", "ring dB", "kept", "masks", "verdict"],
        [
            [
                case.name,
                *figures(case.hole),
                *figures(case.ring),
                "equal" if case.kept_exact else "differ",
                case.masks_in_words,
                "passed" if case.passed else "; ".join(case.failures),
            ]
            for case in result.cases
        ],
    )
    bar = f"bar: {result.bar}" + ("" if result.unchecked else ", and equal masks")
    note(f"parity {'passed' if result.passed else 'FAILED'} ({bar})")
    for what in result.unchecked:
        note(f"not checked: {what}")


def _record_parity(path: Path, result: ParityReport) -> None:
    """Write the verdict into an engine's manifest."""
    import json

    from mat_export.openers import opener_of

    if opener_of(path) is None:
        return
    from engines.papers import record_parity

    record_parity(path, json.loads(result.to_json()))


def main() -> None:
    """Run the command line; a user's mistake, or a model that fails, is one sentence and code 2."""
    from mat_export.contract import RunError, UserError
    from mat_torch.config import ConfigError

    try:
        app()
    except (UserError, ConfigError, RunError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "onnxscript", "onnx_ir"):
            raise
        _fail(f"this needs {error.name}, which is not installed: install mat-export[export]")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
