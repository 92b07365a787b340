"""The structure of the code, read off the imports: packages, rooms, circles, who may know which library, budgets."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("rfa", "pipelines", "tuning", "deploy")
MAY_IMPORT = {
    "rfa": set(),
    "pipelines": {"rfa"},
    "tuning": {"pipelines", "rfa"},
    "deploy": {"pipelines"},
}
COMMAND_LINE = "pipelines.__main__"  # above all packages: it starts what they offer
RFA_LIBRARIES = {"torch", "peft", "transformers", "sklearn", "numpy", "scipy"}

# The driver imports neither transformers nor peft: what needs them runs on workers, or in a Ray task.
WALL = {"transformers", "peft"}
BEHIND_THE_WALL = {
    "pipelines.model",
    "pipelines.training.build",
    "pipelines.training.loop",
    "pipelines.training.solving",
    "pipelines.training.statistics_point",
    "pipelines.training.strength",
    "pipelines.training.worker",
    "pipelines.training.export",
    "pipelines.evaluation.scorer",
    "pipelines.evaluation.text_scorer",
    "pipelines.evaluation.class_scorer",
    "pipelines.evaluation.attacks",
    "pipelines.evaluation.generation",
    "pipelines.planning.estimate",
    "pipelines.planning.memory",
    "pipelines.planning.step",
    "tuning.workbench",
}
FILE_LINES, FUNCTION_LINES = 350, 60


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports_of(name: str, *, late: bool = True) -> set[str]:
    """Full names of all that a module imports; without `late`, at import alone (functions run later)."""
    found: set[str] = set()
    waiting: list[ast.AST] = [TREES[name]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in MODULES else str(node.module) for member in members}
        elif late or not (isinstance(node, ast.FunctionDef) or is_type_checking(node)):
            waiting += ast.iter_child_nodes(node)
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def libraries_of(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports_of(name)}


def room_of(name: str) -> str:
    """The folder below a package that a module stands in; the module itself where it stands in none."""
    return name if name in MODULES and name.count(".") < 2 else ".".join(name.split(".")[:2])


def order_of(arrows: dict[str, set[str]]) -> None:
    """Fail, naming a circle, unless the arrows have an order."""
    try:
        tuple(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_along_the_arrows(package: str) -> None:
    for name in MODULES:
        if name.split(".")[0] == package and name != COMMAND_LINE:
            others = libraries_of(name) & set(PACKAGES) - {package}
            assert others <= MAY_IMPORT[package], f"{name} imports {others - MAY_IMPORT[package]}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    order_of({name: imports_of(name) & MODULES.keys() - {name} for name in MODULES})


def test_rooms_import_one_way() -> None:
    arrows: dict[str, set[str]] = {}
    for name in MODULES:
        rooms = {room_of(imported) for imported in imports_of(name) & MODULES.keys()}
        arrows.setdefault(room_of(name), set()).update(rooms - {room_of(name)})
    order_of(arrows)


def test_rfa_knows_tensors_and_modules_alone() -> None:
    for name in MODULES:
        if name.split(".")[0] == "rfa":
            strange = libraries_of(name) - set(sys.stdlib_module_names) - RFA_LIBRARIES - {"rfa"}
            assert not strange, f"{name} imports {strange}"


def test_what_the_driver_imports_stays_on_its_side_of_the_wall() -> None:
    for start in MODULES:
        if start.split(".")[0] == "rfa" or is_behind_the_wall(start):
            continue
        reached, waiting = {start}, [start]
        while waiting:
            imported = imports_of(waiting.pop(), late=False)
            waiting += imported & MODULES.keys() - reached
            reached |= imported
        crossed = {
            name for name in reached if name.split(".")[0] in WALL or is_behind_the_wall(name)
        }
        assert not crossed, f"{start} reaches {sorted(crossed)} when it is imported"


def is_behind_the_wall(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in BEHIND_THE_WALL)


@pytest.mark.parametrize(
    ("library", "home"),
    [("deepspeed", "pipelines.model.engine"), ("mlflow", "pipelines.tracking.mlflow_store")],
)
def test_one_module_knows(library: str, home: str) -> None:
    assert {name for name in MODULES if library in libraries_of(name)} == {home}


def test_every_module_says_what_it_is_for() -> None:
    for name, tree in TREES.items():
        assert ast.get_docstring(tree), name


def test_files_and_functions_keep_their_budgets() -> None:
    for name, tree in TREES.items():
        lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
        assert lines <= FILE_LINES, f"{name}: {lines} lines, allowed: {FILE_LINES}"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= FUNCTION_LINES, (
                    f"{name}.{node.name}: {length} lines, allowed: {FUNCTION_LINES}"
                )


def test_only_named_entries_stand_at_the_top() -> None:
    allowed = {
        *PACKAGES,
        "tests",
        "docs",
        "README.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "cluster.yaml",
        "constraints.txt",
        "pyproject.toml",
    }
    generated = {"outputs", "models", "build"}
    seen = {
        p.name
        for p in ROOT.iterdir()
        if not p.name.startswith(".") and not p.name.endswith(".egg-info")
    }
    assert seen - generated <= allowed
