"""The packages import each other in the design's directions, and start without heavy packages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("mat_torch", "mat_export", "calib", "engines", "cli")
CONTRACT_MODULES = {
    "mat_export.contract",
    "mat_export.files",
    "mat_export.manifest",
    "mat_export.pixels",
}


def modules(package: str) -> list[Path]:
    """Source files of a package."""
    single = ROOT / f"{package}.py"
    return [single] if single.is_file() else sorted((ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ALL = [name_of(path) for package in OURS for path in modules(package)]


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def ours(found: set[str]) -> set[str]:
    return {name for name in found if name.split(".")[0] in OURS}


def test_there_are_modules_to_look_at() -> None:
    assert len(ALL) > 20
    assert {name.split(".")[0] for name in ALL} == set(OURS)


@pytest.mark.parametrize("path", modules("mat_torch"), ids=name_of)
def test_mat_torch_imports_nothing_of_the_project(path: Path) -> None:
    assert all(name.split(".")[0] == "mat_torch" for name in ours(imports(path)))


@pytest.mark.parametrize("path", modules("mat_export"), ids=name_of)
def test_mat_export_imports_mat_torch_only(path: Path) -> None:
    packages = {name.split(".")[0] for name in ours(imports(path))}
    assert packages <= {"mat_export", "mat_torch"}


@pytest.mark.parametrize("path", modules("calib"), ids=name_of)
def test_calib_never_meets_engines(path: Path) -> None:
    packages = {name.split(".")[0] for name in ours(imports(path))}
    assert packages <= {"calib", "mat_export", "mat_torch"}


@pytest.mark.parametrize("path", modules("engines"), ids=name_of)
def test_engines_import_the_contract_only(path: Path) -> None:
    for name in ours(imports(path)):
        inside = name.split(".")[0] == "engines"
        assert inside or any(name.startswith(module) for module in CONTRACT_MODULES), name


@pytest.mark.parametrize("package", [p for p in OURS if p != "engines"])
def test_tensorrt_is_imported_in_engines_alone(package: str) -> None:
    for path in modules(package):
        assert not any(name.split(".")[0].startswith("tensorrt") for name in imports(path)), path


# -- the base install -----------------------------------------------------------------------------

_BLOCK = """
import sys
BLOCKED = {"torch", "onnxscript", "onnx_ir", "scipy", "skimage", "sklearn", "cv2", "hypothesis"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=top)
sys.meta_path.insert(0, Blocker())
"""


def bare(code: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which only the base dependencies can be imported."""
    return subprocess.run(
        [sys.executable, "-c", _BLOCK + code],
        capture_output=True,
        text=True,
        cwd=folder or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


NEEDS_TORCH = {
    "engines.plugins.torch_operators",
    "mat_torch.ablations",
    "mat_torch.attention",
    "mat_torch.checkpoint",
    "mat_torch.discriminator",
    "mat_torch.distributed",
    "mat_torch.features",
    "mat_torch.generator",
    "mat_torch.layers",
    "mat_torch.losses",
    "mat_torch.perceptual",
    "mat_torch.pickle_reader",
    "mat_torch.training",
    "mat_torch.training_draws",
    "mat_torch.training_graphs",
    "mat_torch.training_log",
    "mat_torch.training_state",
    "mat_torch.training_step",
    "mat_export.export",
    "mat_export.inference",
    "mat_export.ops",
}
"""Modules that make or run PyTorch models; the base install has no use for them."""


def test_every_module_imports() -> None:
    code = "import importlib\n" + "".join(f"importlib.import_module({n!r})\n" for n in ALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_modules_that_run_models_import_with_the_base_dependencies_alone() -> None:
    assert set(ALL) >= NEEDS_TORCH
    names = [name for name in ALL if name not in NEEDS_TORCH]
    done = bare("import importlib\n" + "".join(f"importlib.import_module({n!r})\n" for n in names))
    assert done.returncode == 0, done.stderr


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    done = bare("import cli\nprint(sorted(m for m in sys.modules if '.' not in m))")
    assert done.returncode == 0, done.stderr
    for heavy in ("numpy", "onnx", "onnxruntime", "torch", "PIL", "sklearn", "cv2"):
        assert f"'{heavy}'" not in done.stdout


COMMANDS = (
    *("convert", "onnx", "calibrate", "trt", "refit", "parity", "debug"),
    *("bench", "inpaint", "train", "evaluate", "info", "doctor", "plugins"),
)


@pytest.mark.parametrize("command", ["", *COMMANDS, "plugins build"])
def test_help_runs_with_the_base_dependencies_alone(command: str) -> None:
    arguments = ["mat-export", *command.split(), "--help"]
    done = bare(f"import cli\nsys.argv = {arguments!r}\ncli.main()")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    if not command:
        assert all(name in done.stdout for name in COMMANDS)


def test_an_exported_model_inpaints_without_torch(tiny_onnx: Path, tmp_path: Path) -> None:
    code = f"""
import numpy as np
from PIL import Image
from mat_export.inpaint import Inpainter
from mat_export.runners import OrtRunner
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (90, 70, 3), dtype=np.uint8)
mask = np.full((90, 70), 255, np.uint8)
mask[30:60, 20:50] = 0
with OrtRunner({str(tiny_onnx)!r}) as runner:
    filled = Inpainter(runner)(image, mask)
assert filled.shape == image.shape and (filled[mask > 0] == image[mask > 0]).all()
assert (filled != image).any()
assert "torch" not in sys.modules
"""
    done = bare(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_command_that_needs_torch_says_what_to_install(tmp_path: Path) -> None:
    code = "import cli\nsys.argv = ['mat-export', 'onnx', '-o', 'x.onnx']\ncli.main()"
    done = bare(code, tmp_path)
    assert done.returncode == 2
    assert "mat-export[export]" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
