"""What `make demo` runs, cut short; the whole of it is a slow test in test_acceptability.py."""

from pathlib import Path

import pytest

from hf_xgrad.recipes import demo

SHORT = ("--max_steps", "4", "--disable_tqdm", "true", "--use_cpu")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "DATA", {"train_pairs": 200, "validation_pairs": 21, "seed": 0})


def test_it_shows_both_runs_and_the_majority_and_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    for _ in range(2):
        assert demo.main(["--output_dir", str(folder), *SHORT]) == 0
        table = capsys.readouterr().out.splitlines()
        rows = {line[: len("plain optimizer")].strip(): line.split()[-2:] for line in table}
        assert {"XGrad", "plain optimizer"} <= rows.keys()
        assert rows["majority guess"] == ["0.5000", "0.0000"]
        assert table[-1] == f"Loss curves: {folder / 'loss.png'}"
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_it_replaces_nothing_but_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "mine.txt", tmp_path / "mine.txt" / "demo"):
        assert demo.main(["--output_dir", str(folder), *SHORT]) == 2
        assert capsys.readouterr().err.startswith(f"hf-xgrad demo: error: --output_dir {folder} ")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_further_flags_are_checked_by_glue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--output_dir", str(tmp_path / "demo"), "--sede", "3"])
    assert caught.value.code == 2
    assert "unknown argument --sede; did you mean --seed" in capsys.readouterr().err
