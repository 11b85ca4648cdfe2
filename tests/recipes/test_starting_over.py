"""--overwrite_output_dir: what an earlier run left goes, what others put there stays."""

from pathlib import Path
from types import ModuleType

import pytest

from hf_xgrad.outputs.files import left_by_runs
from hf_xgrad.recipes.language import clm
from hf_xgrad.recipes.loop import clm as clm_loop
from run_files import same_weights, write_texts

MODEL = ("--model_type", "gpt2", "--new_tokenizer_size", "270", "--block_size", "13", "--config_overrides",
         "n_embd=16,n_layer=1,n_head=2,n_positions=16")  # fmt: skip
FLAGS = (*MODEL, "--do_train", "--do_eval", "--per_device_train_batch_size", "4", "--max_steps", "2",
         "--save_strategy", "steps", "--save_steps", "1", "--sample_length", "2", "--use_cpu",
         "--disable_tqdm", "true")  # fmt: skip

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags that name training and validation texts."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("script", [clm, clm_loop], ids=["trainer", "loop"])
def test_an_output_folder_is_started_over(
    script: ModuleType, tmp_path: Path, texts: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    assert script.main([*FLAGS, *texts, "--report_to", "tensorboard", "--output_dir", str(out)]) == 0
    # A run leaves nothing that would not be found again.
    left = {path for found in left_by_runs(out) for path in (found, *found.rglob("*"))}
    assert [path for path in out.rglob("*") if path.is_file() and path not in left] == []
    foreign = [
        out / name for name in ("notes.txt", "data.json", "embeddings.bin", "checkpoint-best/model.safetensors")
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    other = (*FLAGS, *texts, "--seed", "7", "--save_strategy", "no")
    assert script.main([*other, "--output_dir", str(out)]) == 2  # another run, without the flag
    with caplog.at_level("INFO"):
        assert script.main([*other, "--overwrite_output_dir", "--output_dir", str(out)]) == 0
    (said,) = [text for text in caplog.messages if text.startswith(f"Starting over in {out}: removed")]
    assert "checkpoint-1" in said
    assert "model.safetensors" in said
    assert all(path.read_text() == "mine" for path in foreign)
    assert not (out / "checkpoint-1").exists()
    assert script.main([*other, "--output_dir", str(fresh)]) == 0
    assert same_weights(out, fresh)


def test_what_a_run_reads_is_not_removed(
    tmp_path: Path, texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert clm.main([*FLAGS, *texts, "--output_dir", str(out)]) == 0
    again = ("--do_train", *texts, "--overwrite_output_dir", "--use_cpu", "--output_dir", str(out))
    for model in (out, out / "checkpoint-2"):
        before = sorted(out.rglob("*"))
        assert clm.main([*again, "--model_name_or_path", str(model)]) == 2
        assert f"would remove what --model_name_or_path {model} is" in capsys.readouterr().err
        assert sorted(out.rglob("*")) == before


def test_only_a_training_starts_over(tmp_path: Path, texts: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    assert clm.main([*FLAGS, *texts, "--output_dir", str(out)]) == 0
    evaluate = ("--do_eval", *texts, "--use_cpu", "--model_name_or_path", str(out), "--output_dir", str(out))
    assert clm.main([*evaluate, "--overwrite_output_dir"]) == 0
    assert (out / "checkpoint-1").is_dir()


def test_wrong_input_removes_nothing(tmp_path: Path, texts: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    assert clm.main([*FLAGS, *texts, "--output_dir", str(out)]) == 0
    before = sorted(out.rglob("*"))
    (tmp_path / "empty.txt").write_text("")
    wrong = (*FLAGS, "--train_file", str(tmp_path / "empty.txt"), "--overwrite_output_dir", "--output_dir", str(out))
    assert clm.main([*wrong]) == 2
    assert sorted(out.rglob("*")) == before
