"""The tree tests itself: layers, purity, names, sizes (DESIGN section 11, STYLE rule 14).

LAYERS is the order as the code has it, lowest first. A module imports from its own layer and from lower ones, wherever the import stands: at the
top, in a function, under TYPE_CHECKING. What differs from the line in DESIGN, and why:

- `restore` lies below `session`, not above it: `Session.restore()` is what performs it, for a restore is collective and ends in live tensors;
- the trainer's and the daemon's parts (channel, link, held, peers, ...) are one layer: they know each other sideways, and both know the core;
- `ckptd/__init__` counts as the lowest layer, for every module may ask it for `__version__`. `attach` and `Session`, which it gives out on first
  use, count as `ckptd.session`; it may name that module in a function or under TYPE_CHECKING, never when it is imported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("storage", "monitor", "integrations")

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(f"ckptd.{name}".rstrip(".") for name in layer.split())
    for layer in (
        "errors",
        "core",
        "arena",
        "storage",
        "monitor",
        "acts channel notify trace transport peers probing members persist held protect elastic plugin autoload capture state binding meeting rounds link spawn restore wanted tapline",
        "session launch standby",
        "formats",
        "reading windows target",
        "daemon watcher faces convert",
        "cli",
        "integrations",
    )
)
LAZY = {"attach": "ckptd.session", "Session": "ckptd.session", "phase": "ckptd.monitor.tap", "report_loss": "ckptd.monitor.tap"}
"""Names that `ckptd/__init__` gives out on first use, and where they come from."""

IMPURE = frozenset(
    "torch time datetime socket select selectors ssl threading asyncio concurrent multiprocessing subprocess signal sched "
    "os io pathlib shutil tempfile glob fcntl mmap ctypes random secrets uuid logging psutil http urllib platform sys".split()
)
"""What core may not import: clocks, sockets, threads, files, processes, chance, devices; and whatever would bring them in by the back door."""
IMPURE_CALLS = frozenset({"open", "print", "input"})

TORCH = frozenset(f"ckptd.{name}" for name in "state binding capture restore wanted session meeting elastic launch standby tapline integrations".split())
TORCH |= frozenset(f"ckptd.monitor.{name}" for name in "tap marks".split())
"""Modules that may import torch. Everything else runs in the daemon or on a command line, which start without it."""

UNSAFE_MODULES = frozenset({"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})
UNSAFE_CALLS = frozenset({"eval", "exec", "yaml.load", "torch.load", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"})
MAY_RUN_CODE = {"ckptd.standby": {"exec", "runpy.run_module"}}
"""A standby becomes the user's own training script; that is its work."""

LINES_MAX = 700
LONG = {
    "ckptd/session.py": (950, "attach, step and restore are one protocol between the ranks; it has to be read as one"),
    "ckptd/core/node.py": (900, "the life of a snapshot is one table and one machine, with its promises beside it"),
    "ckptd/daemon.py": (1000, "one loop owns all state: splitting it would split the owner"),
}
"""Files that are longer, how long they may be, and why."""


# --- reading the tree -------------------------------------------------------------------------------------------------------


def package_files() -> Iterator[tuple[str, Path]]:
    """(module name, file) of the package, each file once: the rooms by their own folders, not by the symlinks."""
    for top, prefix in [("ckptd", "ckptd"), *((room, f"ckptd.{room}") for room in ROOMS)]:
        for path in sorted((ROOT / top).rglob("*.py")):
            relative = path.relative_to(ROOT / top)
            if top == "ckptd" and relative.parts[0] in ROOMS:
                continue
            parts = [prefix, *relative.with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


FILES = dict(package_files())


def repository_files() -> Iterator[Path]:
    """Every Python file that is ours, tests and scripts too."""
    for top in ("ckptd", *ROOMS, "tests", "scripts"):
        yield from sorted(p for p in (ROOT / top).rglob("*.py") if not any(p.is_relative_to(ROOT / "ckptd" / room) for room in ROOMS))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of all imports, also those in functions. `from a import b` is a.b where that is a module, else a."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if base == "ckptd" and alias.name in LAZY:
                    yield node.lineno, LAZY[alias.name]
                else:
                    yield node.lineno, full if full in FILES else base


def layer_of(module: str) -> int:
    """Its place in LAYERS; -1 for `ckptd` itself. Raises KeyError for a module that nobody placed."""
    if module == "ckptd":
        return -1
    room = ".".join(module.split(".")[:2])
    for number, layer in enumerate(LAYERS):
        if room in layer:
            return number
    raise KeyError(module)


def at(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of names, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def run(code: str) -> str:
    """What a fresh interpreter prints, with nothing but the package in reach."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- layers -----------------------------------------------------------------------------------------------------------------


def test_every_module_has_a_layer() -> None:
    lost = []
    for module in FILES:
        try:
            layer_of(module)
        except KeyError:
            lost.append(module)
    assert not lost, f"give them a place in LAYERS: {lost}"


def test_imports_point_down_or_sideways() -> None:
    wrong = []
    for module, path in FILES.items():
        for line, target in imports_of(module, path):
            if target.split(".")[0] == "ckptd" and module != "ckptd" and layer_of(target) > layer_of(module):
                wrong.append(f"{at(path, line)}: {module} imports {target}, which lies above it")
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_errors_only() -> None:
    """At import, that is; sessions come on first use."""
    for node in tree_of(FILES["ckptd"]).body:
        if isinstance(node, ast.ImportFrom):
            assert node.module in {"__future__", "typing", "ckptd.errors"}, f"line {node.lineno}"
        assert not isinstance(node, ast.Import), f"line {node.lineno}"
    reached = {target for _, target in imports_of("ckptd", FILES["ckptd"]) if target.startswith("ckptd")}
    assert reached <= {"ckptd.errors", *LAZY.values()}


def test_core_is_pure() -> None:
    wrong = []
    for module, path in FILES.items():
        if module.split(".")[:2] != ["ckptd", "core"]:
            continue
        wrong += [f"{at(path, line)}: imports {name}" for line, name in imports_of(module, path) if name.split(".")[0] in IMPURE]
        wrong += [
            f"{at(path, node.lineno)}: calls {node.func.id}"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS
        ]
    assert not wrong, "\n".join(wrong)


def test_torch_stays_in_the_trainer() -> None:
    wrong = []
    for module, path in FILES.items():
        if ".".join(module.split(".")[:2]) not in TORCH and not any(module == t or module.startswith(t + "_") for t in TORCH):
            wrong += [f"{at(path, line)}: imports {name}" for line, name in imports_of(module, path) if name.split(".")[0] == "torch"]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("what", ["ckptd", "ckptd.daemon", "ckptd.cli.main"])
def test_no_torch_without_a_session(what: str) -> None:
    assert run(f"import sys, {what}; print([m for m in sys.modules if m.split('.')[0] == 'torch'])") == "[]"


def test_parsing_the_command_line_needs_no_torch() -> None:
    assert run("import sys, ckptd.cli.main as m; m.build_parser(); print('torch' in sys.modules)") == "False"


# --- names ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_symlinks(room: str) -> None:
    link = ROOT / "ckptd" / room
    assert link.is_symlink(), "a checkout without symlinks? ckptd cannot be installed from it"
    assert str(link.readlink()) == f"../{room}"
    assert (link / "__init__.py").is_file()


def test_rooms_have_one_name() -> None:
    """`import storage` works in the repository's root, and would load a second copy of the module."""
    wrong = []
    for path in repository_files():
        for node in ast.walk(tree_of(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [f"{at(path, node.lineno)}: {n}" for n in names if n.split(".")[0] in ROOMS]
    assert not wrong, "write ckptd.<room>:\n" + "\n".join(wrong)
    seen = run("import sys, ckptd.cli.main, ckptd.daemon; print([m for m in sys.modules if m.split('.')[0] in " + repr(ROOMS) + "])")
    assert seen == "[]"


def test_all_is_sorted_and_complete() -> None:
    import ckptd

    assert ckptd.__all__ == sorted(ckptd.__all__)
    offered = set(LAZY) | {"__version__"}
    for node in ast.walk(tree_of(FILES["ckptd"])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckptd."):
            offered |= {alias.asname or alias.name for alias in node.names}
    assert set(ckptd.__all__) == offered
    for name in ckptd.__all__:
        assert getattr(ckptd, name) is not None
    with pytest.raises(AttributeError):
        ckptd.nothing_of_that_name  # noqa: B018


def test_all_of_errors_is_complete() -> None:
    from ckptd import errors

    defined = sorted(node.name for node in tree_of(FILES["ckptd.errors"]).body if isinstance(node, ast.ClassDef))
    assert errors.__all__ == defined


# --- habits -----------------------------------------------------------------------------------------------------------------


def test_nothing_runs_foreign_code() -> None:
    """No pickle, eval, yaml.load, shell=True, torch.load in the package (DESIGN section 13)."""
    wrong = []
    for module, path in FILES.items():
        allowed = MAY_RUN_CODE.get(module, set())
        wrong += [f"{at(path, line)}: imports {name}" for line, name in imports_of(module, path) if name.split(".")[0] in UNSAFE_MODULES]
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            if name in UNSAFE_CALLS - allowed:
                wrong.append(f"{at(path, node.lineno)}: calls {name}")
            for keyword in node.keywords:
                if keyword.arg in {"shell", "allow_pickle"} and getattr(keyword.value, "value", True):
                    wrong.append(f"{at(path, node.lineno)}: {keyword.arg}=")
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_is() -> None:
    assert not [module for module, path in FILES.items() if not ast.get_docstring(tree_of(path))]


def test_nothing_is_left_over() -> None:
    """What merges, editors and compilers leave is no part of the package (the extension is built where the package is)."""
    kinds = {".py", ".pyi", ".c", ".cpp", ".h", ".so", ".html", ".md", ".json", ".service", ".typed", ".pyc"}
    rooms = [ROOT / "ckptd", *(ROOT / room for room in ROOMS)]
    assert not [str(p.relative_to(ROOT)) for room in rooms for p in room.rglob("*") if p.is_file() and p.suffix not in kinds and p.name != "py.typed"]


def test_files_are_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    over = {name: n for name, n in lengths.items() if n > LONG.get(name, (LINES_MAX, ""))[0]}
    assert not over, f"over {LINES_MAX} lines, or over their own limit in LONG: {over}"
    stale = [name for name in LONG if lengths.get(name, 0) <= LINES_MAX - 100]
    assert not stale, f"short again, take them out of LONG: {stale}"
