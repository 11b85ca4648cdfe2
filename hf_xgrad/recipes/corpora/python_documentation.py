"""The embedded corpus: the documentation that comes with every Python.

The language reference as `help()` has it (`pydoc_data.topics`) and the docstrings of the standard library, read from
its sources: importing every module would run it. About two million characters; which ones depends on the version of
Python, and so does a perplexity on them.
"""

import ast
import gc
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from hf_xgrad.recipes.input_errors import InputError

# Tests and applications that lie among the modules of the standard library.
NOT_DOCUMENTATION = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}
VALIDATION_SHARE = 0.1


def load_texts() -> tuple[list[str], list[str]]:
    """Return the texts for training and those for validation: one for each topic and one for each module.

    No paragraph occurs twice, be it indented differently, so that validation has none that was trained on. The name of
    a text alone decides where it goes.

    Raises:
        InputError: this Python has neither the topics nor the sources.
    """
    documents = {**_topics(), **_docstrings(Path(sysconfig.get_path("stdlib")))}
    splits: tuple[list[str], list[str]] = ([], [])
    for name, text in _without_repetitions(documents):
        splits[_is_validation(name)].append(text)
    if not all(splits):
        raise InputError(
            f"this Python ({sys.executable}) has no documentation to train on: neither pydoc_data.topics nor the "
            "sources of its standard library; give a --train_file"
        )
    return splits


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic {name}": topics[name] for name in sorted(topics)}


def _docstrings(library: Path) -> dict[str, str]:
    """Return all docstrings of each module, in the order of its source."""
    tops = [path for path in library.glob("*") if path.stem in sys.stdlib_module_names]
    texts = {}
    # Millions of nodes are made and given up again, none of them in a cycle: collecting garbage would double the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for path in sorted(path for top in tops for path in (top, *top.rglob("*.py")) if path.suffix == ".py"):
            parts = path.relative_to(library).with_suffix("").parts
            if NOT_DOCUMENTATION.isdisjoint(parts):
                texts[f"module {'.'.join(parts)}"] = "\n\n".join(_docstrings_below(_parse(path)))
    finally:
        if collecting:
            gc.enable()
    return texts


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(path.read_bytes())


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        # Definitions stand within statements only; most of a tree is expressions.
        if isinstance(child, (ast.stmt, ast.ExceptHandler)):
            yield from _docstrings_below(child)


def _without_repetitions(documents: dict[str, str]) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    for name, text in documents.items():
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.rstrip())
        if kept:
            # Texts are joined for training: the blank line keeps the next one apart.
            yield name, "\n\n".join(kept) + "\n\n"


def _is_validation(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) < VALIDATION_SHARE * 2**32
