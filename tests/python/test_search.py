"""The search for hyperparameters: runs, draws, what is chosen, and optuna where it is asked for."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from rustune import ConfigError, DataError, FastLanguageModel, Model, SFTConfig, SFTTrainer, TrainerCallback, search

Make = Callable[..., SFTTrainer]
RATES = (1e-4, 3e-2, 1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    def model_init(trial: Any = None) -> Model:
        rank = 2 if trial is None else trial.params.get("rank", 2)
        model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32", load_in_4bit=False)
        return FastLanguageModel.get_peft_model(model, r=rank)

    def made(settings: dict[str, Any] | None = None, **arguments: Any) -> SFTTrainer:
        args = SFTConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "max_steps": 3,
                "learning_rate": 1e-5,
                "warmup_steps": 0,
                "save_strategy": "no",
                "disable_tqdm": True,
                **(settings or {}),
            }
        )
        dataset = {"train_dataset": tiny.rows(), "eval_dataset": tiny.rows(count=4, seed=2)}
        return SFTTrainer(args=args, **{"model_init": model_init, **dataset, **arguments})

    return made


def space(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_categorical("learning_rate", RATES)}


class Hear(TrainerCallback):
    """Notes each run's settings and state."""

    def __init__(self) -> None:
        self.runs: list[tuple[float, str, bool, Any, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = (args.learning_rate, Path(args.output_dir).name, state.is_hyper_param_search, state.trial_params)
        self.runs.append((*run, kwargs["model"]))


def test_the_best_of_all_runs_is_what_training_with_its_settings_gives(make: Make) -> None:
    hear = Hear()
    trainer = make(callbacks=[hear])
    before = trainer.args
    best = trainer.hyperparameter_search(space, n_trials=6)
    assert isinstance(best, search.BestRun) and best.run_summary is None
    rates = [run[0] for run in hear.runs]
    assert len(rates) == 6 and set(rates) == set(RATES), "choose another seed"
    assert [run[1:4] for run in hear.runs] == [(f"run-{i}", True, {"learning_rate": rates[i]}) for i in range(6)]
    assert len({id(run[4]) for run in hear.runs}) > 1 and hear.runs[-1][4] is trainer.model
    assert trainer.args is before and not make().state.is_hyper_param_search
    # The same rate again gives the same, and every run the same as one by hand.
    alone = {}
    for rate in RATES:
        once = make({"learning_rate": rate})
        once.train()
        alone[rate] = once.evaluate()["eval_loss"]
    assert best.objective == min(alone.values()) and alone[best.hyperparameters["learning_rate"]] == best.objective
    assert best.run_id == str(rates.index(best.hyperparameters["learning_rate"]))
    assert make().hyperparameter_search(space, n_trials=6) == best
    worst = make().hyperparameter_search(space, n_trials=6, direction="maximize")
    assert worst.objective == max(alone.values())


def test_a_trainer_makes_its_model_anew_for_each_run(make: Make) -> None:
    trainer = make({"learning_rate": 1e-2})
    first, loss = trainer.model, trainer.train().training_loss
    assert trainer.model is first
    assert trainer.train().training_loss == loss and trainer.model is not first


def test_what_is_no_setting_is_for_model_init(make: Make) -> None:
    def with_rank(trial: Any) -> dict[str, Any]:
        return {"rank": trial.suggest_int("rank", 3, 3), "seed": 5}

    trainer = make()
    with pytest.warns(UserWarning, match="hp_space: rank is no setting of the run; model_init"):
        best = trainer.hyperparameter_search(with_rank, n_trials=1, hp_name=lambda trial: f"rank-{trial.number}")
    assert best.hyperparameters == {"rank": 3} and trainer.model.peft_config["default"]["r"] == 3
    assert trainer.state.trial_name == "rank-0"


def test_the_objective_is_that_of_the_last_evaluation(make: Make) -> None:
    scores = iter([5.0, 1.0, 2.0, 4.0])
    trainer = make(
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4},
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    best = trainer.hyperparameter_search(space, n_trials=2, direction="maximize")
    assert (best.run_id, best.objective) == ("1", 4.0)
    best = make().hyperparameter_search(space, lambda metrics: -metrics["eval_loss"], n_trials=1)
    assert best.objective < 0


def test_a_run_that_diverges_is_the_worst(make: Make) -> None:
    def rates(trial: Any) -> dict[str, Any]:
        return {"learning_rate": 1e30 if trial.number == 0 else 1e-3, "max_grad_norm": 0.0, "optim": "sgd"}

    with pytest.warns(UserWarning, match="trial 0: step"):
        assert make().hyperparameter_search(rates, n_trials=2).run_id == "1"


def test_draws_stay_in_their_range_and_follow_the_seed() -> None:
    trials = [search.Trial(number, 7) for number in range(300)]
    logs = [trial.suggest_float("lr", 1e-6, 1e-2, log=True) for trial in trials]
    assert all(1e-6 <= value <= 1e-2 for value in logs)
    assert 100 < sum(value < 1e-4 for value in logs) < 200, "half of the draws lie below the middle of the logarithms"
    assert {round(trial.suggest_float("w", 0.0, 0.3, step=0.1), 9) for trial in trials} == {0.0, 0.1, 0.2, 0.3}
    assert {trial.suggest_int("n", 2, 8, step=3) for trial in trials} == {2, 5, 8}
    assert {trial.suggest_int("m", 1, 3, log=True) for trial in trials} == {1, 2, 3}
    assert {trial.suggest_categorical("c", ["a", None]) for trial in trials} == {"a", None}
    again = search.Trial(4, 7)
    assert again.suggest_categorical("c", ["a", None]) == trials[4].params["c"]
    assert again.suggest_float("lr", 1e-6, 1e-2, log=True) == trials[4].params["lr"]
    assert [search.Trial(n, 8).suggest_float("lr", 0, 1) for n in range(3)] != [
        search.Trial(n, 7).suggest_float("lr", 0, 1) for n in range(3)
    ]
    assert set(search.default_hp_space(search.Trial(0, 1))) == {
        "learning_rate",
        "num_train_epochs",
        "seed",
        "per_device_train_batch_size",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hp_space": 3}, "hp_space = 3: expected a function"),
        ({"hp_space": lambda trial: 3}, "hp_space returned int"),
        ({"hp_space": lambda trial: {"max_length": 5}}, "hp_space: max_length: is the same for all runs"),
        ({"hp_space": lambda trial: {"learning_rate": -1.0}}, "learning_rate = -1"),
        ({"hp_space": lambda trial: {"seed": trial.suggest_int("seed", 3, 2)}}, "seed: from 3 to 2"),
        ({"hp_space": lambda trial: {"seed": trial.suggest_categorical("seed", [])}}, "seed: expected choices"),
        ({"hp_space": lambda t: {"weight_decay": t.suggest_float("w", 0.0, 1.0, log=True)}}, "w: log=True"),
        ({"compute_objective": lambda metrics: "good"}, "compute_objective returned 'good'"),
        ({"n_trials": 0}, "n_trials = 0: expected a whole number, at least 1"),
        ({"direction": "down"}, "direction = 'down'"),
        ({"backend": "ray"}, "backend = 'ray': expected \"optuna\""),
        ({"n_jobs": 2}, "n_jobs: hyperparameter_search has no such argument"),
        ({"backend": "optuna"}, "optuna is not installed"),
    ],
)
def test_searches_that_cannot_be_are_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=message):
        make().hyperparameter_search(**{"hp_space": space, "n_trials": 1, **arguments})


def test_a_search_needs_model_init_and_rows_to_compare_with(make: Make) -> None:
    model = make().model
    with pytest.raises(ConfigError, match="model_init="):
        make(model=model, model_init=None).hyperparameter_search(space)
    with pytest.raises(DataError, match="eval_dataset: not given"):
        make(eval_dataset=None).hyperparameter_search(space)
    with pytest.raises(ConfigError, match="model_init returned tuple"):
        make(model_init=lambda: (1, 2))


def test_optuna_chooses_where_it_is_asked_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pruned(Exception):
        """optuna.TrialPruned."""

    class Study:
        """What a study of optuna does, in order."""

        def __init__(self, **made: Any) -> None:
            self.made = made

        def optimize(self, objective: Any, n_trials: int, **running: Any) -> None:
            self.running, self.values, self.reports = running, [], []
            for number in range(n_trials):
                trial = search.Trial(number, 0)
                trial.report = lambda value, step: self.reports.append((step, value))  # type: ignore[attr-defined]
                trial.should_prune = lambda number=number: number == 1  # type: ignore[attr-defined]
                try:
                    self.values.append((objective(trial), trial))
                except Pruned:
                    continue
            value, trial = min(self.values, key=lambda pair: pair[0])
            self.best_trial = SimpleNamespace(number=trial.number, value=value, params=trial.params)

    studies: list[Study] = []

    def create_study(**made: Any) -> Study:
        studies.append(Study(**made))
        return studies[-1]

    monkeypatch.setitem(sys.modules, "optuna", SimpleNamespace(create_study=create_study, TrialPruned=Pruned))
    trainer = make({"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        best = trainer.hyperparameter_search(space, n_trials=3, backend="optuna", study_name="mine", timeout=60)
    (study,) = studies
    assert study.made == {"direction": "minimize", "study_name": "mine"} and study.running == {"timeout": 60}
    # Two evaluations of two runs, and the one after which the second run was ended.
    assert [step for step, _ in study.reports] == [1, 2, 1, 1, 2] and len(study.values) == 2
    assert best.objective == min(value for value, _ in study.values)
    with pytest.raises(ConfigError, match="n_jobs = 2"):
        trainer.hyperparameter_search(space, backend="optuna", n_jobs=2)
