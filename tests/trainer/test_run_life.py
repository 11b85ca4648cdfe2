"""The best model, early stopping, model_init, the search for hyperparameters; also of runs that stop and go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer

import run_files
import tiny_models as tiny
from hf_xgrad import XGradTrainer, XGradTrainingArguments

RULES = [
    pytest.param({"optim": "adamw_torch"}, id="closed_form"),
    pytest.param({"optim": "adafactor", "xgrad_steps": 1.0}, id="last_update"),
    pytest.param({"optim": "adamw_torch", "xgrad_steps": "auto"}, id="auto"),
]
STEPS = 10


class InterruptionError(Exception):
    """Stops a run from outside."""


def make(folder: Path, cls: type = XGradTrainer, *, patience: int | None = None, **settings: Any) -> Any:
    """A trainer that overshoots, evaluates and saves at each step, and loads the best model at its end."""
    defaults = {
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "warmup_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "restore_callback_states_from_checkpoint": patience is not None,
    }
    args = tiny.arguments(folder, XGradTrainingArguments, **{**defaults, **settings})
    callbacks = [] if patience is None else [EarlyStoppingCallback(patience)]
    return cls(
        model=tiny.bert(hidden_dropout_prob=0.1),
        args=args,
        train_dataset=tiny.Sentences(28),
        eval_dataset=tiny.Sentences(8, seed=1),
        callbacks=callbacks,
    )


def stop_at(trainer: Any, step: int) -> None:
    """Trains until `step` steps are done."""

    def observe(event: str, state: Any, **_: Any) -> None:
        if event == "step_begin" and state.global_step == step:
            raise InterruptionError

    trainer.add_callback(tiny.EveryEvent(observe))
    with pytest.raises(InterruptionError):
        trainer.train()


def outcome(trainer: Any) -> dict[str, Any]:
    """What a run has come to: weights, the log without what a clock decides, the best of its models."""
    state = trainer.state
    return {
        "weights": {name: weight.tolist() for name, weight in tiny.weights(trainer.model).items()},
        # As texts, for NaN equals nothing. The mean loss is that of the steps since a run was taken up.
        "log": [
            json.dumps(run_files.untimed(entry), sort_keys=True)
            for entry in state.log_history
            if "train_loss" not in entry
        ],
        "best": (state.best_global_step, state.best_metric, Path(state.best_model_checkpoint or "").name),
        "steps": state.global_step,
    }


def eval_losses(trainer: Any) -> dict[int, float]:
    return {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}


# ---- the best model ----


@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("rule", RULES)
def test_the_best_model_holds_the_true_weights_of_its_step(tmp_path: Path, rule: Any, limit: int | None) -> None:
    trainer = make(tmp_path, save_total_limit=limit, **rule)
    callback, seen = tiny.recorder(trainer.model, "step_end")
    trainer.add_callback(callback)
    forwards = tiny.Forwards(trainer.model)
    trainer.train()
    losses = eval_losses(trainer)
    best = min(losses, key=losses.__getitem__)
    assert 2 < best < STEPS - 1, "a best step that is easily mistaken for another"
    assert trainer.state.best_global_step == best
    assert trainer.state.best_metric == losses[best]
    true = tiny.weights(trainer.model)
    assert tiny.same(true, seen[best - 1][1])
    assert tiny.same(true, load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    # Another thing than what the step before, or the one after, had predicted.
    assert not any(tiny.same(true, predicted) for predicted in forwards.weights)
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert len(left) == (limit or STEPS)
    assert f"checkpoint-{best}" in left


@pytest.mark.parametrize("patience", [None, 2])
@pytest.mark.parametrize("off", [{"xgrad_steps": 0}, {"xgrad": False}], ids=["s=0", "off"])
def test_without_prediction_it_is_the_plain_trainers_run(tmp_path: Path, off: Any, patience: int | None) -> None:
    plain_trainer = make(tmp_path / "plain", Trainer, patience=patience)
    plain_trainer.train()
    trainer = make(tmp_path / "ours", patience=patience, **off)
    trainer.train()
    plain = outcome(plain_trainer)
    assert outcome(trainer) == plain
    assert (plain["steps"] < STEPS) == (patience is not None)


@pytest.mark.parametrize(("when", "limit"), [("before", 1), ("at", None), ("after", 1)])
@pytest.mark.parametrize("rule", RULES)
def test_the_best_model_of_a_run_that_was_stopped(tmp_path: Path, rule: Any, when: str, limit: int | None) -> None:
    uninterrupted = make(tmp_path / "whole", save_total_limit=limit, **rule)
    uninterrupted.train()
    best = uninterrupted.state.best_global_step
    settings = {"save_total_limit": limit, **rule}
    stop_at(make(tmp_path / "stopped", **settings), {"before": best - 1, "at": best, "after": best + 1}[when])
    resumed = make(tmp_path / "stopped", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert outcome(resumed) == outcome(uninterrupted)


# ---- early stopping ----


@pytest.mark.parametrize("rule", RULES)
def test_early_stopping_of_a_run_that_was_stopped_at_any_step(tmp_path: Path, rule: Any) -> None:
    """With the Trainer's own `restore_callback_states_from_checkpoint`, its patience goes on where it stood."""
    patience = 3
    uninterrupted = make(tmp_path / "whole", patience=patience, **rule)
    uninterrupted.train()
    expected = outcome(uninterrupted)
    best, last = uninterrupted.state.best_global_step, uninterrupted.state.global_step
    assert last == best + patience < STEPS
    for step in range(best - 1, last):
        folder = tmp_path / str(step)
        stop_at(make(folder, patience=patience, **rule), step)
        resumed = make(folder, patience=patience, **rule)
        resumed.train(resume_from_checkpoint=True)
        assert outcome(resumed) == expected, step
    # Without it the patience starts anew, so that the counter matters.
    forgetful = make(folder, patience=patience, **rule, restore_callback_states_from_checkpoint=False)
    forgetful.train(resume_from_checkpoint=str(folder / f"checkpoint-{last - 1}"))
    assert forgetful.state.global_step > last


# ---- model_init ----


@pytest.mark.parametrize("rule", RULES)
def test_a_model_of_model_init_goes_on_from_a_checkpoint(tmp_path: Path, rule: Any) -> None:
    def of_model_init(folder: Path) -> Any:
        trainer = make(folder, **rule)
        return XGradTrainer(
            model_init=lambda: tiny.bert(hidden_dropout_prob=0.1, initializer_range=0.1),
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            eval_dataset=trainer.eval_dataset,
        )

    uninterrupted = of_model_init(tmp_path / "whole")
    uninterrupted.train()
    stop_at(of_model_init(tmp_path / "stopped"), 5)
    resumed = of_model_init(tmp_path / "stopped")
    # The weights that it trained before are forgotten.
    resumed.train()
    stop_at(of_model_init(tmp_path / "stopped"), 5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-5"))
    assert outcome(resumed) == outcome(uninterrupted)


# ---- the search for hyperparameters ----

SPACE = {"xgrad_steps": [0, 0.5, 2.0, "auto"], "xgrad_rule": ["closed_form", "last_update"]}
TRIALS = [{"xgrad_steps": steps, "xgrad_rule": rule} for steps in SPACE["xgrad_steps"] for rule in SPACE["xgrad_rule"]]


@pytest.fixture(autouse=True)
def quiet_optuna() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


def searcher(folder: Path, cls: type = XGradTrainer, *, callbacks: Any = (), **settings: Any) -> Any:
    """A short trainer of models that `model_init` makes."""
    defaults = {"max_steps": 5, "save_strategy": "no", "gradient_accumulation_steps": 2}
    defaults |= {"optim": "adamw_torch", "weight_decay": 0.3}  # with decay, the two rules differ
    return cls(
        model_init=lambda: tiny.bert(hidden_dropout_prob=0.1),
        args=tiny.arguments(folder, XGradTrainingArguments, **{**defaults, **settings}),
        train_dataset=tiny.Sentences(28),
        eval_dataset=tiny.Sentences(8, seed=1),
        callbacks=list(callbacks),
    )


def suggest(trial: Any) -> dict[str, Any]:
    return {name: trial.suggest_categorical(name, values) for name, values in SPACE.items()}


def search(trainer: Any, **options: Any) -> tuple[Any, list[tuple[dict[str, Any], float, dict[str, Tensor]]]]:
    """What a grid search finds, and of each trial its hyperparameters, loss and end weights."""
    trials: list[Any] = []
    suggested: list[Any] = []
    space = options.pop("hp_space", suggest)

    def objective(metrics: dict[str, float]) -> float:
        trials.append((suggested[-1], metrics["eval_loss"], tiny.weights(trainer.model)))
        return metrics["eval_loss"]

    def hp_space(trial: Any) -> Any:
        suggested.append(space(trial))
        return suggested[-1]

    defaults = {"n_trials": len(TRIALS), "sampler": optuna.samplers.GridSampler(SPACE, seed=0)}
    options = {**defaults, "direction": "minimize", "backend": "optuna", **options}
    try:
        best = trainer.hyperparameter_search(hp_space=hp_space, compute_objective=objective, **options)
    except KeyboardInterrupt:
        best = None
    return best, trials


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[float, dict[str, Tensor]]]:
    """The loss and the end weights of a run of its own with such hyperparameters."""
    runs: dict[Any, tuple[float, dict[str, Tensor]]] = {}
    folder = tmp_path_factory.mktemp("direct")

    def run(cls: type = XGradTrainer, **settings: Any) -> tuple[float, dict[str, Tensor]]:
        key = cls, *sorted(settings.items())
        if key not in runs:
            trainer = searcher(folder, cls, **settings)
            trainer.train()
            runs[key] = trainer.evaluate()["eval_loss"], tiny.weights(trainer.model)
        return runs[key]

    return run


def equal_runs(trials: Any, direct: Callable[..., Any]) -> bool:
    """Whether each trial is the run of its own."""
    runs = [(direct(**settings), (loss, end)) for settings, loss, end in trials]
    return all(a[0] == b[0] and tiny.same(a[1], b[1]) for a, b in runs)


@pytest.mark.parametrize("start", [0, "auto"], ids=repr)
def test_each_trial_is_the_run_with_its_hyperparameters(tmp_path: Path, direct: Any, start: Any) -> None:
    """Whatever the fields were before the search, and whatever the trial before set them to."""
    trainer = searcher(tmp_path, xgrad_steps=start)
    best, trials = search(trainer)
    assert sorted(map(repr, (settings for settings, *_ in trials))) == sorted(map(repr, TRIALS))
    assert equal_runs(trials, direct)
    losses = [loss for _, loss, _ in trials]
    assert best.objective == min(losses)
    # They differ: but for s=0, which by either rule is the plain Trainer.
    assert len(set(losses)) == len(TRIALS) - 1
    plain, _ = direct(Trainer)
    assert [settings["xgrad_steps"] for settings, loss, _ in trials if loss == plain] == [0, 0]
    # As Transformers' documentation goes on.
    settings = best.hyperparameters
    assert direct(**settings)[0] == best.objective
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert tiny.same(tiny.weights(trainer.model), direct(**settings)[1])


def test_numbers_from_a_range(tmp_path: Path, direct: Any) -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {
            "xgrad_steps": trial.suggest_float("xgrad_steps", 0.1, 3.0),
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
        }

    trainer = searcher(tmp_path)
    sampler = optuna.samplers.RandomSampler(seed=0)
    _, trials = search(trainer, hp_space=space, sampler=sampler, n_trials=3)
    assert len({settings["xgrad_steps"] for settings, *_ in trials}) == 3
    assert equal_runs(trials, direct)


class Watched(XGradTrainer):
    """Does something else at one loss of some trials, and shows the weights that their train() leaves."""

    def watch(self, at: Callable[[Any], None]) -> None:
        self.at, self.left = at, []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self.at(self)
        return super().compute_loss(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        except (optuna.TrialPruned, KeyboardInterrupt):
            self.left.append(tiny.weights(self.model))
            raise


class Pruner(optuna.pruners.BasePruner):
    """Prunes each second trial when it has been evaluated at a step."""

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.number % 2 == 1 and trial.last_step == PRUNED_AT


PRUNED_AT = 3
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def at_step_end(seen: list[dict[str, Tensor]]) -> tiny.EveryEvent:
    """A callback that fills the list with the weights of whatever model is trained."""
    return tiny.EveryEvent(lambda event, model, **_: seen.append(tiny.weights(model)) if event == "step_end" else None)


@pytest.mark.parametrize("where", ["evaluation", "forward"])
def test_pruned_trials_leave_the_true_weights(tmp_path: Path, where: str) -> None:
    """Pruned between steps, as the Trainer does it, and in the middle of a window, by a loss of one's own."""
    trainer = searcher(tmp_path, Watched, **EVALUATED)
    pruned: list[dict[str, Any]] = []
    predicted: list[dict[str, Tensor]] = []

    def at(_: Any) -> None:
        if where == "forward" and trainer.state.global_step == PRUNED_AT and trainer._trial.number % 2 == 1:
            predicted.append(tiny.weights(trainer.model))
            raise optuna.TrialPruned

    trainer.watch(at)
    pruner = Pruner() if where == "evaluation" else optuna.pruners.NopPruner()
    best, trials = search(trainer, pruner=pruner)
    # One entry for each evaluation: as many as steps, or less where a trial was pruned.
    for settings in TRIALS:
        ends = [end for suggested, _, end in trials if suggested == settings]
        seen: list[dict[str, Tensor]] = []
        alone = searcher(tmp_path, **EVALUATED, **settings)
        alone.add_callback(at_step_end(seen))
        alone.train()
        assert all(tiny.same(end, true) for end, true in zip(ends, seen, strict=False))
        if len(ends) == PRUNED_AT:
            pruned.append(settings)
            assert any(tiny.same(left, seen[PRUNED_AT - 1]) for left in trainer.left)
        else:
            assert len(ends) == 5
    assert len(pruned) == len(trainer.left) == len(TRIALS) // 2
    assert best.hyperparameters not in pruned
    assert where == "evaluation" or not all(map(tiny.same, predicted, trainer.left))


def test_a_search_that_was_interrupted_goes_on(tmp_path: Path, direct: Any) -> None:
    """Ctrl-C in the middle of a window of its third trial; then the same search again."""
    study = {"storage": optuna.storages.InMemoryStorage(), "study_name": "s", "load_if_exists": True}
    trainer = searcher(tmp_path, Watched)
    seen: list[dict[str, Tensor]] = []
    predicted: list[dict[str, Tensor]] = []
    interrupted: list[dict[str, Any]] = []

    def at(_: Any) -> None:
        if trainer._trial.number == 2 and trainer.state.global_step == 3:
            predicted.append(tiny.weights(trainer.model))
            interrupted.append(trainer._trial.params)
            raise KeyboardInterrupt

    trainer.watch(at)
    trainer.add_callback(at_step_end(seen))
    best, first = search(trainer, **study)
    assert best is None
    assert len(first) == 2
    [left] = trainer.left
    assert tiny.same(left, seen[-1])
    assert not tiny.same(left, predicted[0])
    best, rest = search(searcher(tmp_path), **study)
    assert equal_runs(first + rest, direct)
    assert best.objective == min(loss for _, loss, _ in first + rest)
    # To Optuna the trial has failed: its grid does not try that one again.
    tried = [*interrupted, *(settings for settings, *_ in first + rest)]
    assert sorted(map(repr, tried)) == sorted(map(repr, TRIALS))
