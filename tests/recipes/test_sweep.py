"""sweep.py: which runs it starts, what it makes of their results, and one small sweep from end to end."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_xgrad.recipes import sweep
from hf_xgrad.recipes.classification import glue as run_glue
from hf_xgrad.recipes.language import clm as run_clm
from hf_xgrad.recipes.language import modeling as language_modeling
from hf_xgrad.recipes.sweep import Point

LOSSES = {
    (rate, steps, seed): 2 + rate * 10 - (0.1 * seed - 0.2) * steps
    for rate in (0.01, 0.02)
    for steps in (0.0, 1.0, 2.0)
    for seed in (1, 2, 3)
}
GRID = ("--learning_rates", "0.01", "0.02", "--xgrad_steps", "0", "1", "2", "--seeds", "1", "2", "3")


class StandIn:
    """In place of a script: leaves a loss that its settings decide, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.stop_at: int | None = None

    def main(self, arguments: Sequence[str]) -> int:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(list(arguments))
        given = dict(zip(arguments[-8::2], arguments[-7::2], strict=True))
        place = (float(given["--learning_rate"]), float(given["--xgrad_steps"]), int(given["--seed"]))
        folder = Path(given["--output_dir"])
        folder.mkdir()
        (folder / "eval_results.json").write_text(json.dumps({"eval_loss": LOSSES[place], "eval_perplexity": 7.5}))
        return 0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(run_clm, "main", stand_in.main)
    return stand_in


def run(folder: Path, *arguments: str) -> int:
    return sweep.main(["--output_dir", str(folder), *arguments])


def found(folder: Path) -> dict[tuple[float, float, int], float]:
    rows = json.loads((folder / "sweep.json").read_text())
    return {(row["learning_rate"], row["steps"], row["seed"]): row["loss"] for row in rows}


def size_of(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:])
    return width, height


def test_every_point_of_the_grid_is_run_once(
    tmp_path: Path, script: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *GRID, "--", "--do_train", "--warmup_steps", "2") == 0
    assert all(arguments[:3] == ["--do_train", "--warmup_steps", "2"] for arguments in script.asked)
    given = [dict(zip(arguments[3::2], arguments[4::2], strict=True)) for arguments in script.asked]
    points = [(float(g["--learning_rate"]), float(g["--xgrad_steps"]), int(g["--seed"])) for g in given]
    assert sorted(points) == sorted(LOSSES)
    assert len({g["--output_dir"] for g in given}) == len(LOSSES)
    assert all(Path(g["--output_dir"]).parent == tmp_path / "out" for g in given)
    assert found(tmp_path / "out") == LOSSES
    width, height = size_of(tmp_path / "out" / "sweep.png")
    assert 300 < height < width < 1500
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("0.0")]
    # At s, the losses of the seeds 1, 2 and 3 lie 0.1 s above, at, and 0.1 s below the one of s = 0.
    differences = ["+0.0000", "1", "of", "3", "seeds"]
    assert table == [
        ["0.01", "0", "2.1000", "2.1000", "2.1000", "-", "-"],
        ["0.01", "1", "2.1000", "2.0000", "2.2000", *differences],
        ["0.01", "2", "2.1000", "1.9000", "2.3000", *differences],
        ["0.02", "0", "2.2000", "2.2000", "2.2000", "-", "-"],
        ["0.02", "1", "2.2000", "2.1000", "2.3000", *differences],
        ["0.02", "2", "2.2000", "2.0000", "2.4000", *differences],
    ]


@pytest.mark.parametrize("fixed", [("0", "1"), ()], ids=["beside fixed", "alone"])
def test_auto_is_one_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fixed: tuple[str, ...]
) -> None:
    """With a line of its own in the table, across the plot, and in the folder's name."""
    losses = {"0.0": 3.0, "1.0": 2.5, "auto": 2.25}

    def main(arguments: Sequence[str]) -> int:
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        folder = Path(given["--output_dir"])
        folder.mkdir()
        (folder / "eval_results.json").write_text(json.dumps({"eval_loss": losses[given["--xgrad_steps"]]}))
        return 0

    monkeypatch.setattr(run_clm, "main", main)
    out = tmp_path / "out"
    assert run(out, "--learning_rates", "0.01", "--xgrad_steps", *fixed, "auto", "--seeds", "1") == 0
    assert found(out)[0.01, "auto", 1] == 2.25
    assert (out / "lr=0.01,s=auto,seed=1").is_dir()
    size_of(out / "sweep.png")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("0.01")]
    compared = ["-0.7500", "1", "of", "1", "seeds"] if fixed else ["-", "-"]
    assert rows[-1] == ["0.01", "auto", "2.2500", "2.2500", "2.2500", *compared]


@pytest.mark.parametrize("steps", ["many", "-1", "nan", "AUTO"])
def test_wrong_steps_are_named_before_anything_runs(
    tmp_path: Path, script: StandIn, capsys: pytest.CaptureFixture[str], steps: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", "--learning_rates", "0.01", f"--xgrad_steps={steps}", "--seeds", "1")
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "xgrad_steps=" in error
    assert "'auto'" in error
    assert not script.asked


def test_the_table_compares_seed_by_seed() -> None:
    values = {
        Point(0.1, 0.0, 1): 5.0,
        Point(0.1, 0.0, 2): 3.0,
        Point(0.1, 0.0, 4): 2.0,
        Point(0.1, 0.5, 1): 4.0,
        Point(0.1, 0.5, 2): 3.5,
        Point(0.1, 0.5, 3): 1.0,
        Point(0.1, 0.5, 4): 1.7,
        Point(0.2, 2.0, 1): 9.0,
    }
    rows = {tuple(row[:2]): row[2:] for row in sweep._rows(values)}
    assert rows["0.1", "0"] == [pytest.approx(10 / 3), 2.0, 5.0, None, None]
    # The third seed has nothing to be compared with.
    assert rows["0.1", "0.5"] == [pytest.approx(10.2 / 4), 1.0, 4.0, "-0.2667", "2 of 3 seeds"]
    assert rows["0.2", "2"] == [9.0, 9.0, 9.0, None, None]


def test_a_sweep_that_was_cut_off_goes_on(tmp_path: Path, script: StandIn) -> None:
    script.stop_at = 7
    assert run(tmp_path / "out", *GRID) == 130
    assert not (tmp_path / "out" / "sweep.json").exists()
    script.stop_at = None
    assert run(tmp_path / "out", *GRID) == 0
    assert len(script.asked) == len({tuple(arguments) for arguments in script.asked}) == len(LOSSES)
    assert found(tmp_path / "out") == LOSSES
    assert run(tmp_path / "out", *GRID) == 0
    assert len(script.asked) == len(LOSSES)
    # Another metric, or a smaller grid, of the same runs.
    assert run(tmp_path / "out", *GRID[:2], "--seeds", "3", "--xgrad_steps", "1", "--metric", "perplexity") == 0
    assert len(script.asked) == len(LOSSES)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text()) == [
        {"learning_rate": 0.01, "steps": 1.0, "seed": 3, "perplexity": 7.5}
    ]


def test_other_flags_or_another_script_need_another_folder(
    tmp_path: Path, script: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--learning_rates", "0.01", "--xgrad_steps", "0", "--seeds", "1")
    assert run(tmp_path, *short, "--", "--do_train") == 0
    for arguments in ((*short, "--", "--do_train", "--bf16"), (*short,), ("mlm", *short, "--", "--do_train")):
        assert run(tmp_path, *arguments) == 2
        assert "holds a sweep with other settings (sweep_settings.json)" in capsys.readouterr().err
    assert len(script.asked) == 1


def test_a_run_that_fails_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run_glue, "main", lambda arguments: asked.append(arguments) or 2)
    with pytest.raises(SystemExit, match="2"):
        sweep.main(["run_glue.py", *GRID, "--output_dir", str(tmp_path)])
    assert len(asked) == 1
    assert not (tmp_path / "sweep.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "1", "1"), "must not name a value twice"),
        (("--xgrad_steps", "1", "1.0"), "must not name a value twice"),
        # They would share their folders.
        (("--learning_rates", "0.01", "0.0100000001"), "must not name a value twice"),
        (("--metric", "los"), "--metric los: the evaluation has none; did you mean loss?"),
    ],
)
def test_wrong_input(
    tmp_path: Path,
    script: StandIn,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, *GRID, *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("hf-xgrad sweep: error: ")
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (("--no_xgrad",), "no_xgrad"),
        (("--xgrad=false",), "xgrad"),
        (("--seed", "5"), "seed"),
        (("--learning_rate=1e-3",), "learning_rate"),
        (("--xgrad_steps", "2"), "xgrad_steps"),
        (("--output_dir", "elsewhere"), "output_dir"),
        (("--baseline",), "baseline"),
    ],
)
def test_what_the_sweep_decides_is_not_for_the_script(
    tmp_path: Path, script: StandIn, flag: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(f"do_train: true\n{name}: 1\n")
    for flags in (("--do_train", *flag), (str(file),)):
        assert run(tmp_path / "out", *GRID, "--", *flags) == 2
        assert f"hf-xgrad sweep: error: --{name} is not for the flags after `--`" in capsys.readouterr().err
    assert not script.asked
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path, script: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "out", *GRID) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err
    assert not script.asked


def test_unknown_scripts_and_no_learning_rates_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["run_swag.py", *GRID], ["--seeds", "1"], [*GRID, "--seed", "1"]):
        with pytest.raises(SystemExit, match="2"):
            sweep.main([*arguments, "--output_dir", str(tmp_path)])
        assert "hf-xgrad sweep: error: " in capsys.readouterr().err


def test_a_small_sweep_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Alan saw the {number} things that he did not say .\n" for number in range(40)]
    monkeypatch.setattr(language_modeling, "load_texts", lambda: (texts, texts[:9]))
    trained = []
    original = language_modeling.train
    monkeypatch.setattr(
        language_modeling, "train", lambda trainer, checkpoint: trained.append(trainer.args) or original(trainer, None)
    )
    tiny = ("--config_overrides", "n_embd=16,n_layer=1,n_head=2,n_positions=24", "--new_tokenizer_size", "290",
            "--block_size", "16", "--sample_length", "3", "--max_steps", "3", "--save_strategy", "no", "--model_type",
            "gpt2", "--do_train", "--do_eval", "--train_file", str(tmp_path / "t.txt"), "--use_cpu", "--disable_tqdm",
            "true", "--report_to", "none", "--cache_dir", str(tmp_path / "cache"))  # fmt: skip
    (tmp_path / "t.txt").write_text("".join(texts))
    grid = ("--learning_rates", "0.01", "--xgrad_steps", "0", "1.5", "--seeds", "4", "5")
    assert run(tmp_path / "out", *grid, "--", *tiny) == 0
    settings = [(args.learning_rate, args.xgrad_steps, args.seed) for args in trained]
    assert settings == [(0.01, 0.0, 4), (0.01, 0.0, 5), (0.01, 1.5, 4), (0.01, 1.5, 5)]
    losses = found(tmp_path / "out")
    assert set(losses) == set(settings)
    assert len(set(losses.values())) == 4
    for point, loss in losses.items():
        results = tmp_path / "out" / str(Point(*point)) / "eval_results.json"
        assert json.loads(results.read_text())["eval_loss"] == loss
    size_of(tmp_path / "out" / "sweep.png")
    assert "Run 4 of 4: lr=0.01,s=1.5,seed=5" in capsys.readouterr().out
