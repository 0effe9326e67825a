"""``lightning-secure budget``: what a run will cost in privacy, and what one has cost."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import click

from lightning_secure.errors import ConfigError, LightningSecureError
from lightning_secure.privacy.accounting.mechanism import Release
from lightning_secure.privacy.accounting.pld import (
    ACCOUNTANTS,
    BOUNDS,
    calibrate_noise,
    epsilon_by,
    epsilon_pld,
    epsilon_rdp,
    epsilon_truncated,
)
from lightning_secure.util.validate import open_unit_interval, positive, positive_int

_OTHERS: Final = [name for name in ACCOUNTANTS if name not in ("pld", "rdp")]


class _Rate(click.ParamType[float]):
    """A number, or a fraction such as 256/60000."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            return float(Fraction(value)) if "/" in str(value) else float(value)
        except (ValueError, ArithmeticError):
            self.fail(f"{value!r} is no number, nor a fraction such as 256/60000.", param, ctx)


_RATE = _Rate()
_path = click.Path(path_type=Path, dir_okay=False)
_sample_rate = click.option(
    "--sample-rate", required=True, type=_RATE,
    help="Probability with which a step draws each row: expected batch size / rows.",
)  # fmt: skip
_steps = click.option("--steps", required=True, type=int, help="Optimizer steps.")
_delta = click.option(
    "--delta", required=True, type=_RATE, help="Well below one in the number of rows."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_plot = click.option("--plot", type=_path, help="Draw epsilon against steps: FILE.svg or FILE.png.")
_keys = click.option("--keys", "key_file", type=_path, help="Key file of an encrypted checkpoint.")
_checkpoint = click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))


@click.group()
def budget() -> None:
    """Plan a privacy budget, and read the account of a checkpoint.

    The unit is one row; rows are drawn by Poisson sampling. Epsilon is for one row added or
    removed while the declared size of the dataset stays. If the size was counted instead, epsilon
    is for one row that has no gradient; show names which of the two holds, as adjacency.
    """


@budget.command()
@_sample_rate
@click.option(
    "--noise-multiplier", required=True, type=float,
    help="Standard deviation of the noise / clipping norm.",
)  # fmt: skip
@_steps
@_delta
@click.option(
    "--accountant", "others", multiple=True, type=click.Choice(_OTHERS),
    help="Show Opacus' figure too. GDP is no upper bound.",
)  # fmt: skip
@click.option("--dataset-size", type=int, help="Rows, for a sampler that cuts off large draws.")
@click.option(
    "--truncated-at", type=int, help="Rows at which such a sampler cuts a draw off; ours does not."
)
@_json
@_plot
def epsilon(
    sample_rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    others: tuple[str, ...],
    dataset_size: int | None,
    truncated_at: int | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Compute the epsilon of a run with this noise."""
    with _reported():
        positive(noise_multiplier=noise_multiplier)
        _require_plan(sample_rate, steps, delta)
        release = Release(noise_multiplier, sample_rate, steps)
        answer: dict[str, Any] = {}
        if (dataset_size is None) != (truncated_at is None):
            raise ConfigError("--dataset-size and --truncated-at are given together or not at all.")
        if dataset_size is not None and truncated_at is not None:
            if others or plot is not None:
                raise ConfigError(
                    "--truncated-at is accounted for by pld only: leave out --accountant and "
                    "--plot."
                )
            positive_int(dataset_size=dataset_size, truncated_at=truncated_at)
            answer["epsilon"] = epsilon_truncated(
                release, delta=delta, dataset_size=dataset_size, max_batch_size=truncated_at
            )
        else:
            if plot is not None:
                _require_drawable(plot)
            answer["epsilon"] = epsilon_pld([release], delta=delta)
            answer["epsilon_rdp"] = epsilon_rdp([release], delta=delta)
            for name in others:
                answer[f"epsilon_{name.replace('-', '_')}"] = epsilon_by(
                    name, [release], delta=delta
                )
            if plot is not None:
                _draw(plot, [release], delta=delta)
        _show({**answer, **_plan(sample_rate, noise_multiplier, steps, delta)}, as_json)


@budget.command()
@_sample_rate
@click.option("--target-epsilon", required=True, type=float, help="The budget.")
@_steps
@_delta
@click.option(
    "--accountant", type=click.Choice(BOUNDS), default="pld", show_default=True,
    help="By which the budget is kept, as DPConfig(accountant=).",
)  # fmt: skip
@_json
@_plot
def noise(
    sample_rate: float,
    target_epsilon: float,
    steps: int,
    delta: float,
    accountant: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Find the noise that keeps a run within a budget."""
    with _reported():
        positive(target_epsilon=target_epsilon)
        _require_plan(sample_rate, steps, delta)
        if plot is not None:
            _require_drawable(plot)
        multiplier = calibrate_noise(
            target_epsilon=target_epsilon,
            delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            accountant=accountant,
        )
        release = Release(multiplier, sample_rate, steps)
        spent = epsilon_by(accountant, [release], delta=delta)
        if plot is not None:
            _draw(
                plot, [release], delta=delta, accountant=accountant, target_epsilon=target_epsilon
            )
        answer = {"noise_multiplier": multiplier, "epsilon": spent, "accountant": accountant}
        _show({**answer, **_plan(sample_rate, multiplier, steps, delta)}, as_json)


@budget.command()
@_checkpoint
@_keys
@click.option(
    "--journal", type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the run's journal: adds what was released since.",
)  # fmt: skip
@_json
@_plot
def show(
    checkpoint: Path,
    key_file: Path | None,
    journal: Path | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show the epsilon spent by the run that wrote CHECKPOINT. No weights are loaded."""
    with _reported():
        if plot is not None:
            _require_drawable(plot)
        ledger = _account(checkpoint, key_file)
        answer: dict[str, Any] = {
            "private": ledger.private,
            "epsilon": _finite(ledger.epsilon()),
            "epsilon_rdp": _finite(ledger.epsilon_rdp()),
            "delta": ledger.delta,
            "accountant": ledger.accountant,
            "steps": ledger.steps,
            "abandoned_steps": ledger.abandoned,
            "noise_multiplier": ledger.noise_multiplier,
            "max_grad_norm": ledger.max_grad_norm,
            "mechanism": ledger.mechanism,
            "sample_rate": ledger.step.sample_rate,
            "expected_batch_size": ledger.public.expected_batch_size,
            "dataset_size": ledger.public.dataset_size,
            "dataset_size_declared": ledger.public.dataset_size_declared,
            "adjacency": ledger.adjacency,
            "insecure": list(ledger.insecure),
            "secure_noise": ledger.secure_noise,
            "run_id": ledger.run_id,
            "releases": [list(release) for release in ledger.releases],
        }
        if journal is not None:
            from lightning_secure.privacy.accounting.ledger import known_releases

            known = known_releases(ledger, journal)
            answer["run_steps"] = sum(release.steps for release in known)
            answer["run_epsilon"] = (
                epsilon_by(ledger.accountant, known, delta=ledger.delta) if ledger.private else None
            )
        if plot is not None and not (ledger.private and ledger.steps):
            raise ConfigError(
                "the run is not private, or has taken no step: there is no curve to draw."
            )
        if plot is not None:
            _draw(plot, ledger.releases, delta=ledger.delta, accountant=ledger.accountant)
        _show(answer, as_json)


@budget.command()
@_checkpoint
@click.option(
    "--journal", required=True, type=click.Path(path_type=Path, file_okay=False),
    help="Directory in which the new journal is to lie.",
)  # fmt: skip
@click.option(
    "--steps", required=True, type=int,
    help="All steps that the run has taken, on any branch, at most.",
)  # fmt: skip
@_keys
def recover(checkpoint: Path, journal: Path, steps: int, key_file: Path | None) -> None:
    """Begin a run's lost journal anew, and charge the steps that you declare.

    Without its journal a run is not resumed, because releases made after CHECKPOINT was written are
    unknown. If you know how many steps were taken at most, for example from a log of them, they are
    charged at the next fit. Declare too few, and every epsilon from then on is too small.
    """
    with _reported():
        from lightning_secure.privacy.accounting.ledger import restore_journal

        path = restore_journal(_account(checkpoint, key_file), journal, steps=steps)
        click.echo(f"{path}: {steps} steps")


def _account(checkpoint: Path, key_file: Path | None) -> Any:
    from lightning_secure.crypto.providers import LocalKeyProvider
    from lightning_secure.plugins.checkpoint_ledger import read_account

    if not checkpoint.is_file():
        raise ConfigError(f"there is no checkpoint at {str(checkpoint)!r}.")
    return read_account(checkpoint, keys=LocalKeyProvider(key_file) if key_file else None)


def _require_plan(sample_rate: float, steps: int, delta: float) -> None:
    if not 0 < sample_rate <= 1:
        raise ConfigError(f"sample_rate must lie above 0 and at most at 1, not {sample_rate!r}.")
    positive_int(steps=steps)
    open_unit_interval(delta=delta)


def _plan(sample_rate: float, noise: float, steps: int, delta: float) -> dict[str, Any]:
    return {
        "sample_rate": sample_rate,
        "noise_multiplier": noise,
        "steps": steps,
        "delta": delta,
    }


def _require_drawable(path: Path) -> None:
    from lightning_secure.cli.curve import require_drawable

    require_drawable(path)


def _draw(path: Path, releases: list[Release], **options: Any) -> None:
    from lightning_secure.cli.curve import draw

    draw(path, releases, **options)


def _finite(value: float) -> float | None:
    """Return None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _show(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        rounded = {k: _finite(v) if isinstance(v, float) else v for k, v in answer.items()}
        click.echo(json.dumps(rounded, allow_nan=False))
        return
    width = max(map(len, answer))
    for name, value in answer.items():
        text = (
            "infinite" if value is None else f"{value:.6g}" if isinstance(value, float) else value
        )
        click.echo(f"{name:{width}}  {text}")


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Turn our errors into a paragraph without a traceback, and exit status 1."""
    try:
        yield
    except LightningSecureError as error:
        raise click.ClickException(str(error)) from None
