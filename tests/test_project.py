"""The house keeps its shape: packages, arrows between the parts, imports, pins, file lengths."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flax_vlm

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

# What each part of flax_vlm may import, besides itself. Arrows run down only; what is not listed may not be imported.
BESIDE = {"processing", "parallel", "checkpoint", "array_files", "whole_folder", "hub"}
BELOW_CONVERT = {"models", "layers"} | BESIDE
BELOW_PRETRAINED = BELOW_CONVERT | {"convert", "training", "generation", "inference", "chat"}
MAY_IMPORT = {
    "layers": set(),
    "models": {"layers"},
    "processing": set(),
    "parallel": {"array_files"},
    "array_files": {"layers"},
    "whole_folder": set(),
    "checkpoint": {"array_files"},
    "hub": {"checkpoint"},
    "memory": set(),
    "progress": {"convert"},
    "copies": {"checkpoint", "convert", "flax_vlm", "progress"},
    "loading": {"checkpoint", "convert", "layers", "memory", "models", "parallel", "progress"},
    "convert": BELOW_CONVERT,
    "generation": BELOW_CONVERT,
    "chat": {"generation", "processing"},
    "inference": {"generation"} | BESIDE,
    "training": BELOW_CONVERT | {"convert", "inference"},
    "viz": set(),
    "pretrained": BELOW_PRETRAINED | {"copies", "loading"},
    "zero_shot": {"pretrained", "inference"},
    "fine_tuning": {"pretrained", "training", "parallel"},
    "demo": BELOW_PRETRAINED | {"pretrained", "flax_vlm", "zero_shot"},
    "cli": BELOW_PRETRAINED | {"pretrained", "flax_vlm", "zero_shot", "fine_tuning", "demo", "progress"},
}
NEVER_ON_IMPORT = {"torch", "transformers", "matplotlib"}

# Where the name of a distribution is not the name it is imported by.
IMPORTED_AS = {"absl-py": {"absl"}, "pillow": {"PIL"}, "orbax-checkpoint": {"orbax"}}


def source_files() -> list[Path]:
    return sorted(path for folder in ("flax_vlm", "convert") for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """flax_vlm/layers/norms.py -> flax_vlm.layers.norms; convert/rules.py -> flax_vlm.convert.rules."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "convert":
        parts = ("flax_vlm", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """flax_vlm.models.altclip -> models; the package itself, and what it exports, is the part flax_vlm."""
    part = "convert" if module.split(".")[0] == "convert" else module.removeprefix("flax_vlm").lstrip(".").split(".")[0]
    exists = part == "convert" or (ROOT / "flax_vlm" / part).is_dir() or (ROOT / "flax_vlm" / f"{part}.py").exists()
    return part if part and exists else "flax_vlm"


def imported_by(node: ast.AST, path: Path) -> list[str]:
    """The modules (or names in them) that one import statement asks for, with relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        package = module_of(path).split(".")
        package = package[: len(package) + (path.name == "__init__.py") - node.level]
        base = ".".join([*package, base]) if base else ".".join(package)
    return [f"{base}.{alias.name}" for alias in node.names]


def imports(path: Path, on_import_only: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of the imports of a file: all of them, or only those that run when the file is imported."""

    def walk(node: ast.AST) -> Iterator[tuple[int, str]]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in imported_by(node, path))
        if on_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if on_import_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text("utf-8")))


def where(path: Path, line: int, name: str) -> str:
    return f"{path.relative_to(ROOT)}:{line}: {name}"


def test_packages_are_the_tree():
    tree = {module_of(path) for path in source_files() if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree
    orphans = [str(path.relative_to(ROOT)) for path in source_files() if not (path.parent / "__init__.py").exists()]
    assert not orphans, "these folders have no __init__.py and would not be installed"


def test_arrows_run_down_only():
    against, unknown = [], set()
    for path in source_files():
        here = "cli" if path.name == "__main__.py" else part_of(module_of(path))
        if here == "flax_vlm":  # the package itself exports everything, lazily
            continue
        if here not in MAY_IMPORT:
            unknown.add(here)
            continue
        for line, name in imports(path):
            if name == "flax_vlm.__version__" or name.split(".")[0] not in {"flax_vlm", "convert"}:
                continue
            if part_of(name) not in {here} | MAY_IMPORT[here]:
                against.append(where(path, line, name))
    assert not unknown, "say in MAY_IMPORT what these parts stand on"
    assert not against, "against the arrows"


def test_nothing_heavy_is_imported_at_the_top():
    heavy = [
        where(path, line, name)
        for path in source_files()
        for line, name in imports(path, on_import_only=True)
        if name.split(".")[0] in NEVER_ON_IMPORT
    ]
    assert not heavy, "import these inside the function that needs them"


def test_convert_is_not_imported_at_the_top():
    early = [
        where(path, line, name)
        for path in source_files()
        if part_of(module_of(path)) != "convert"
        for line, name in imports(path, on_import_only=True)
        if name.split(".")[0] == "convert" or name.startswith("flax_vlm.convert")
    ]
    assert not early


def test_no_private_jax():
    private = [
        where(path, line, name)
        for path in source_files()
        for line, name in imports(path)
        if name.startswith(("jax._src", "jaxlib._src"))
    ]
    mentioned = [str(path.relative_to(ROOT)) for path in source_files() if "jax._src" in path.read_text("utf-8")]
    assert not private
    assert not mentioned


def test_every_import_is_declared():
    extras = PROJECT["project"]["optional-dependencies"]
    run_time = [extra for extra in extras if extra not in {"docs", "test", "dev"}]
    declared = {
        Requirement(line).name
        for line in PROJECT["project"]["dependencies"] + [line for extra in run_time for line in extras[extra]]
    }
    importable = set().union(*(IMPORTED_AS.get(name, {name.replace("-", "_")}) for name in declared))
    importable |= sys.stdlib_module_names | {"flax_vlm", "convert"}
    undeclared = [
        where(path, line, name)
        for path in source_files()
        for line, name in imports(path)
        if name.split(".")[0] not in importable
    ]
    assert not undeclared, "neither a dependency nor in an extra of pyproject.toml"


@pytest.mark.parametrize(("file", "extra"), [("constraints.txt", "dev"), ("constraints-latest.txt", "test")])
def test_constraints_pin_what_is_declared(file, extra):
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line and not line.startswith("#")]
    pins = {}
    for line in lines:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"{line}: no plain pin that any index can serve"
        name, version = line.split("==")
        pins[canonicalize_name(name)] = version
    python = "3.11" if file == "constraints.txt" else "3.12"
    extras = PROJECT["project"]["optional-dependencies"]
    todo = PROJECT["project"]["dependencies"] + extras[extra]
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name == PROJECT["project"]["name"]:
            todo += [line for name in requirement.extras for line in extras[name]]
        elif requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name in pins, f"{file} does not pin {name}"
            assert requirement.specifier.contains(pins[name]), f"{file}: {name}=={pins[name]}, not {requirement}"


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in source_files()}
    assert not {name: length for name, length in lengths.items() if length > 500}, "a long file holds two ideas"


def test_no_path_of_a_machine():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    of_a_machine = re.compile(
        r"(?<![\w.:/~-])/(?:home|root|Users|work|workspace|mnt|opt|scratch)/\w[\w./-]*|\b[A-Z]:\\Users"
    )
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{name}: {match[0]}" for match in of_a_machine.finditer(text)]
    assert not found


def test_one_version():
    assert flax_vlm.__version__ == PROJECT["project"]["version"]


def test_import_is_light(tmp_path):
    heavy = sorted(NEVER_ON_IMPORT | {"jax", "flax", "flax_vlm.convert"})
    code = f"import sys, flax_vlm; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "[]", "import flax_vlm must not load these"


def test_convert_installs_as_part_of_the_package(tmp_path):
    code = "from importlib.util import find_spec as f; print(f('flax_vlm.convert').name, f('convert'))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "flax_vlm.convert None", out.stderr
