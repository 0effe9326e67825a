"""Stand-ins for what ``logger.experiment`` hands out, through which nothing unchecked passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Final

from torch import Tensor

from lightning_secure.errors import RedactionError
from lightning_secure.loggers.client import RedactingClient
from lightning_secure.redaction import finding_counts
from lightning_secure.redaction.bound_call import Parameters
from lightning_secure.redaction.containers import number_of
from lightning_secure.redaction.redactor import Redactor


class _Kind(Enum):
    TEXT = "redacted"
    NAME = "of a metric: redacted"
    FIELDS = "a container: redacted by the names in it"
    METRICS = "numbers by name: the names are redacted"
    NUMBER = "the value of a metric"
    PLAIN = "a step, a time, a switch: passed on if it is a number"


_WRITER: Final[dict[str, dict[str, _Kind]]] = {
    "add_scalar": {"tag": _Kind.NAME, "scalar_value": _Kind.NUMBER, "display_name": _Kind.NAME}
    | {"summary_description": _Kind.TEXT},
    "add_scalars": {"main_tag": _Kind.NAME, "tag_scalar_dict": _Kind.METRICS},
    "add_text": {"tag": _Kind.TEXT, "text_string": _Kind.TEXT},
    "add_hparams": {"hparam_dict": _Kind.FIELDS, "metric_dict": _Kind.METRICS}
    | {"hparam_domain_discrete": _Kind.FIELDS, "run_name": _Kind.TEXT, "name": _Kind.TEXT},
    "flush": {},
    "close": {},
    "get_logdir": {},
}
#: In what something was found, for the audit log.
_SINKS: Final = {_Kind.TEXT: "texts", _Kind.NAME: "metrics"}
_PLAIN: Final = frozenset({"global_step", "step", "walltime", "new_style", "double_precision"})
#: By the class of an experiment, its methods that are let through, and what their arguments hold.
_METHODS: Final[dict[str, dict[str, dict[str, _Kind]]]] = {
    "lightning.fabric.loggers.csv_logs._ExperimentWriter": {
        "log_metrics": {"metrics_dict": _Kind.METRICS},
        "save": {},
    },
    "lightning.pytorch.loggers.csv_logs.ExperimentWriter": {
        "log_hparams": {"params": _Kind.FIELDS}
    },
    "torch.utils.tensorboard.writer.SummaryWriter": _WRITER,
    "tensorboardX.writer.SummaryWriter": _WRITER,
}


class RedactingExperiment:
    """Passes on the calls of a logger's experiment with everything that is stored redacted.

    Args:
        experiment: What the logger hands out.
        redactor: Decides what is taken out.

    Of CSVLogger's experiment and TensorBoard's ``SummaryWriter`` the methods that take metrics,
    hyperparameters and text pass. Every other method, and every method of another experiment,
    raises :class:`RedactionError`: what is not checked is not logged.
    """

    def __init__(self, experiment: Any, redactor: Redactor) -> None:
        self._experiment = experiment
        self._redactor = redactor
        self._methods: dict[str, dict[str, _Kind]] = {}
        for kind in type(experiment).__mro__:
            self._methods |= _METHODS.get(f"{kind.__module__}.{kind.__qualname__}", {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = getattr(self._experiment, name)
        if name in self._methods:
            return self._redacting(member, self._methods[name])
        raise refusal(f"{type(self._experiment).__name__}.{name}")

    def _redacting(
        self, method: Callable[..., Any], kinds: Mapping[str, _Kind]
    ) -> Callable[..., Any]:
        parameters = Parameters(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            clean = {}
            for name, value in parameters.bind(args, kwargs).items():
                kind = _Kind.PLAIN if name in _PLAIN else kinds.get(name)
                if kind is None:
                    raise refusal(f"argument {name!r} of {method.__name__}")
                clean[name] = self._argument(kind, value)
            finding_counts.announce()
            positional, named = parameters.spread(clean)
            return method(*positional, **named)

        return call

    def _argument(self, kind: _Kind, value: Any) -> Any:
        if value is None:
            return None
        if kind in _SINKS:
            with finding_counts.looking(_SINKS[kind]):
                return self._redactor.redact_text(str(self._redactor.redact(value)))
        if kind is _Kind.METRICS:
            return redacted_metrics(self._redactor, value)
        if kind is _Kind.FIELDS:
            return redacted_fields(self._redactor, value)
        if isinstance(value, Tensor):
            value = value.detach()
        return value if isinstance(value, int | float) else number_of(value)


def redacting_experiment(experiment: Any, redactor: Redactor) -> Any:
    """Return a stand-in for what ``logger.experiment`` hands out."""
    if type(experiment).__module__.startswith("mlflow."):
        return RedactingClient(experiment, redactor)
    return RedactingExperiment(experiment, redactor)


def redacted_fields(redactor: Redactor, value: Any) -> dict[str, Any]:
    """Return hyperparameters, redacted; what was found is to be announced before they are logged.

    Raises:
        RedactionError: if the hyperparameters have no names, or cannot be read.
    """
    with finding_counts.looking("params"):
        fields = _plain(redactor.redact(value))
    if not isinstance(fields, dict):
        raise refusal(f"a {type(value).__name__} in the place of hyperparameters")
    return fields


def _plain(value: Any) -> Any:
    """Return a redacted value without what classes derived from Python's own carry along."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (str, bool, int, float):
        if isinstance(value, kind):
            return str.__str__(value) if kind is str else kind(value)
    return value


def redacted_metrics(redactor: Redactor, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with their names redacted, and texts among their values.

    What was found is to be announced before they are logged.
    """
    with finding_counts.looking("metrics"):
        names = redactor.redact(dict.fromkeys(metrics))
        values = [
            value if _is_number(value) else redactor.redact(value, name=str(name))
            for name, value in metrics.items()
        ]
    return dict(zip(names, values, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Tensor) or hasattr(type(value), "__float__")


def refusal(what: str) -> RedactionError:
    """Return the error about something that is not checked."""
    return RedactionError(
        f"{what} is not checked for secrets and personal data, so it was refused and nothing was "
        "logged. Metrics, hyperparameters and text are checked."
    )
