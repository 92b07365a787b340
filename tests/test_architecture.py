"""The arrows between packages, read off the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rfa", "pipelines", "tuning", "deploy")
MAY_IMPORT = {"rfa": set(), "pipelines": {"rfa"}, "tuning": {"pipelines", "rfa"}, "deploy": {"pipelines"}}
RFA_LIBRARIES = {"torch", "peft", "transformers", "sklearn", "numpy", "scipy", "safetensors"}


def imports_of(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    for path in modules(package):
        if path.name == "__main__.py":  # the command line stands above all packages
            continue
        others = imports_of(path) & set(PACKAGES) - {package}
        assert others <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {others - MAY_IMPORT[package]}"


def test_rfa_knows_tensors_and_modules_alone() -> None:
    standard = set(__import__("sys").stdlib_module_names)
    for path in modules("rfa"):
        strange = imports_of(path) - standard - RFA_LIBRARIES - {"rfa"}
        assert not strange, f"{path.relative_to(ROOT)} imports {strange}"


@pytest.mark.parametrize(("library", "home"), [("deepspeed", "engine.py"), ("mlflow", "mlflow_store.py")])
def test_one_module_knows(library: str, home: str) -> None:
    users = {path.name for package in PACKAGES for path in modules(package) if library in imports_of(path)}
    assert users == {home}


def test_every_module_says_what_it_is_for() -> None:
    for package in PACKAGES:
        for path in modules(package):
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_only_named_entries_stand_at_the_top() -> None:
    allowed = {
        *PACKAGES,
        "tests",
        "docs",
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    }
    generated = {"outputs", "models"}
    seen = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")}
    assert seen - generated <= allowed | {"cluster.yaml", "LICENSE", "build"}
