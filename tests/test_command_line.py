"""The command `hf-xgrad`, which `python -m hf_xgrad` is, too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hf_xgrad
from hf_xgrad import cli as command_line
from hf_xgrad.recipes.results import text_table

ROOT = Path(hf_xgrad.__file__).resolve().parent.parent
ROWS = command_line.read_table()["optimizers"]


def test_as_a_user_runs_it(tmp_path: Path) -> None:
    """From another folder, with wrong input: one line and status 2."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hf_xgrad", "optimizers", "--optim", "adamw_troch"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.strip().splitlines()[-1].startswith("hf-xgrad: error: --optim adamw_troch: no such name;")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command_line.main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [60, 80, 120, 400])
def test_table_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """And has every row, whatever is broken over lines."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = output(capsys, "optimizers")
    assert max(len(line) for line in text.splitlines()[:-1]) <= width
    for row in ROWS:
        # Names with spaces may be broken over lines.
        assert row["name"].split()[0][:8] in text
    for source in {row["source"] for row in ROWS}:
        assert f"\n{source}\n" in text


def test_counts(capsys: pytest.CaptureFixture[str]) -> None:
    last = output(capsys, "optimizers").splitlines()[-1]
    for rule in {row["rule"] for row in ROWS}:
        assert f"{sum(row['rule'] == rule for row in ROWS)} {rule}" in last


def test_names_of_optim(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "optimizers", "--json", "--optim", "adafactor", "lomo"))["optimizers"]
    assert [(row["source"], row["name"]) for row in found] == [("--optim", "adafactor"), ("--optim", "lomo")]
    assert {row["rule"] for row in found} == {"last update", "refused"}


def test_filter(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, "optimizers", "--json", "LOOKAHEAD"))["optimizers"]
    assert found
    assert all("lookahead" in " ".join(map(str, row.values())).lower() for row in found)
    assert len(found) < len(ROWS)


def test_json_is_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = json.loads(output(capsys, "optimizers", "--json"))
    assert table["versions"] == command_line.read_table()["versions"]
    assert [{key: value for key, value in row.items() if key != "missing"} for row in table["optimizers"]] == ROWS


def test_missing_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Named where they are needed, and nowhere else."""

    def version(package: str) -> str:
        if package == "galore-torch":
            raise metadata.PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(command_line.metadata, "version", version)
    rows = json.loads(output(capsys, "optimizers", "--json"))["optimizers"]
    for row in rows:
        assert row["missing"] == (["galore-torch"] if "galore-torch" in row["install"] else [])
    monkeypatch.setenv("COLUMNS", "400")
    assert "pip install galore-torch" in output(capsys, "optimizers", "--optim", "galore_adamw")
    assert "pip install" not in output(capsys, "optimizers", "--optim", "adamw_8bit")


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["optimizers", "--optim", "adamw_troch"], "adamw_torch"),
        (["optimizers", "--optim", "sgd", "nothing"], "nothing"),
        (["optimizers", "no such text"], "no such text"),
        (["plot", "no_such_run"], "no_such_run: no such file or folder"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], culprit: str) -> None:
    assert command_line.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert culprit in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *(["optimisers"], ["optimizers", "text", "--optim", "sgd"], ["env", "more"]),
        *(["plot"], ["plot", "run", "--json"], ["plot", "run", "-o"]),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main(arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions and settings; nothing of the user's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/somebody/cache")
    text = output(capsys, "env")
    facts = json.loads(output(capsys, "env", "--json"))
    assert facts["hf_xgrad"] == hf_xgrad.__version__
    for package in ("torch", "transformers", "accelerate", "safetensors"):
        assert facts["versions"][package] == metadata.version(package)
        assert metadata.version(package) in text
    assert facts["XGradConfig"]["rule"] == hf_xgrad.XGradConfig().rule
    assert facts["variables"]["OMP_NUM_THREADS"] == "1"
    for shown in (text, json.dumps(facts)):
        assert "hf_secret" not in shown
        assert "/home" not in shown
        assert str(Path.home()) not in shown


def test_env_without_optional_libraries(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "is_installed", lambda package: False)
    assert json.loads(output(capsys, "env", "--json"))["optional"] == {}


def test_the_table_needs_no_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read from the package; nothing heavy is imported for it, whatever is installed."""
    before = set(sys.modules)
    output(capsys, "optimizers")
    assert {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) <= {
        *("hf_xgrad", "rich", "pygments"),
    }


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_tables_have_no_colours_and_markup_is_text(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Wherever they go; and what is in square brackets is no style."""
    monkeypatch.setenv(variable, "1")
    shown = text_table({"a": {}, "b": {"no_wrap": True}}, [("[bold]x[/bold]", ":smile:"), ("y" * 30, "\\[z]")], 20)
    assert shown.splitlines() == [
        "a            b", "--------------------", "[bold]x[/bo  :smile:", "ld]", "yyyyyyyyyyy  \\[z]",
        "yyyyyyyyyyy", "yyyyyyyy",
    ]  # fmt: skip


# ---- the commands ----

COMMANDS = ("glue", "clm", "mlm", "glue-loop", "clm-loop", "sweep", "demo", "plot", "push", "optimizers", "env")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_all_commands_are_listed(arguments: list[str]) -> None:
    """At once: what takes seconds to import is not needed for that."""
    code = f"""
import sys
from hf_xgrad.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib"}} & set(sys.modules)
print("heavy:", sorted(heavy))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *text, heavy = shown.stdout.splitlines()
    assert heavy == "heavy: []"
    listed = [line.split()[0] for line in text if re.match(r" {4}[a-z]", line)]
    assert listed == list(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command_line.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"hf_xgrad {hf_xgrad.__version__}\n"


@pytest.mark.parametrize("name", command_line.RECIPES)
def test_each_recipe_has_flags_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And wrong ones are answered in one line, by the name that was called."""
    with pytest.raises(SystemExit) as end:
        command_line.main([name, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: hf-xgrad {name} ")
    assert "--output_dir" in shown


@pytest.mark.parametrize("name", [name for name in command_line.RECIPES if name not in ("sweep", "demo")])
def test_unknown_flags_are_named(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command_line.main([name, "--output_dir", str(tmp_path / "out"), "--lerning_rate", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-xgrad {name}: error: unknown argument --lerning_rate; did you mean --learning_rate")


@pytest.mark.parametrize(
    ("words", "interrupted", "said"),
    [
        # Even before the command begins: to import what it needs takes seconds.
        (["glue", "--help"], "hf_xgrad.cli.import_module", "glue: stopped; the same command goes on from the last"),
        (
            ["demo", "--output_dir", "out"],
            "hf_xgrad.recipes.demo.write_data_set",
            "demo: stopped; the same",
        ),
        (
            ["sweep", "--learning_rates", "1", "--output_dir", "out"],
            "hf_xgrad.recipes.sweep._value",
            "sweep: stopped;",
        ),
        (["plot", "."], "hf_xgrad.outputs.plots.plot_folders", ": stopped"),
        (["push", "."], "hf_xgrad.outputs.hub.push", ": stopped"),
        (["optimizers"], "hf_xgrad.cli.read_table", ": stopped"),
        (["env"], "hf_xgrad.cli.environment", ": stopped"),
    ],
)
def test_ctrl_c_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], interrupted: str, said: str,
) -> None:  # fmt: skip
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interrupted, interrupt)
    assert command_line.main(words) == 130
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.removeprefix("hf-xgrad").lstrip().startswith(said)
    assert ("checkpoint" in line) == (words[0] in ("glue", "sweep"))


# ---- push ----


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("nowhere", None, "there is no folder"),
        ("run", ("config.json",), "holds no model to push"),
        ("checkpoint-4", ("config.json", "model.safetensors"), "is a checkpoint; the folder of the run is"),
    ],
)
def test_what_cannot_be_pushed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, files: tuple[str, ...] | None, said: str
) -> None:
    folder = tmp_path / name
    if files is not None:
        folder.mkdir()
        for file in files:
            (folder / file).write_text("{}")
    assert command_line.main(["push", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf-xgrad: error: {folder} was not pushed: ")
    assert said in line
