"""What travels with an engine, and every way in which it may not fit here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import GPU, fake_device_info, make_tensorrt

from engines.options import BuildOptions
from engines.papers import (
    FORMAT,
    open_plan,
    read_engine_manifest,
    rebuild_command,
    record_parity,
    save_engine,
)
from engines.plugins.library import LibraryDescription
from engines.profiles import profiles_of
from mat_export.contract import GraphSpec, UserError
from mat_export.files import file_digest
from mat_export.manifest import differences
from mat_torch import preset

SPEC = GraphSpec(preset("mat-tiny-256"), batch=None)
COMMAND = ["mat-export", "trt", "my mat.onnx", "-o", "mat.plan"]
AGAIN = "mat-export trt 'my mat.onnx' -o mat.plan"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU and TensorRT 10.13.3."""
    monkeypatch.setattr("engines.cuda.device_info", fake_device_info)
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("10.13.3"))


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a plan built with options; further entries replace those of the request."""

    def write(options: BuildOptions | None = None, plugin: Any = None, **request: Any) -> Path:
        chosen = options or BuildOptions(batch=(1, 2, 4))
        gpu = {"name": "Fake GPU", "capability": [8, 6], "driver": "12"}
        facts = {
            "key": "k",
            "request": {
                "backend": "tensorrt",
                "version": "10.13.3",
                "options": chosen.to_dict(),
                "profiles": profiles_of(SPEC, chosen),
                "gpu": gpu,
                **request,
            },
            "graph": json.loads(SPEC.to_json()),
            "sources": {"checkpoint": "c", "plugin": plugin},
            "command": COMMAND,
        }
        path = tmp_path / "mat.plan"
        save_engine(b"the plan", path, facts)
        return path

    return write


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a plan."""
    own = Path(f"{path}.json")
    manifest = json.loads(own.read_text())
    change(manifest)
    own.write_text(json.dumps(manifest))


def refusal(path: Path) -> str:
    """Why a plan does not open, in one line."""
    with pytest.raises(UserError) as caught:
        open_plan(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- a plan that fits ------------------------------------------------------------------------------


def test_a_plan_opens_where_it_was_built(save: Save) -> None:
    path = save()
    opened = open_plan(path)
    assert opened.path == path
    assert opened.plan == b"the plan"
    assert opened.spec == SPEC
    assert opened.backend.label == "TensorRT 10.13.3"
    assert opened.notes == ()
    assert not opened.backend.allow_host_code
    assert opened.manifest["sha256"] == file_digest(path)
    assert opened.manifest["parity"] is None
    assert rebuild_command(opened.manifest) == AGAIN


def test_another_gpu_of_the_same_capability_is_noted(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save()
    monkeypatch.setitem(GPU, "name", "Other GPU")
    (text,) = open_plan(path).notes
    assert text == "built on Fake GPU and perhaps slower here"


def test_a_version_compatible_plan_opens_with_later_versions(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(BuildOptions(version_compatible=True))
    for version in ("10.13.3", "10.14.0", "11.2.0"):
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version))
        assert open_plan(path).backend.allow_host_code
    for version in ("8.6.0", "10.13.2", "12.0.0"):
        monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt(version))
        assert f"and {version} is installed" in refusal(path)


def test_a_hardware_compatible_plan_opens_from_ampere_on(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(BuildOptions(hardware_compatible=True))
    monkeypatch.setitem(GPU, "capability", (12, 0))
    assert open_plan(path).plan
    monkeypatch.setitem(GPU, "capability", (7, 5))
    assert "Ampere" in refusal(path)


def test_a_plan_for_a_target_opens_on_it_alone(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    path = save(
        BuildOptions(target="sm_89"), backend="tensorrt-rtx", version=rtx.__version__, gpu=None
    )
    assert "built for compute capability 8.9" in refusal(path)
    monkeypatch.setitem(GPU, "capability", (8, 9))
    assert open_plan(path).backend.name == "tensorrt-rtx"
    monkeypatch.setitem(GPU, "capability", (9, 0))
    assert "does not run on Fake GPU" in refusal(path)


# -- one that does not -----------------------------------------------------------------------------


def test_another_tensorrt_is_named_with_the_command(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save()
    monkeypatch.setitem(sys.modules, "tensorrt", make_tensorrt("10.14.0"))
    text = refusal(path)
    assert "TensorRT 10.13.3, and 10.14.0 is installed" in text
    assert text.endswith(AGAIN)


def test_no_tensorrt_says_what_to_install(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save()
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "mat-export[trt]" in refusal(path)


def test_another_gpu_is_named_with_the_command(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save()
    monkeypatch.setitem(GPU, "capability", (8, 9))
    text = refusal(path)
    assert "built for compute capability 8.6 (Fake GPU), and Fake GPU has 8.9" in text
    assert text.endswith(AGAIN)


def test_no_gpu_is_a_sentence(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise UserError("no NVIDIA GPU can be used here")

    path = save()
    monkeypatch.setattr("engines.cuda.device_info", none)
    assert "no NVIDIA GPU" in refusal(path)
    assert read_engine_manifest(path)["bytes"] == 8  # which is no hindrance to reading


def test_a_plugin_has_to_be_there_as_it_was(save: Save, tmp_path: Path) -> None:
    library = tmp_path / "libmat.so"
    library.write_bytes(b"code")
    path = save(plugin={"path": str(library), "sha256": file_digest(library)})
    backend = open_plan(path).backend
    open_plan(path)  # a second engine of the same library
    loaded = backend.module.get_plugin_registry().loaded
    assert loaded == [str(library)]
    library.write_bytes(b"other code")
    assert "another plugin" in refusal(path)
    library.unlink()
    text = refusal(path)
    assert "which is not there: bring it, or build it again" in text
    assert text.endswith(AGAIN)


def test_a_plugin_may_have_moved_with_its_engine_or_into_the_cache(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "built").mkdir()
    built = tmp_path / "built" / "libmat.so"
    built.write_bytes(b"moving code")
    path = save(plugin={"path": str(built), "sha256": file_digest(built)})
    beside = built.rename(tmp_path / "libmat.so")
    loaded = open_plan(path).backend.module.get_plugin_registry().loaded
    assert loaded == [str(beside)]
    kept = tmp_path / "cache" / "mat-export" / "plugins" / "libmat_plugins-trt10.13.3-sm_86-0.so"
    kept.parent.mkdir(parents=True)
    beside.rename(kept)
    monkeypatch.setattr("engines.backend.base._LOADED", set())
    open_plan(path)
    assert loaded == [str(beside), str(kept)]
    built.write_bytes(kept.read_bytes())
    open_plan(path)  # the same library once more, which TensorRT takes but once
    assert loaded == [str(beside), str(kept)]
    kept.unlink()
    built.unlink()
    text = refusal(path)
    assert f"looked for as '{built}' and '{beside}' and in the cache" in text
    assert text.endswith(AGAIN)
    beside.write_bytes(b"other code")
    assert f"another plugin library than '{beside}'" in refusal(path)


def test_a_hardware_compatible_plan_needs_plugins_for_this_gpu(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libmat.so"
    library.write_bytes(b"compatible code")
    plugin = {"path": str(library), "sha256": file_digest(library)}
    path = save(BuildOptions(hardware_compatible=True), plugin=plugin)
    description = LibraryDescription("V3", "10.13.3", 10, ("sm_86",), "13.0", "digest")
    monkeypatch.setattr("engines.papers.describe_library", lambda path: description)
    assert open_plan(path).plan
    monkeypatch.setitem(GPU, "capability", (9, 0))
    assert "which no GPU of compute capability 9.0 runs" in refusal(path)


def test_a_library_that_is_no_plugin_is_refused(save: Save, tmp_path: Path) -> None:
    library = tmp_path / "libother.so"
    library.write_bytes(b"something else")
    path = save(plugin={"path": str(library), "sha256": file_digest(library)})
    assert "is no plugin library" in refusal(path)


def test_a_truncated_plan_says_how_much_there_is(save: Save) -> None:
    path = save()
    path.write_bytes(b"the p")
    text = refusal(path)
    assert "5 bytes of 8" in text
    assert text.endswith(AGAIN)
    path.write_bytes(b"the plot")
    assert "its digest differs" in refusal(path)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "mat.plan")


def test_a_plan_without_its_manifest_is_not_run(save: Save) -> None:
    path = save()
    Path(f"{path}.json").unlink()
    assert "no manifest 'mat.plan.json' beside it" in refusal(path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_an_unreadable_manifest_is_a_sentence(save: Save, text: bytes) -> None:
    path = save()
    Path(f"{path}.json").write_bytes(text)
    assert "is unreadable" in refusal(path)


def test_other_manifests_are_told_apart(save: Save) -> None:
    path = save()
    edit(path, lambda m: m.update(format=FORMAT + 1))
    assert f"has format {FORMAT + 1}" in refusal(path)
    edit(path, lambda m: m.update(kind="onnx"))
    assert "no manifest of an engine" in refusal(path)
    Path(f"{path}.json").write_text("[]")
    assert "no manifest of an engine" in refusal(path)


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"a": 1}, [["x"]], True])
@pytest.mark.parametrize(
    "entry",
    [
        *("sha256", "bytes", "key", "graph", "command", "request", "sources"),
        *("request.backend", "request.version", "request.options", "request.profiles"),
        *("request.gpu", "request.options.batch", "request.options.target", "sources.plugin"),
        *("request.gpu.capability", "request.profiles.z", "graph.config"),
        *("sources.passes", "sources.plugin_choice"),
    ],
)
def test_no_damage_to_a_manifest_is_a_crash(save: Save, entry: str, value: Any) -> None:
    path = save()
    *parents, last = entry.split(".")

    def change(manifest: dict[str, Any]) -> None:
        for name in parents:
            manifest = manifest[name]
        manifest[last] = value

    edit(path, change)
    try:
        opened = open_plan(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        # No target and no plugin are as good as any; another command is another command.
        fine = {"request.options.target", "request.options.batch", "sources.plugin", "key"}
        fine |= {"sources.passes", "sources.plugin_choice"} if value == {"a": 1} else set()
        assert entry in {*fine, "command", "bytes", "sources"}
        assert opened.plan == b"the plan"


# -- writing ---------------------------------------------------------------------------------------


def test_plan_and_manifest_are_written_both_or_neither(save: Save, tmp_path: Path) -> None:
    (tmp_path / "mat.plan.json").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        save()
    assert [p.name for p in tmp_path.iterdir()] == ["mat.plan.json"]


def test_a_parity_verdict_is_recorded_on_the_very_file(save: Save) -> None:
    path = save()
    before = read_engine_manifest(path)
    record_parity(path, {"passed": True, "bar": "45 dB"})
    after = read_engine_manifest(path)
    assert after == {**before, "parity": {"passed": True, "bar": "45 dB"}}
    path.write_bytes(b"another plan")
    with pytest.raises(UserError, match="is not the file"):
        record_parity(path, {"passed": True})


def test_differences_are_told_by_name() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 3}
    new = {"a": 1, "b": {"c": [1, 3], "d": "x" * 50}, "f": 4}
    assert list(differences(old, new)) == [
        "b.c: [1, 2], now [1, 3]",
        f"b.d: none, now {'x' * 12}…",
        "e: 3, now none",
        "f: none, now 4",
    ]
    assert not list(differences(old, old))
