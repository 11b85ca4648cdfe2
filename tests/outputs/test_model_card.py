"""Model cards: the Trainer's own is kept and completed, the Hub takes its metadata, the code in it runs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import Trainer

import tiny_models as tiny
from hf_xgrad import XGradConfig, XGradTrainer, XGradTrainingArguments
from hf_xgrad.outputs.files import CARD_FILE, PICTURE_FILE
from hf_xgrad.outputs.model_card import TrainedModel, add_comparison, complete_card
from hf_xgrad.outputs.stock_card import TAGS, is_hub_id, naming_hub_models_only

GLUE = {"tasks": "text-classification", "dataset": "GLUE COLA", "dataset_tags": "nyu-mll/glue", "dataset_args": "cola"}
ACCURACY = 0.75


def make(folder: Path, cls: type = XGradTrainer, model: Any = None, **settings: Any) -> Any:
    args = tiny.arguments(
        folder, XGradTrainingArguments, max_steps=4, **{"eval_strategy": "steps", "eval_steps": 2, **settings}
    )
    return cls(
        model=tiny.bert() if model is None else model,
        args=args,
        train_dataset=tiny.Sentences(16),
        eval_dataset=tiny.Sentences(8),
        compute_metrics=lambda _: {"accuracy": ACCURACY},
    )


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, text = (folder / CARD_FILE).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def trained(folder: Path, model: Any = None, **settings: Any) -> Any:
    trainer = make(folder, model=model, **settings)
    trainer.train()
    trainer.save_model()
    return trainer


def headings(text: str) -> list[str]:
    return re.findall(r"^##? .*", text, flags=re.MULTILINE)


# ---- what the card says ----


def test_the_card_says_how_the_model_was_trained(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", optim="adamw_torch")
    trainer.create_model_card(**GLUE)
    card, text = card_of(tmp_path / "run")
    assert headings(text) == [
        *("# run", "## How to use", "## XGrad", "## Training curves", "## Training procedure", "## Citation"),
    ]
    for line in (
        *("| optimizer | AdamW |", "| steps predicted ahead, s | 1 (default) |", "| rule | closed form of AdamW |"),
        *(f"- Transformers {transformers.__version__}", "- hf_xgrad 0.1.0", "https://arxiv.org/abs/2305.18240"),
        *("@article{guan2024xgrad,", f"steps]({PICTURE_FILE})"),
    ):
        assert line in text
    assert re.search(r"\| cosine of predicted and made step \| -?\d\.\d\d \(mean of 3 logged steps\) \|", text)
    assert "More information needed" not in text
    assert card["library_name"] == "transformers"
    assert set(TAGS) <= set(card["tags"])
    assert len(card["tags"]) == len(set(card["tags"]))
    with Image.open(tmp_path / "run" / PICTURE_FILE) as picture:
        assert picture.width > 400


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({"optim": "adafactor"}, "| rule | last update |"),
        ({"optim": "adamw_torch", "xgrad_rule": "last_update"}, "| rule | last update |"),
        ({"optim": "adamw_torch", "xgrad_rule": "closed_form"}, "| rule | closed form |"),
        ({"optim": "sgd", "optim_args": "momentum=0.9", "xgrad_steps": 2.5}, "| steps predicted ahead, s | 2.5 |"),
        ({"optim": "adafactor", "xgrad_steps": 1.0}, "| steps predicted ahead, s | 1 |"),
        ({"optim": "adamw_torch", "xgrad_weight_decay": True}, "| decoupled weight decay | predicted too |"),
    ],
)
def test_settings_are_those_of_the_run(tmp_path: Path, settings: dict[str, Any], row: str) -> None:
    trained(tmp_path, **settings).create_model_card()
    assert row in card_of(tmp_path)[1]


@pytest.mark.parametrize(
    "settings", [{"optim": "adamw_torch", "xgrad_steps": "auto"}, {"optim": "adafactor"}], ids=str
)
def test_a_chosen_s_is_told(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Asked for, or by default under the last-update rule."""
    trainer = trained(tmp_path, **settings)
    trainer.create_model_card()
    last = [entry["xgrad/steps"] for entry in trainer.state.log_history if "xgrad/steps" in entry][-1]
    assert f"| steps predicted ahead, s | auto (last: {last:.2f}) |" in card_of(tmp_path)[1]


def test_an_optimizer_of_both_rules_says_which_groups_have_which(tmp_path: Path) -> None:
    model = tiny.bert()
    groups = [{"params": [p]} for p in model.parameters()]
    groups[0]["momentum"] = 0.0
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    (tmp_path / CARD_FILE).write_text("---\nlibrary_name: transformers\n---\n\n# x\n")
    complete_card(tmp_path, TrainedModel(XGradConfig(), model, "x", optimizer))
    number = len(groups)
    expected = f"| rule | closed form for {number - 1} of {number} parameter groups, last update for the others |"
    assert expected in card_of(tmp_path)[1]


@pytest.mark.parametrize("xgrad", [True, False])
def test_nothing_of_the_trainers_card_is_lost_but_its_placeholders(tmp_path: Path, xgrad: bool) -> None:
    trainer = trained(tmp_path, xgrad=xgrad)
    Trainer.create_model_card(trainer, **GLUE)
    stock_card, stock = card_of(tmp_path)
    trainer.create_model_card(**GLUE)
    card, text = card_of(tmp_path)
    placeholders = (
        "More information needed",
        "## Model description",
        "## Intended uses",
        "## Training and evaluation",
    )
    lines = [line for line in stock.splitlines() if line.strip() and not line.startswith(placeholders)]
    # A model from scratch: stock links to nothing.
    lines = [
        line.replace("OptimizerNames.ADAMW_TORCH_FUSED", "adamw_torch_fused")
        for line in lines
        if "[](https" not in line
    ]
    assert len(lines) > 20
    assert [line for line in text.splitlines() if line in lines] == lines
    assert {"library_name", "datasets", "metrics", "tags"} <= set(stock_card)
    for key in set(stock_card) - {"tags", "model-index"}:
        assert card[key] == stock_card[key]
    assert set(stock_card["tags"]) <= set(card["tags"])
    assert ("xgrad" in card["tags"]) == xgrad
    assert ("## XGrad" in text) == xgrad
    assert ("guan2024" in text) == xgrad


@pytest.mark.parametrize(("optim", "eps"), [("adam3", "1e-16"), ("adamw_torch", "1e-08")])
def test_the_epsilon_is_that_of_the_optimizer(tmp_path: Path, optim: str, eps: str) -> None:
    trainer = trained(tmp_path, optim=optim)
    trainer.create_model_card()
    assert f" with betas=(0.9,0.999) and epsilon={eps} and" in card_of(tmp_path)[1]


@pytest.mark.parametrize("counted", ["non_padding", "no"])
def test_all_evaluations_are_in_the_table(tmp_path: Path, counted: str) -> None:
    trainer = trained(tmp_path, include_num_input_tokens_seen=counted)
    for log in (trainer.state.log_history, [e for e in trainer.state.log_history if "train_loss" not in e]):
        trainer.state.log_history = log
        trainer.create_model_card()
        _, table = card_of(tmp_path)[1].split("### Training results\n\n")
        steps = [line.split("|")[3].strip() for line in table.splitlines()[2:4]]
        assert steps == ["2", "4"]
        assert "- Loss: " in card_of(tmp_path)[1]
        assert trainer.state.log_history is log


def test_a_given_optimizer_is_the_one_that_is_described(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    args = tiny.arguments(tmp_path, XGradTrainingArguments, max_steps=2)
    trainer = XGradTrainer(model=model, args=args, train_dataset=tiny.Sentences(8), optimizers=(optimizer, None))
    trainer.train()
    trainer.create_model_card()
    (line,) = [line for line in card_of(tmp_path)[1].splitlines() if line.startswith("- optimizer:")]
    assert line.startswith("- optimizer: SGD with ")
    assert "momentum=0.5" in line
    assert "adamw" not in card_of(tmp_path)[1]


def test_without_evaluation_there_is_no_heading_for_its_results(tmp_path: Path) -> None:
    trained(tmp_path, eval_strategy="no").create_model_card()
    text = card_of(tmp_path)[1]
    assert "### Training results" not in text
    assert "### Framework versions" in text


def test_a_log_that_others_wrote_into_does_not_end_the_run(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.state.log_history += [{"loss": 1.0}, {"loss": 1.0, "step": None}, {"xgrad/cosine": "high", "step": 4}]
    trainer.create_model_card()
    assert "## XGrad" in card_of(tmp_path)[1]


def test_what_goes_wrong_with_the_card_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(tags=["a", {1: 2}])
    assert "the model card is left as the Trainer wrote it" in caplog.text
    assert (tmp_path / CARD_FILE).is_file()


@pytest.mark.parametrize(
    "text",
    [
        "my own notes\n",
        "---\na: [\n---\n",
        "---\ntags: [{1: 2}]\n---\n",
        "---\n- 1\n---\n",
        "---\nbase_model: a/b\n---\n",
    ],
)
def test_a_card_of_others_in_the_folder_stays_and_does_not_end_the_run(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD_FILE).write_text(text)
    trained(tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == text


def test_local_names_go_from_a_saved_card(tmp_path: Path) -> None:
    head = "library_name: peft\nbase_model: '{0}'\ntags:\n- 'base_model:adapter:{0}'\n- lora\ndatasets:\n- '{0}'\n"
    for name, kept in (("/models/bert", False), ("", False), ("me/base", True)):
        (tmp_path / CARD_FILE).write_text(f"---\n{head.format(name)}---\n\n# text\n")
        trained(tmp_path)
        card, text = card_of(tmp_path)
        expected = yaml.safe_load(head.format(name)) if kept else {"library_name": "peft", "tags": ["lora"]}
        assert (card, text) == (expected, "\n# text\n")


@pytest.mark.parametrize(("tasks", "tag"), [(["fill-mask"], "fill-mask"), (["fill-mask", "other"], None)])
@pytest.mark.parametrize("positional", [True, False])
def test_tasks_may_be_several(tmp_path: Path, tasks: list[str], tag: str | None, positional: bool) -> None:
    trainer = trained(tmp_path)
    if positional:
        trainer.create_model_card(None, None, None, None, None, tasks)
    else:
        trainer.create_model_card(tasks=tasks)
    assert card_of(tmp_path)[0].get("pipeline_tag") == tag


def test_a_run_in_the_working_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = trained(Path("."))
    trainer.create_model_card(model_name="")
    card, text = card_of(tmp_path)
    assert card["model-index"][0]["name"] == tmp_path.name
    assert f"# {tmp_path.name}\n" in text


# ---- metadata ----


@pytest.mark.parametrize("name", ["gpt2", "google-bert/bert-base-cased", "me/my.model_1"])
def test_ids_of_the_hub(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", [None, "", "/home/me/model", "./model", "../model", "a/b/c", "a b", "~/model", 3, "C:\\x"]
)
def test_what_is_no_id_of_the_hub(name: object) -> None:
    assert not is_hub_id(name)


def test_a_folder_that_looks_like_an_id_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "bert").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("models/bert")


@pytest.mark.parametrize("name", ["", "/models/bert", "models/of/mine"])
def test_a_base_model_that_is_not_on_the_hub_is_left_out(tmp_path: Path, name: str) -> None:
    trainer = trained(tmp_path)
    trainer.model.config._name_or_path = name
    trainer.create_model_card()
    card, text = card_of(tmp_path)
    assert "base_model" not in card
    how = "fine-tuned from a model that is not on the Hub," if name else "trained from scratch"
    assert f"\nThis model was {how} on an unknown dataset." in text
    assert trainer.model.config._name_or_path == name


def test_a_base_model_of_the_hub_is_named(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.model.config._name_or_path = "me/base"
    trainer.create_model_card()
    card, text = card_of(tmp_path)
    assert card["base_model"] == "me/base"
    assert "[me/base](https://huggingface.co/me/base)" in text


def test_the_model_index_has_task_dataset_and_metrics(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(**GLUE)
    card, _ = card_of(tmp_path)
    (result,) = card["model-index"][0]["results"]
    assert result["task"] == {"name": "Text Classification", "type": "text-classification"}
    assert result["dataset"] == {"name": "GLUE COLA", "type": "nyu-mll/glue", "args": "cola", "config": "cola"}
    assert result["metrics"] == [{"name": "Accuracy", "type": "accuracy", "value": ACCURACY}]
    assert card["datasets"] == ["nyu-mll/glue"]
    assert card["pipeline_tag"] == "text-classification"


@pytest.mark.parametrize("dataset", ["/data/cola", "./cola"])
def test_a_data_set_that_is_not_on_the_hub_is_left_out(tmp_path: Path, dataset: str) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card(**GLUE | {"dataset_tags": dataset})
    card, _ = card_of(tmp_path)
    assert "datasets" not in card
    assert card["model-index"][0]["results"] == []


@pytest.mark.parametrize("split", ["validation", None])
def test_what_is_unknown_of_a_data_set_is_left_out(tmp_path: Path, split: str | None) -> None:
    trainer = trained(tmp_path)
    trainer.eval_dataset = Dataset.from_dict({"n": [1]}, split=split)
    trainer.create_model_card(**GLUE)
    (result,) = card_of(tmp_path)[0]["model-index"][0]["results"]
    named = {"name": "GLUE COLA", "type": "nyu-mll/glue", "args": "cola", "config": "cola"}
    assert result["dataset"] == named | ({} if split is None else {"split": split})


def test_what_built_a_data_set_is_not_taken_for_its_id(tmp_path: Path) -> None:
    rows = tiny.Sentences(8)
    trainer = trained(tmp_path)
    trainer.eval_dataset = Dataset.from_generator(lambda: iter([{"n": i} for i in range(3)]), cache_dir=str(tmp_path))
    assert trainer.eval_dataset.builder_name == "generator"
    assert len(rows) == 8
    trainer.create_model_card(tasks="text-classification")
    card, text = card_of(tmp_path)
    assert "datasets" not in card
    assert "on an unknown dataset." in text
    assert "generator" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_out_of_the_metadata(tmp_path: Path, value: float) -> None:
    trainer = make(tmp_path)
    trainer.compute_metrics = lambda _: {"accuracy": value}
    trainer.train()
    trainer.create_model_card(**GLUE)
    assert card_of(tmp_path)[0]["model-index"][0]["results"] == []


def test_a_local_base_model_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self: None)
    for name, told in (("/models/bert", True), ("me/base", False)):
        caplog.clear()
        model = tiny.bert()
        model.config._name_or_path = name
        make(tmp_path, model=model, push_to_hub=True)
        said = [record.message for record in caplog.records if "base_model" in record.message]
        assert len(said) == told
        assert all(name in message for message in said)


# ---- how to use it ----


def code_in(text: str) -> str:
    found = re.search(r"## How to use\n\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert found is not None
    return found[1]


def test_the_code_of_the_card_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path / "run")
    trainer.create_model_card()
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code_in(card_of(tmp_path / "run")[1]), found)
    assert type(found["model"]) is type(trainer.model)
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], weight)


def test_the_code_loads_adapters_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.bert().save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    trainer = trained(tmp_path / "run", model=model)
    trainer.create_model_card(tags=["mine"])
    card, text = card_of(tmp_path / "run")
    assert card["library_name"] == "peft"
    assert {*TAGS} <= set(card["tags"])
    assert "base_model" not in card
    assert "the model that they belong to is not on the Hub" in text
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code_in(text), found)
    assert isinstance(found["model"], AutoPeftModelForSequenceClassification._target_peft_class)
    for name, weight in model.state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], weight)


def test_a_class_that_others_do_not_have_has_no_code(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text("# x\n")
    complete_card(tmp_path, TrainedModel(XGradConfig(), nn.Linear(1, 1), "x"))
    assert "How to use" not in card_of(tmp_path)[1]


# ---- two runs ----


def test_the_comparison_takes_the_place_of_the_curves(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.create_model_card()
    before, _ = card_of(tmp_path)
    picture = (tmp_path / PICTURE_FILE).read_bytes()
    log = trainer.state.log_history
    row = {"xgrad": 0.5, "baseline": 0.625, "difference": -0.125}
    for _ in range(2):
        add_comparison(tmp_path, {"eval_loss": row}, {"XGrad": log, "plain optimizer": log})
        card, text = card_of(tmp_path)
        assert card == before
        assert "## Training curves" not in text
        assert (
            text.index("## XGrad\n") < text.index("## XGrad beside the plain optimizer") < text.index("## Training p")
        )
        assert text.count("| eval loss | 0.5000 | 0.6250 | -0.1250 |") == 1
        assert text.count(f"({PICTURE_FILE})") == 1
        assert (tmp_path / PICTURE_FILE).read_bytes() != picture


@pytest.mark.parametrize("text", ["# x\n", "# x\n\n## XGrad\n\ny\n", "# x\n\n## Training curves\n\ny\n\n## Z\n\nz\n"])
def test_the_comparison_has_a_place_in_every_card(tmp_path: Path, text: str) -> None:
    (tmp_path / CARD_FILE).write_text(text)
    row = {"xgrad": 0.5, "baseline": float("nan"), "difference": float("nan")}
    add_comparison(tmp_path, {"eval_loss": row}, {"XGrad": [], "plain optimizer": []})
    expected = [title for title in headings(text) if title != "## Training curves"]
    expected.insert(2 if "## XGrad" in expected else 1, "## XGrad beside the plain optimizer")
    found = card_of(tmp_path)[1]
    assert headings(found) == expected
    assert "| eval loss | 0.5000 | - | - |" in found


def test_a_model_of_no_known_kind_has_a_card_too(tmp_path: Path) -> None:
    with naming_hub_models_only(nn.Linear(1, 1)):
        pass
    model = nn.Linear(1, 1)
    model.config = {"model_type": "custom"}
    with naming_hub_models_only(model):
        pass


def test_a_card_without_matplotlib_goes_without_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    trained(tmp_path).create_model_card()
    assert "png" not in card_of(tmp_path)[1]
    assert not (tmp_path / PICTURE_FILE).exists()


def test_headings_within_code_are_no_sections(tmp_path: Path) -> None:
    text = "# x\n\n## A\n\n```python\n## no heading\n```\n\n## Training procedure\n\ny\n"
    (tmp_path / CARD_FILE).write_text(text)
    complete_card(tmp_path, TrainedModel(XGradConfig(enabled=False), nn.Linear(1, 1), "x"))
    assert card_of(tmp_path)[1].strip() == text.strip()
