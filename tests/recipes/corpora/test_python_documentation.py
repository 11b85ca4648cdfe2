"""The embedded corpus: what is in it, what is not, and that validation has nothing which was trained on."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections import Counter
from pathlib import Path

import pytest

import hf_xgrad
from hf_xgrad.recipes.corpora import python_documentation
from hf_xgrad.recipes.corpora.python_documentation import load_texts
from hf_xgrad.recipes.input_errors import InputError

ROOT = str(Path(hf_xgrad.__file__).parent.parent)


def paragraphs(texts: list[str]) -> list[str]:
    """The paragraphs of the texts, without line breaks and indentation."""
    return [" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text.strip())]


def digest(splits: tuple[list[str], list[str]]) -> str:
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


@pytest.fixture(scope="module")
def splits() -> tuple[list[str], list[str]]:
    return load_texts()


def test_size(splits: tuple[list[str], list[str]]) -> None:
    train, validation = (sum(map(len, texts)) for texts in splits)
    assert 1_000_000 < train + validation < 4_000_000
    assert 0.03 < validation / (train + validation) < 0.2


def test_no_paragraph_occurs_twice(splits: tuple[list[str], list[str]]) -> None:
    train, validation = splits
    found = Counter(paragraphs(train + validation))
    assert [paragraph for paragraph, times in found.items() if times > 1] == []
    assert len(found) > 10_000


def test_topics_and_docstrings_are_there(splits: tuple[list[str], list[str]]) -> None:
    from pydoc_data.topics import topics

    found = set(paragraphs(splits[0] + splits[1]))
    docstrings = [inspect.getdoc(thing) for thing in (json.loads, textwrap.dedent, Path.read_text, os.walk)]
    assert set(paragraphs([*topics.values(), *(text for text in docstrings if text)])) <= found


def test_the_python_alone_decides_and_nothing_is_imported(splits: tuple[list[str], list[str]]) -> None:
    code = """
import sys, sysconfig, test_python_documentation as test
sysconfig.get_path("stdlib")
before = set(sys.modules)
print(test.digest(test.load_texts()), sorted(set(sys.modules) - before - {"pydoc_data", "pydoc_data.topics"}))
"""
    hashes = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    folders = os.pathsep.join((ROOT, str(Path(__file__).parent)))
    environment = os.environ | {"PYTHONHASHSEED": hashes, "PYTHONPATH": folders}
    run = [sys.executable, "-W", "error", "-c", code]
    output = subprocess.run(run, check=True, env=environment, capture_output=True, text=True).stdout
    assert output == f"{digest(splits)} []\n"


SOURCES = {
    "json/__init__.py": '"""The package."""\n',
    "json/decoder.py": '''
        """The module.

        Of two paragraphs.
        """
        import antigravity
        class A:
            """The class."""
            def method(self):
                """The module.

                    Indented,
                    but the same.
                """
                def inner():
                    "Within a function."
        try:
            pass
        except ImportError:
            if A:
                async def b():
                    r"""Within \\ statements.

                        code

                    Of two   paragraphs.

                    Indented, but
                    the same."""
        "no docstring"
    ''',
    "this.py": "print('no docstring')\n",
    "ast.py": '"""Of two\nparagraphs."""\n',
    "json/test/test_json.py": '"""Skipped."""',
    "idlelib/idle.py": '"""Skipped."""',
    "site-packages/other.py": '"""Skipped."""',
    "sitecustomize.py": '"""Skipped."""',
    "json/data.txt": '"""Skipped."""',
}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of SOURCES, without topics."""
    for name, source in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    return tmp_path


def test_a_python_without_topics_has_its_docstrings(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_documentation, "_is_validation", lambda name: name == "module ast")
    train, validation = load_texts()
    assert validation == ["Of two\nparagraphs.\n\n"]
    assert train == [
        "The package.\n\n",
        "The module.\n\nThe class.\n\nIndented,\nbut the same.\n\nWithin a function.\n\n"
        "Within \\ statements.\n\n    code\n\n",
    ]
    assert "antigravity" not in sys.modules


def test_the_name_alone_decides_the_split(library: Path, splits: tuple[list[str], list[str]]) -> None:
    for number in range(200):
        (library / "json" / f"module{number}.py").write_text(f'"""Text {number}."""')
    train, validation = load_texts()
    assert 8 < len(validation) < 35
    for number in range(0, 200, 2):
        (library / "json" / f"module{number}.py").unlink()
    fewer_train, fewer_validation = load_texts()
    assert set(fewer_train) <= set(train)
    assert set(fewer_validation) <= set(validation)


def test_a_python_without_sources_has_its_topics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python.zip"))
    train, validation = load_texts()
    assert sum(map(len, train)) > 200_000
    assert sum(map(len, validation)) > 10_000


@pytest.mark.parametrize("left", [[], ["json/__init__.py"]], ids=["nothing", "training only"])
def test_a_python_without_documentation_is_refused(library: Path, left: list[str]) -> None:
    for path in library.rglob("*.py"):
        if path.relative_to(library).as_posix() not in left:
            path.unlink()
    with pytest.raises(InputError, match=r"^this Python \(.*\) has no documentation to train on: .*--train_file"):
        load_texts()
