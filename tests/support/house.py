"""The package in numbers: sizes, comments, types, errors, imports and names of its Python, generated code excluded.

Pure: a folder's source text in, rows out; nothing is imported or run. Lines are those that are not blank. How each
number is counted stands at its function; used by the contract test of the house and by `make bench-house`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import io
import tokenize
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.vocabulary import ALLOWED, PublicName, public_names

GENERATED = "_pb"
"""Name of the folder with the code that protoc writes."""
GOALS = {
    "module lines, largest": 450,
    "class lines, largest": 250,
    "function lines, p95": 26,
    "import chain at run time, longest": 15,
    "import cycle at run time, largest": 0,
    "import cycle with imports for types, largest": 0,
    "Any in annotations": 187,
    "public names of a private dialect": 0,
}
"""At most this much of each; 187 is half of what `Any` was before the house was put in order."""
_SHOWN = 5
"""Names at most in `where` of a row."""

Imports = Mapping[str, Collection[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    source: str
    tree: ast.Module
    is_package: bool


@dataclass(frozen=True)
class Row:
    """One number of the table."""

    measure: str
    value: float
    where: str = ""
    """What the number is of, where it is that of one thing: the largest class, the chain from end to end."""

    @property
    def goal(self) -> int | None:
        return GOALS.get(self.measure)

    @property
    def meets_goal(self) -> bool:
        return self.goal is None or self.value <= self.goal


def read(root: Path) -> list[Module]:
    """The modules of the package in this folder, which has the package's name. Raises FileNotFoundError."""
    if not (root / "__init__.py").is_file():
        raise FileNotFoundError(f"{root} is no package: it has no __init__.py. Give the folder of the package.")
    modules = []
    for path in sorted(root.rglob("*.py")):
        if GENERATED in path.parts:
            continue
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        source = path.read_text()
        modules.append(Module(".".join(parts[: -1 if is_package else None]), source, ast.parse(source), is_package))
    return modules


def measure(modules: Sequence[Module], tests: Iterable[str]) -> list[Row]:
    """The table. Args: tests: source text of the test files."""
    module_lines = {module.name: line_count(module.source) for module in modules}
    function_lines = {name: lines for module in modules for name, lines in sizes(module, Function)}
    class_lines = {name: lines for module in modules for name, lines in sizes(module, ast.ClassDef)}
    source_lines = sum(module_lines.values())
    at_run_time = imports(modules)
    for_types = imports(modules, every=True)
    chain = longest_chain(at_run_time)
    cycle, cycle_for_types = largest_cycle(at_run_time), largest_cycle(for_types)
    anys = {module.name: count_any(module.tree) for module in modules}
    spoken = dialect(modules)
    return [
        Row("modules", len(modules)),
        Row("module lines, median", quantile(module_lines.values(), 0.5)),
        Row("module lines, p95", quantile(module_lines.values(), 0.95)),
        _largest("module lines, largest", module_lines),
        _largest("class lines, largest", class_lines),
        Row("function lines, median", quantile(function_lines.values(), 0.5)),
        Row(
            "function lines, p95",
            quantile(function_lines.values(), 0.95),
            _above("function lines, p95", function_lines),
        ),
        _largest("function lines, largest", function_lines),
        Row("share of lines with comments and docstrings", sum(map(prose_lines, modules)) / source_lines),
        Row("share of arguments with a type", _share(typed for module in modules for typed in arguments(module.tree))),
        Row("share of errors that carry a value", _share(has for module in modules for has in errors(module.tree))),
        Row("test lines for a line of source", sum(map(line_count, tests)) / source_lines),
        Row("import chain at run time, longest", len(chain), " > ".join(chain)),
        Row("import cycle at run time, largest", len(cycle), ", ".join(cycle)),
        Row("import cycle with imports for types, largest", len(cycle_for_types), ", ".join(cycle_for_types)),
        Row("Any in annotations", sum(anys.values()), _most(anys)),
        Row("public names of a private dialect", len(spoken), ", ".join(f"{n.module}: {n.name}" for n in spoken)),
    ]


def line_count(source: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in source.splitlines())


def quantile(values: Iterable[int], q: float) -> int:
    """The value that a share q of the others lies below."""
    ordered = sorted(values)
    return ordered[int(q * len(ordered))]


def sizes(module: Module, kind: type) -> Iterator[tuple[str, int]]:
    """Every function or class, nested ones too, with the lines from `def` or `class` to its end."""
    lines = module.source.splitlines()

    def under(node: ast.AST, owner: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = owner
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{owner}.{child.name}"
                if isinstance(child, kind):
                    # The place tells properties and their setters apart, which have one name.
                    at = f"{module.name}:{child.lineno} {name.removeprefix(module.name + '.')}"
                    yield at, line_count("\n".join(lines[child.lineno - 1 : child.end_lineno]))
            yield from under(child, name)

    return under(module.tree, module.name)


def prose_lines(module: Module) -> int:
    """Lines of docstrings, a string that stands alone under a constant or a field included, and lines that are comments
    only: a comment behind code does not count."""
    lines = module.source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(module.source).readline)
    found = {
        t.start[0] for t in tokens if t.type == tokenize.COMMENT and lines[t.start[0] - 1].lstrip().startswith("#")
    }
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {i for i in range(node.lineno, (node.end_lineno or node.lineno) + 1) if lines[i - 1].strip()}
    return len(found)


def arguments(tree: ast.Module) -> Iterator[bool]:
    """For every argument of every function but `self` and `cls`: whether it has a type. Lambdas cannot have any."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            a = node.args
            for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]:
                if arg is not None and arg.arg not in ("self", "cls"):
                    yield arg.annotation is not None


def errors(tree: ast.Module) -> Iterator[bool]:
    """For every `raise` of a call: whether any argument is more than text that is always the same."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            given = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
            yield not all(_is_constant(value) for value in given)


def _is_constant(value: ast.expr) -> bool:
    if isinstance(value, ast.JoinedStr):
        return not any(isinstance(part, ast.FormattedValue) for part in value.values)
    return isinstance(value, ast.Constant)


def count_any(tree: ast.Module) -> int:
    """How often the name `Any` is used; its imports and prose do not count."""
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(tree))


def dialect(modules: Iterable[Module]) -> list[PublicName]:
    """Public names with a word of the private dialect that are not allowed to, each name of a module once."""
    found = {
        (name.module, name.name): name
        for module in modules
        for name in public_names(module.name, module.source)
        if name.dialect and name.name not in ALLOWED
    }
    return list(found.values())


def imports(modules: Sequence[Module], *, every: bool = False) -> dict[str, set[str]]:
    """What each module imports of the others.

    Without `every`, what an import of the module imports: not what stands inside a function, which is imported when it
    is called, nor under TYPE_CHECKING. Importing a.b.c runs a and a.b as well, if the importer is outside of them.
    """
    names = {module.name for module in modules}
    return {
        module.name: {
            found
            for target in _targets(module, every)
            for found in _with_parents(target, names)
            if found != module.name and not module.name.startswith(found + ".")
        }
        | {target for target in _targets(module, every) if target in names and target != module.name}
        for module in modules
    }


def _targets(module: Module, every: bool) -> Iterator[str]:
    """Dotted names that may be modules: a.b and a.b.c of `from a.b import c`."""
    package = module.name if module.is_package else module.name.rpartition(".")[0]
    for node in _statements(module.tree.body, every):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _statements(body: Iterable[ast.AST], every: bool) -> Iterator[ast.AST]:
    for node in body:
        yield node
        inner = list(ast.iter_child_nodes(node))
        if not every:
            if isinstance(node, Function):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                inner = list(node.orelse)
        yield from _statements(inner, every)


def _with_parents(name: str, names: Collection[str]) -> Iterator[str]:
    while name:
        if name in names:
            yield name
        name = name.rpartition(".")[0]


def longest_chain(graph: Imports) -> list[str]:
    """The most modules that import one another in a row; of a cycle, one module counts."""
    cycle_of = {name: cycle[0] for cycle in cycles(graph) for name in cycle}

    @functools.cache
    def chain(first: str) -> tuple[str, ...]:
        members = [name for name in graph if cycle_of.get(name, name) == first]
        nexts = {cycle_of.get(target, target) for name in members for target in graph[name]} - {first}
        return (first, *max((chain(name) for name in sorted(nexts)), key=len, default=()))

    return list(max((chain(cycle_of.get(name, name)) for name in sorted(graph)), key=len, default=()))


def largest_cycle(graph: Imports) -> list[str]:
    """The modules of the largest cycle, none where there is no cycle."""
    return max(cycles(graph), key=len, default=[])


def cycles(graph: Imports) -> list[list[str]]:
    """Modules that all reach each other by imports: every such group of two and more."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reached[name] if name in reached[other]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, groups))


def _reachable(graph: Imports, start: str) -> set[str]:
    """What `start` reaches by one import or more."""
    found: set[str] = set()
    queue = list(graph[start])
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += graph[name]
    return found


def _largest(measure: str, sizes_by_name: Mapping[str, int]) -> Row:
    """The largest; `where` names every one above the goal, so that all of them are known at once."""
    return Row(measure, max(sizes_by_name.values()), _above(measure, sizes_by_name) or _most(sizes_by_name, 1))


def _above(measure: str, sizes_by_name: Mapping[str, int]) -> str:
    goal = GOALS.get(measure)
    above = {} if goal is None else {name: size for name, size in sizes_by_name.items() if size > goal}
    return _most(above) + (f" and {len(above) - _SHOWN} more above {goal}" if len(above) > _SHOWN else "")


def _most(sizes_by_name: Mapping[str, int], count: int = _SHOWN) -> str:
    """The largest ones with their sizes."""
    return ", ".join(f"{name} ({size})" for name, size in sorted(sizes_by_name.items(), key=lambda i: -i[1])[:count])


def _share(values: Iterable[bool]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
