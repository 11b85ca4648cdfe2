"""The layout of the package: imports point one way, rooms stay readable, and the method stays small."""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hf_xgrad

PACKAGE = Path(hf_xgrad.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# Each layer, and those below it, which are all of the package that it may import.
_METHOD = {"predictor", "engines", "closed_forms", "core"}
LAYERS: dict[str, set[str]] = {
    "core": set(),
    "optim": set(),
    "closed_forms": {"core"},
    "engines": {"closed_forms", "core"},
    "predictor": {"engines", "closed_forms", "core"},
    "outputs": {"core"},
    "trainer": {*_METHOD, "outputs", "optim"},
    "recipes": {*_METHOD, "trainer", "outputs", "optim"},
    "cli": {*_METHOD, "recipes", "trainer", "outputs", "optim"},
}
# Files of the top folder.
LAYER_OF = {"__main__": "cli", "cli": "cli", "optim": "optim", "predictor": "predictor", "deepspeed": "predictor"}
# Libraries that the files of a layer may import wherever they like, beside Python's own; and those of single files.
LIBRARIES: dict[str, set[str]] = {
    **{layer: {"torch"} for layer in ("core", "optim", "closed_forms", "engines", "predictor")},
    "outputs": set(),
    "trainer": {"torch", "transformers", "accelerate"},
    "recipes": {"torch", "transformers", "accelerate", "datasets", "numpy"},
    "cli": set(),
}
LIBRARIES_OF: dict[str, set[str]] = {
    "engines/zero_layouts.py": {"deepspeed"},
    "outputs/checkpoints.py": {"torch", "transformers", "safetensors"},
    "outputs/hub.py": {"huggingface_hub"},
    "outputs/predictor_state.py": {"safetensors"},
    "outputs/model_card.py": {"torch", "transformers", "accelerate", "huggingface_hub"},
    "outputs/stock_card.py": {"torch", "huggingface_hub"},
    "recipes/arguments.py": {"yaml"},
    "recipes/classification/tasks.py": {"evaluate", "scipy", "sklearn"},
    "recipes/corpora/acceptability.py": {"tokenizers"},
    "recipes/corpora/files.py": {"pyarrow", "sklearn"},
    "recipes/language/tokenizer.py": {"tokenizers"},
    "recipes/loop/results.py": {"huggingface_hub"},
}
# Those that come only when they are asked for, within a function: optional ones, and what takes a second.
WITHIN_FUNCTIONS: dict[str, set[str]] = {
    "trainer/optimizers.py": {"pytorch_optimizer"},
    "outputs/plots.py": {"matplotlib", "numpy"},
    "recipes/language/models.py": {"peft"},
    "recipes/training.py": {"peft"},
    "recipes/results.py": {"rich"},
    "cli.py": {"torch"},
}
# A command is imported by its name, when it is called: only these may do so.
IMPORT_BY_NAME = {"cli.py", "recipes/sweep.py"}
# These import DeepSpeed, or one another; all others may import them within functions only.
NEED_DEEPSPEED = {"hf_xgrad.deepspeed", "hf_xgrad.engines.deepspeed", "hf_xgrad.engines.zero_layouts"}

LINES_OF_A_FILE = 350
LINES_OF_A_CLASS = 200
# Longer ones, with the length that they had when this was written: they may only shrink.
LONGER: dict[str, int] = {}

# What a reader of the method opens, and how many lines of code all of it may have; and with the two files in which
# these parts meet.
METHOD = (*(f"core/{name}.py" for name in ("config", "rules", "weights", "ledger", "last_update")), "predictor.py")
LINES_OF_THE_METHOD = 750
METHOD_AT_WORK = (*METHOD, "core/moves.py", "core/prediction.py")
LINES_OF_THE_METHOD_AT_WORK = 800


# ---- imports ----


@dataclass(frozen=True)
class Import:
    """`module` is dotted; `name` is what is taken from it, if anything."""

    module: str
    name: str | None
    within_function: bool

    @property
    def targets(self) -> set[str]:
        """The files of the package that it names, as modules; the package itself as `hf_xgrad`."""
        if self.module.partition(".")[0] != "hf_xgrad":
            return set()
        submodule = f"{self.module}.{self.name}"
        return {submodule if submodule in modules() else self.module}


@cache
def modules() -> dict[str, str]:
    """All files of the package, by the names of their modules."""
    dotted = {file: f"hf_xgrad.{file.removesuffix('.py').replace('/', '.')}" for file in FILES}
    return {name.removesuffix(".__init__"): file for file, name in dotted.items()}


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


def imports_of(file: str) -> list[Import]:
    """What a file imports when it runs."""

    def visit(node: ast.AST, within: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, within)
            return
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, None, within) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports are absolute"
            yield from (Import(node.module or "", alias.name, within) for alias in node.names)
        inside = within or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    return list(visit(tree_of(file), False))


def layer_of(file: str) -> str:
    """The layer of a file; KeyError for one that has none yet."""
    folder, _, name = file.rpartition("/")
    return folder.partition("/")[0] if folder else LAYER_OF[name.removesuffix(".py")]


OF_LAYERS = [file for file in FILES if file != "__init__.py"]


def test_every_file_has_a_layer() -> None:
    assert {layer_of(file) for file in OF_LAYERS} == set(LAYERS)
    assert {*LIBRARIES_OF, *WITHIN_FUNCTIONS, *IMPORT_BY_NAME, *LONGER, *METHOD_AT_WORK} <= set(FILES)
    assert modules().keys() >= NEED_DEEPSPEED


def test_layers_are_in_order() -> None:
    """Whatever a layer may import may import no more than that layer may."""
    for layer, below in LAYERS.items():
        assert layer not in below
        for lower in below:
            assert LAYERS[lower] <= below, f"{layer} may import {lower}, but not all that {lower} may"


@pytest.mark.parametrize("file", OF_LAYERS)
def test_imports_of_the_package_point_one_way(file: str) -> None:
    """cli -> recipes -> trainer -> outputs, predictor -> engines -> closed_forms -> core."""
    layer = layer_of(file)
    for found in imports_of(file):
        for target in found.targets:
            if target == "hf_xgrad":
                # Its public names come from all layers, but its version from nowhere.
                assert layer in ("cli", "recipes") or found.name == "__version__", (
                    f"{file} imports hf_xgrad.{found.name}"
                )
                continue
            assert target in modules(), f"{file} imports {target}, which is no file"
            of_target = layer_of(modules()[target])
            assert of_target in {layer, *LAYERS[layer]}, f"{file}, of {layer}, imports {target}, of {of_target}"


def test_the_package_itself_imports_nothing() -> None:
    """What needs torch or Transformers comes when it is asked for."""
    assert {target for found in imports_of("__init__.py") for target in found.targets} == set()


def test_imports_go_in_no_circle() -> None:
    """Of files, too, but for what is imported within functions."""
    graph = {}
    for name, file in modules().items():
        found = [each for each in imports_of(file) if not each.within_function]
        graph[name] = {target for each in found for target in each.targets} - {name, "hf_xgrad"}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES)
def test_libraries_are_imported_where_they_may_be(file: str) -> None:
    allowed = LIBRARIES[layer_of(file)] | LIBRARIES_OF.get(file, set()) if file in OF_LAYERS else set()
    later = allowed | WITHIN_FUNCTIONS.get(file, set())
    for found in imports_of(file):
        library = found.module.partition(".")[0]
        if library not in {"hf_xgrad", *sys.stdlib_module_names}:
            assert library in (later if found.within_function else allowed), f"{file} imports {library}"


@pytest.mark.parametrize("file", FILES)
def test_deepspeed_comes_only_when_it_is_asked_for(file: str) -> None:
    for found in imports_of(file):
        if found.targets & NEED_DEEPSPEED and not found.within_function:
            assert f"hf_xgrad/{file}".removesuffix(".py").replace("/", ".") in NEED_DEEPSPEED, file


@pytest.mark.parametrize("file", [file for file in OF_LAYERS if file not in IMPORT_BY_NAME])
def test_nothing_is_imported_by_a_text(file: str) -> None:
    """Where no test would see it."""
    names = {node.id for node in ast.walk(tree_of(file)) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree_of(file)) if isinstance(node, ast.Attribute)}
    assert not names & {"import_module", "__import__"}


# ---- sizes ----


@pytest.mark.parametrize("file", FILES)
def test_files_are_short(file: str) -> None:
    lines = len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGER.get(file, LINES_OF_A_FILE)
    if file in LONGER:
        assert lines > LINES_OF_A_FILE, f"{file} is as short as others now: take it off the list"


@pytest.mark.parametrize("file", FILES)
def test_classes_are_short(file: str) -> None:
    classes = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.ClassDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in classes}
    assert {name: lines for name, lines in lengths.items() if lines > LINES_OF_A_CLASS} == {}


def lines_of_code(text: str) -> int:
    """Lines with something to run: neither blank nor comment nor docstring."""
    layout = {
        *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
        *(tokenize.ENCODING, tokenize.ENDMARKER),
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_what_counts_as_code() -> None:
    text = '''"""A module
of two lines."""

# A comment.
X = 1  # another


class A:
    """A class."""

    y = """no
    docstring"""

    def f(self) -> int:
        """
        A method.
        """
        return (
            self.y
        )
'''
    assert lines_of_code(text) == 8


@pytest.mark.parametrize(
    ("files", "bound"), [(METHOD, LINES_OF_THE_METHOD), (METHOD_AT_WORK, LINES_OF_THE_METHOD_AT_WORK)]
)
def test_the_method_is_small(files: tuple[str, ...], bound: int) -> None:
    counts = {file: lines_of_code((PACKAGE / file).read_text(encoding="utf-8")) for file in files}
    assert sum(counts.values()) <= bound, counts
