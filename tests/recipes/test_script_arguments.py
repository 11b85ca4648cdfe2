"""Flags, configuration files and the one-line errors of the scripts."""

import dataclasses
import json
from pathlib import Path

import pytest

from hf_xgrad import XGradTrainingArguments
from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.recipes.input_errors import InputError, one_line, run_script
from hf_xgrad.recipes.loop.arguments import LoopArguments


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    count: int = 1
    name: str | None = None
    words: list[str] | None = None
    strategy: str = "yes"
    loud: bool = False
    resume: bool = True

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"--count must not\n  be negative: {self.count}")


def parse(*arguments: str) -> Settings:
    return ScriptParser(Settings, prog="x.py", description="x").parse(arguments)[0]


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_flags_are_typed_by_the_dataclass() -> None:
    settings = parse("--rate", "2e-5", "--words", "a", "b", "--loud", "--no_resume")
    assert settings == Settings(rate=2e-5, words=["a", "b"], loud=True, resume=False)


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-5", "0.00001", "+1e-5", "1.e-5"])
def test_yaml_numbers_arrive_as_numbers(tmp_path: Path, number: str) -> None:
    assert parse(written(tmp_path, "s.yaml", f"rate: {number}\n")).rate == 1e-5


def test_yaml_words_that_look_like_booleans_stay_words(tmp_path: Path) -> None:
    text = "strategy: no\nname: off\nloud: yes\nresume: false\nwords: [on, 1e-5x, 2020-01-01]\n"
    expected = Settings(strategy="no", name="off", loud=True, resume=False, words=["on", "1e-5x", "2020-01-01"])
    assert parse(written(tmp_path, "s.yml", text)) == expected


def test_yaml_numbers_within_a_mapping_are_numbers(tmp_path: Path) -> None:
    text = (
        "output_dir: x\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}\neval_strategy: no"
    )
    parser = ScriptParser(XGradTrainingArguments, prog="x.py", description="x")
    args = parser.parse([written(tmp_path, "s.yaml", text)])[0]
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert args.eval_strategy == "no"


def test_null_leaves_the_default(tmp_path: Path) -> None:
    assert parse(written(tmp_path, "s.yaml", "rate: null\nname: ~\ncount:\n")) == Settings()


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    given = {"rate": 1e-5, "count": 3, "name": "-x y", "words": ["a", "b c"], "loud": True, "resume": False}
    as_json = parse(written(tmp_path, "s.json", json.dumps(given)))
    as_yaml = parse(written(tmp_path, "s.yaml", "\n".join(f"{k}: {json.dumps(v)}" for k, v in given.items())))
    assert as_json == as_yaml == Settings(**given)


def test_flags_after_the_file_override_it(tmp_path: Path) -> None:
    path = written(tmp_path, "s.yaml", "count: 3\nrate: 1\nno_resume: true\n")
    assert parse(path, "--count", "4") == Settings(count=4, rate=1.0, resume=False)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cuont", "3"], "unknown argument --cuont; did you mean --count?"),
        (["--cuont=3"], "unknown argument --cuont; did you mean --count?"),
        (["--rat", "3"], "unknown argument --rat"),  # no abbreviations
        (["3"], "unexpected argument '3'"),
        (["--count", "three"], "--count: invalid int value: 'three'"),
        (["--rate", "1e-5x"], "--rate: invalid float value: '1e-5x'"),
        (["--loud", "maybe"], "maybe"),
        (["--count", "-1"], "--count must not be negative: -1"),
        (["nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_flags_are_named(arguments: list[str], named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("s.yaml", "rate: 1\ncuont: 3\n", "s.yaml: unknown key 'cuont'; did you mean count?"),
        ("s.json", '{"cuont": 3}', "s.json: unknown key 'cuont'; did you mean count?"),
        ("s.yaml", "rate: 1\ncount: [1\n", "s.yaml, line 3"),
        ("s.json", '{\n"rate": 1,\n}', "s.json, line "),
        ("s.yaml", "- rate\n", "s.yaml does not hold settings"),
        ("s.json", "3", "s.json does not hold settings"),
        ("s.yaml", "", "s.yaml does not hold settings"),
        ("s.yaml", "rate: fast\n", "--rate: invalid float value: 'fast'"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(written(tmp_path, name, text))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_bytes(b"rate: \xff\n")
    with pytest.raises(InputError, match=r"cannot read .*s\.yaml"):
        parse(str(tmp_path / "s.yaml"))


def test_input_errors_become_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def body(arguments: list[str]) -> None:
        raise InputError("no\n such thing")

    assert run_script("x.py", body, []) == 2
    assert capsys.readouterr().err == "x.py: error: no such thing\n"


def test_other_errors_pass_through() -> None:
    def body(arguments: list[str]) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script("x.py", body, [])


def test_status_0_and_the_arguments() -> None:
    seen: list[list[str]] = []
    assert run_script("x.py", seen.append, ("a", "b")) == 0
    assert seen == [["a", "b"]]


def test_one_line() -> None:
    assert one_line(ValueError(" a\n\t b ")) == "a b"


@pytest.mark.parametrize("kind", [XGradTrainingArguments, LoopArguments])
@pytest.mark.parametrize(
    ("flags", "intervals"),
    [
        ([], (10, 500)),
        (["--logging_steps", "50"], (50, 50)),
        (["--logging-steps=10"], (10, 10)),
        (["--eval_steps", "20"], (10, 20)),
        (["--logging_steps", "0.5", "--eval_steps", "0.25"], (0.5, 0.25)),
    ],
)
def test_a_small_run_is_logged(kind: type, flags: list[str], intervals: tuple[float, float], tmp_path: Path) -> None:
    """More often than by Transformers' 500 steps; how often it is evaluated is not touched."""
    parser = ScriptParser(kind, prog="x.py", description="x")
    args = parser.parse(["--output_dir", str(tmp_path), "--eval_strategy", "steps", *flags])[0]
    assert (args.logging_steps, args.eval_steps) == intervals
    shown = " ".join(parser.format_help().split())
    assert "Transformers' own default is 500" in shown
    assert "Where neither is given, every 500 steps" in shown
