"""What README shows is what there is: its Python runs, its flags exist, its files are there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import hf_xgrad
from hf_xgrad import cli
from hf_xgrad.recipes.arguments import ScriptParser
from hf_xgrad.trainer.arguments import EXTRA_OPTIMIZERS
from tiny_models import Sentences, arguments, bert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_loop_of_readme_trains_on_predicted_weights() -> None:
    (code,) = [block for block in blocks("python") if "WeightPredictor" in block]
    model, data = bert(), Sentences(16)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda *_: seen.append(model.classifier.weight.detach().clone()))
    batches = [{k: torch.stack([data[i][k] for i in range(n, n + 4)]) for k in data[0]} for n in range(0, 16, 4)]
    names: dict[str, Any] = {"model": model, "dataloader": batches}
    exec(code, names)
    assert len(seen) == 4
    assert not names["predictor"].is_predicted
    assert not torch.equal(seen[-1], model.classifier.weight)


def test_the_drop_in_of_readme_trains(tmp_path: Path) -> None:
    """The diff's new lines, on a model of the tests."""
    (diff,) = blocks("diff")
    code = "\n".join(line[1:] for line in diff.splitlines() if line[:1] in "+ ")
    old = [line for line in diff.splitlines() if line.startswith("-")]
    new = [line for line in diff.splitlines() if line.startswith("+")]
    assert len(old) == len(new) == 3
    code = code.replace('output_dir="outputs/run"', "**settings")
    settings = vars(arguments(tmp_path, max_steps=2))
    wanted = ("output_dir", "max_steps", "use_cpu", "disable_tqdm", "save_strategy")
    names: dict[str, Any] = {
        "model": bert(),
        "train_dataset": Sentences(16),
        "settings": {**{name: settings[name] for name in wanted}, "report_to": "none"},
    }
    exec(code, names)
    assert names["trainer"].state.global_step == 2


def test_the_mixin_of_readme_fits_any_trainer(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("python") if "XGradMixin" in block]
    code = code.replace("from trl import SFTTrainer\n", "").replace("...,", "**given,")
    names: dict[str, Any] = {
        "SFTTrainer": Trainer,
        "given": {"model": bert(), "args": arguments(tmp_path), "train_dataset": Sentences(16)},
    }
    exec(code, names)
    assert names["trainer"].xgrad_config == hf_xgrad.XGradConfig(steps=2.0)


def commands() -> list[tuple[str, list[str]]]:
    """Every command of `hf-xgrad` or file in scripts/ with its flags, as the blocks of README and docs/ call it."""
    found = []
    for page in PAGES:
        text = "\n".join(blocks("bash", page.read_text(encoding="utf-8"))).replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hf-xgrad"] and len(words) > 1:
                found.append((words[1], words[2:]))
            of_recipes = [word for word in words if word.startswith("hf_xgrad.recipes.")]
            if of_recipes:
                names = {f"hf_xgrad.recipes.{module}": name for name, (module, _) in cli.RECIPES.items()}
                found.append((names[of_recipes[0]], words[words.index(of_recipes[0]) + 1 :]))
            scripts = [word for word in words if word.startswith("scripts/") and word.endswith(".py")]
            if scripts:
                found.append((scripts[0], words[words.index(scripts[0]) + 1 :]))
    return found


PARSED = ("glue", "clm", "mlm", "scripts/run_", "scripts/tools/scaling.py")


@pytest.mark.parametrize(("script", "flags"), [c for c in commands() if c[0].startswith(PARSED)])
def test_the_commands_shown_have_flags_that_exist(
    script: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Up to where anything would be read."""

    class Parsed(Exception):  # noqa: N818
        pass

    parse = ScriptParser.parse

    def parse_and_stop(parser: ScriptParser, arguments: list[str]) -> None:
        parse(parser, [*arguments, "--use_cpu"])
        raise Parsed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ScriptParser, "parse", parse_and_stop)
    module = f"hf_xgrad.recipes.{cli.RECIPES[script][0]}" if script in cli.RECIPES else Path(script).stem
    with pytest.raises(Parsed):
        importlib.import_module(module).main(flags)


def test_all_commands_shown_are_there() -> None:
    known = {line.split()[0] for line in cli.parser().format_help().splitlines() if line.startswith("    ")}
    for name, _ in commands():
        assert name in known or (ROOT / name).is_file(), name


def test_each_recipe_has_a_page_and_readme_links_it() -> None:
    pages = {"glue": "run_glue", "clm": "run_clm", "mlm": "run_mlm"}
    for recipe, page in {**pages, "glue-loop": "run_glue_no_trainer", "clm-loop": "run_clm_no_trainer"}.items():
        assert any(name in (recipe, f"scripts/{page}.py") for name, _ in commands())
        assert f"(docs/{page}.md)" in README


def test_the_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


def test_every_setting_of_xgrad_is_in_readme() -> None:
    parser = ScriptParser(hf_xgrad.XGradTrainingArguments, prog="test", description="")
    for option in parser._option_string_actions:
        if option.startswith("--xgrad") and "-" not in option[2:]:
            assert f"`{option[2:]}`" in README
    for name in EXTRA_OPTIMIZERS:
        assert f"`{name}`" in README


def test_the_files_that_readme_names_are_there() -> None:
    for name in re.findall(r"`([\w/]+\.(?:py|txt|md|cff|json))`", README):
        folders = (".", "hf_xgrad", "hf_xgrad/core", "hf_xgrad/outputs")
        assert any((ROOT / folder / name).is_file() for folder in folders), name


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"version: {hf_xgrad.__version__}" in citation
    assert re.search(rf"^## {re.escape(hf_xgrad.__version__)}", changelog, flags=re.MULTILINE)
