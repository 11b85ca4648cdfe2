"""Flags, configuration files and the one-line errors of the scripts."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from hf_xgrad import XGradTrainingArguments
from hf_xgrad.recipes.arguments import HABITS, ModelArguments, RunArguments, ScriptParser
from hf_xgrad.recipes.classification.data import DataArguments
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


@pytest.mark.parametrize("given", ["{} --count 4", "--config {} --count 4", "--count 4 --config {}", "--config={}"])
def test_a_config_file_comes_first_or_after_its_flag(tmp_path: Path, given: str) -> None:
    path = written(tmp_path, "s.yaml", "count: 3\nrate: 1\n")
    count = 4 if "--count" in given else 3
    assert parse(*given.format(path).split()) == Settings(count=count, rate=1.0)


def test_a_config_file_after_its_flag_needs_no_ending(tmp_path: Path) -> None:
    assert parse("--config", written(tmp_path, "settings", "count: 3\n")).count == 3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config"], "--config needs the name of a file"),
        (["--config", "nowhere.yaml"], "cannot read nowhere.yaml: No such file or directory"),
        (["{}", "--config", "{}"], "one config file"),
        (["--config", "{}", "--config={}"], "one config file"),
    ],
)
def test_wrong_config_flags_are_named(tmp_path: Path, arguments: list[str], named: str) -> None:
    path = written(tmp_path, "s.yaml", "count: 3\n")
    with pytest.raises(InputError, match=named):
        parse(*(word.format(path) for word in arguments))


# ---- help ----


@pytest.fixture
def recipe() -> ScriptParser:
    kinds = (ModelArguments, DataArguments, RunArguments, XGradTrainingArguments)
    return ScriptParser(*kinds, prog="x.py", description="x")


def test_help_has_a_group_for_each_kind_of_flags(recipe: ScriptParser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = recipe.format_help()
    usage, *groups = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    assert "[settings.yaml]" in usage
    assert groups[::2] == ["options", "XGrad", "data", "model", "run", "training"]
    shown = {title: re.findall(r"^  (?:-h, )?--(\w+)", flags, re.MULTILINE) for title, flags in
             zip(groups[::2], groups[1::2], strict=True)}  # fmt: skip
    assert shown["options"] == ["help", "config"]
    assert shown["XGrad"] == ["xgrad", "no_xgrad", "xgrad_steps", "xgrad_rule", "xgrad_weight_decay"]
    assert "task_name" in shown["data"]
    assert "model_name_or_path" in shown["model"]
    assert shown["run"] == ["resume", "no_resume", "overwrite_output_dir", "baseline"]
    assert "learning_rate" in shown["training"]


def test_help_shows_each_flag_once(recipe: ScriptParser) -> None:
    """And both ways to write it are taken."""
    text = recipe.format_help()
    assert re.findall(r"^ +--[a-z_]+-.*", text, re.MULTILINE) == []
    flags = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags))
    words = ["--task_name", "mrpc", "--output_dir", "x"]
    assert recipe.parse([*words, "--weight-decay=1", "--no-resume"]) == recipe.parse(
        [*words, "--weight_decay", "1", "--no_resume"]
    )


# ---- flags of other scripts ----


def test_flags_that_mean_the_same_are_taken(recipe: ScriptParser, tmp_path: Path) -> None:
    words = ["--task_name", "WNLI", "--output_dir", "x", "--use_cpu"]
    theirs = ["--max_train_steps=7", "--num_warmup_steps", "2", "--max_length", "64", "--metric-name", "f1"]
    ours = ["--max_steps", "7", "--warmup_steps", "2", "--max_seq_length", "64", "--metrics", "f1"]
    assert recipe.parse([*words, *theirs]) == recipe.parse([*words, *ours])
    path = written(tmp_path, "s.yaml", "max_train_steps: 7\nnum_warmup_steps: 2\n")
    assert recipe.parse([path, *words]) == recipe.parse([*words, *ours[:4]])
    assert {"max_steps", "warmup_steps"} <= recipe.given([path, *words])


@pytest.mark.parametrize("name", [name for name, habit in HABITS.items() if " " in habit])
def test_others_are_answered_with_what_does_it(recipe: ScriptParser, name: str, tmp_path: Path) -> None:
    for words in (
        f"--{name} 1",
        f"--{name}=1",
        f"--{name.replace('_', '-')} 1",
        written(tmp_path, "s.yaml", f"{name}: 1"),
    ):
        with pytest.raises(InputError, match=re.escape(f" here: {HABITS[name]}")) as caught:
            recipe.parse(words.split())
        assert name in str(caught.value).replace("-", "_")


def test_what_is_answered_is_true(recipe: ScriptParser) -> None:
    """No flag that there is is refused, and all that are named are there."""
    options = set(recipe._option_string_actions)
    assert {f"--{name}" for name in HABITS}.isdisjoint(options)
    for habit in HABITS.values():
        named = re.findall(r"--\w+", habit) if " " in habit else [f"--{habit}"]
        assert set(named) <= options, habit


@pytest.mark.parametrize("name", ["WNLI", "SST-2", "CoLA", "sts-b"])
def test_tasks_in_capitals(name: str) -> None:
    assert DataArguments(task_name=name).task is DataArguments(task_name=name.lower().replace("-", "")).task


# ---- wrong ones ----


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
