"""The package as it is installed: a wheel has all that the commands need, and an editable install is found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import hf_xgrad

ROOT = Path(hf_xgrad.__file__).resolve().parent.parent


def environment(folder: Path) -> Path:
    """A virtual environment that sees the libraries of this one, pip among them; returns the folder of its commands.

    It does not see an editable install: by a .pth file that works, and those of a folder that such a file adds to the
    path are not read.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    scripts = folder / ("Scripts" if sys.platform == "win32" else "bin")
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([scripts / "python", "-c", show], check=True, capture_output=True, text=True).stdout.strip()
    Path(site, "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def run(folder: Path, *words: str | Path) -> str:
    # A path to look for packages in would hide what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the package's name, as `git clone` makes it."""
    folder = tmp_path_factory.mktemp("beside") / "hf_xgrad"
    shutil.copytree(ROOT / "hf_xgrad", folder / "hf_xgrad", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(clone, sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, clone)
    (made,) = folder.glob("*.whl")
    return made


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "hf_xgrad"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    assert files == {*wanted, "hf_xgrad/optimizers.json", "hf_xgrad/py.typed"}


@pytest.mark.slow
def test_the_commands_of_a_wheel_work_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    scripts = environment(tmp_path / "venv")
    run(tmp_path, scripts / "python", "-m", "pip", "install", "--no-deps", wheel)
    command = scripts / "hf-xgrad"
    where = run(tmp_path, scripts / "python", "-c", "import hf_xgrad; print(hf_xgrad.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    assert run(tmp_path, command, "--version") == f"hf_xgrad {hf_xgrad.__version__}\n"
    assert "adamw_torch" in run(tmp_path, command, "optimizers", "--optim", "adamw_torch")
    assert run(tmp_path, command, "demo", "--max_steps", "4", "--use_cpu").endswith("loss.png\n")
    data = tmp_path / "outputs/demo/data"
    run(
        *(tmp_path, command, "glue", "--config_name", data / "model", "--tokenizer_name", data / "model"),
        *("--train_file", data / "train.jsonl", "--validation_file", data / "validation.jsonl", "--do_train"),
        *("--do_eval", "--text_column", "sentence", "--max_steps", "4", "--output_dir", "glue", "--use_cpu"),
    )
    assert (tmp_path / "glue" / "model.safetensors").is_file()


def test_an_editable_install_is_found_from_beside_the_clone(clone: Path, tmp_path: Path) -> None:
    """There, a folder of the package's name lies in the current one: the clone's."""
    scripts = environment(tmp_path / "venv")
    python = scripts / "python"
    run(tmp_path, python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", clone)
    code = "import hf_xgrad; hf_xgrad.XGradConfig; print(hf_xgrad.__file__)"
    found = run(clone.parent, python, "-c", code)
    assert Path(found.strip()) == clone / "hf_xgrad" / "__init__.py"
