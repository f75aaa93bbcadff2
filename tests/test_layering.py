"""Who may import whom: the import statements of every file against one table."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fastsae

PACKAGE = Path(fastsae.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

# part -> the parts it may import, anywhere in its files. What is not listed may not.
MAY_IMPORT = {
    "errors": set(),
    "kernels": set(),
    "ops": {"errors"},
    "models": {"errors"},
    "hookpoints": {"errors", "models", "places"},
    "places": {"errors", "models"},
    "sae": {"errors", "ops"},
    "formats": {"errors", "ops", "sae"},
    "steering": {"errors", "models", "ops", "places", "sae"},
    "training": {"errors", "models", "ops", "sae"},
    "data": {"errors", "models", "training"},
    "train": {"data", "errors", "models", "ops", "sae", "training"},
    "explain": {"data", "errors", "models", "ops", "sae"},
    "environment": {"errors", "ops"},
    "compat": {"errors", "formats", "models", "ops", "sae"},
    "__init__": {"errors", "explain", "ops", "sae", "steering", "train"},
}
ANYTHING = {"cli", "demo", "serve"}  # the outermost parts; nothing but themselves imports cli
# Stricter than their part: what is decided apart from any model.
WITHOUT_MODELS = {"steering/policy.py", "steering/table.py"}
# Inside functions only: a cycle by nature, each with its reason.
LAZILY = {
    ("sae", "formats"): "from_pretrained and save_pretrained read and write the families",
    ("formats", "hookpoints"): "the notations of a hook point, when one is written or shown",
    ("steering", "serve"): "audit lines, the same in every server",
    ("ops", "_C"): "build information, when the extension is built",
}
DEPENDENCIES = {"torch", "numpy", "safetensors"}
# Optional packages, inside functions of these files only ("" = the whole part).
OPTIONAL = {
    "transformers": {"models.py", "demo/", "compat/", "serve/"},
    "vllm": {"steering/vllm/"},
    "fastapi": {"steering/vllm/admin.py"},
    "prometheus_client": {"steering/vllm/metrics.py"},
    "triton": {"environment.py"},
}


# The server is nothing without these, and only its command imports it, when it runs.
SERVER = {"fastapi", "pydantic", "prometheus_client"}


class Import(NamedTuple):
    file: str  # relative to the package, kernels/... for the Triton files
    module: str
    lazy: bool
    line: int

    @property
    def part(self) -> str:
        return self.file.split("/")[0].removesuffix(".py")

    def __str__(self):
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path, name: str) -> list[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    typing_only = {
        id(n)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for n in ast.walk(branch)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: relative import"
            modules = [node.module]
            if node.module == "fastsae":
                modules = [f"fastsae.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(name, module, id(node) in inside, node.lineno) for module in modules]
    return found


def every_import() -> list[Import]:
    files = {path: str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    files |= {path: f"kernels/{path.name}" for path in KERNELS.glob("*.py")}
    return [found for path, name in sorted(files.items()) for found in imports_of(path, name)]


IMPORTS = every_import()


def internal(found: Import) -> str | None:
    """The part of fastsae that is imported; names of the package's own API count as __init__."""
    if found.module.split(".")[0] != "fastsae":
        return None
    name = (found.module.split(".") + ["__init__"])[1]
    known = {*MAY_IMPORT, *ANYTHING, "_C"}
    return name if name in known else "__init__"


def test_there_is_something_to_check():
    assert {found.part for found in IMPORTS} >= {"ops", "sae", "formats", "models", "kernels"}


def test_every_part_is_in_the_table():
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if not p.name.startswith("__p")}
    python = {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").exists()}
    data_only = {p for p in python if (PACKAGE / p).is_dir() and not [*(PACKAGE / p).rglob("*.py")]}
    assert python - data_only - {*MAY_IMPORT, *ANYTHING} == set()


def test_parts_import_only_what_the_table_allows():
    wrong = []
    for found in IMPORTS:
        target = internal(found)
        if target is None or target == found.part or found.part in ANYTHING:
            continue
        allowed = MAY_IMPORT.get(found.part, set())
        if found.file in WITHOUT_MODELS:
            allowed = allowed - {"models"}
        if found.lazy and (found.part, target) in LAZILY:
            continue
        if target not in allowed:
            wrong.append(str(found))
    assert not wrong, wrong


def test_the_table_has_no_cycle():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        ready = [part for part, needs in waiting.items() if needs <= set(order)]
        assert ready, f"a cycle among {sorted(waiting)}"
        order += ready
        for part in ready:
            del waiting[part]


def test_nothing_imports_the_command_line():
    assert [str(f) for f in IMPORTS if internal(f) == "cli" and f.part != "cli"] == []


def test_kernels_import_torch_and_triton_only():
    outside = {
        found.module
        for found in IMPORTS
        if found.part == "kernels"
        and found.module.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and not found.module.startswith("fastsae.kernels")
    }
    assert outside == set()


def test_kernels_are_reached_through_the_backend_only():
    assert [str(f) for f in IMPORTS if internal(f) == "kernels" and f.part != "kernels"] == []
    by_name = [
        p for p in PACKAGE.rglob("*.py") if 'import_module(f"fastsae.kernels' in p.read_text()
    ]
    assert [str(p.relative_to(PACKAGE)) for p in by_name] == ["ops/backend.py"]


def test_optional_packages_are_imported_inside_functions():
    wrong = []
    for found in IMPORTS:
        top = found.module.split(".")[0]
        if found.part == "kernels" or top in {"fastsae", *DEPENDENCIES, *sys.stdlib_module_names}:
            continue
        if found.part == "serve" and top in SERVER:
            continue
        places = OPTIONAL.get(top)
        if not found.lazy or (places and not found.file.startswith(tuple(places))):
            wrong.append(str(found))
    assert not wrong, wrong


def test_steering_never_imports_transformers():
    assert [str(f) for f in IMPORTS if f.part == "steering" and "transformers" in f.module] == []


@pytest.mark.parametrize("module", ["fastsae", "fastsae.cli"])
def test_import_loads_no_heavy_package(module, tmp_path):
    code = (
        f"import sys, {module}; heavy = ('triton', 'transformers', 'vllm', 'huggingface_hub');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
