"""Proposes the trials of a sweep with Optuna, and decides which to prune.

Both are functions of the earlier trials and the seed, so an interrupted sweep proposes the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lora_engine.errors import SettingsError
from lora_engine.files import canonical_json, sha256_bytes
from tasks.sweep.spec import SweepParameter, SweepSettings, TrialRecord

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

_DIGITS = 4
"""Significant digits of a proposed number."""
_UNPRUNED = 4
"""Completed trials before the first is pruned."""


def require_optuna() -> None:
    """Raises if Optuna is not installed.

    Raises:
        SettingsError: It is not.
    """
    if find_spec("optuna") is None:
        raise SettingsError(
            "sweeps need the package optuna", where="sweep", remedy="install the extra: pip install 'loraline[sweep]'"
        )


def propose(settings: SweepSettings, earlier: Sequence[TrialRecord], count: int) -> list[dict[str, Any]]:
    """Returns the settings of the next trials: Tree-structured Parzen Estimator, of which the first ten are random.

    Args:
        settings: The sweep.
        earlier: All trials before.
        count: Number of trials.
    """
    study = _study(settings, earlier)
    distributions = {path: _distribution(parameter) for path, parameter in settings.parameters.items()}
    asked = [study.ask(distributions).params for _ in range(count)]
    return [
        {path: _to_value(parameter, params[path]) for path, parameter in settings.parameters.items()}
        for params in asked
    ]


def find_pruned_step(
    settings: SweepSettings, earlier: Sequence[TrialRecord], curve: Sequence[tuple[int, float]]
) -> int | None:
    """Returns the first step at which a trial is worse than the median of the earlier ones; None for none.

    Args:
        settings: The sweep.
        earlier: The trials to compare with.
        curve: Steps and validation losses of the trial.
    """
    if not settings.prune or not curve:
        return None
    trial = _study(settings, earlier).ask()
    for step, loss in sorted(curve):
        trial.report(_signed(settings, loss), step)
        if trial.should_prune():
            return step
    return None


def _study(settings: SweepSettings, earlier: Sequence[TrialRecord]) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = int(sha256_bytes(canonical_json([settings.seed, len(earlier)]))[:8], 16)
    study = optuna.create_study(
        direction=settings.direction,
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED),
    )
    study.add_trials([_frozen(settings, record) for record in earlier])
    return study


def _frozen(settings: SweepSettings, record: TrialRecord) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    states = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    return create_trial(
        state=states[record.state],
        value=record.value,
        params={path: _to_proposed(settings.parameters[path], value) for path, value in record.values.items()},
        distributions={path: _distribution(settings.parameters[path]) for path in record.values},
        intermediate_values={step: _signed(settings, loss) for step, loss in record.curve},
    )


def _distribution(parameter: SweepParameter) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = parameter.low, parameter.last
    if parameter.values is not None or low is None:
        # By position: Optuna takes no lists and mappings.
        return CategoricalDistribution(range(len(parameter.values or ())))
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=parameter.log, step=int(parameter.step or 1))
    return FloatDistribution(float(low), float(high), log=parameter.log, step=parameter.step)


def _to_value(parameter: SweepParameter, proposed: Any) -> Any:
    if parameter.values is not None:
        return parameter.values[proposed]
    if isinstance(proposed, int) or parameter.step or parameter.low is None or parameter.high is None:
        return proposed
    return min(max(float(f"{proposed:.{_DIGITS}g}"), float(parameter.low)), float(parameter.high))


def _to_proposed(parameter: SweepParameter, value: Any) -> Any:
    return value if parameter.values is None else list(parameter.values).index(value)


def _signed(settings: SweepSettings, loss: float) -> float:
    """Returns a loss in the direction of the sweep's metric, in which Optuna compares."""
    return loss if settings.direction == "minimize" else -loss


def comparable_curve(training: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """Returns the losses by which trials are compared while they run, from `training.json`; without step 0."""
    candidates = training.get("candidates", {}).get("scores", ())
    points = candidates or training.get("validation_loss", ())
    return tuple((int(step), float(loss)) for step, loss in points if step and loss is not None)
