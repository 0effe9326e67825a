"""The account of what a run has revealed. It travels in every checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, Self, runtime_checkable

from lightning_secure.errors import BudgetExhaustedError, LedgerError
from lightning_secure.privacy.accounting.journal import Journal, Totals, read_totals
from lightning_secure.privacy.accounting.ledger_state import CHECKPOINT_KEY, LedgerState
from lightning_secure.privacy.accounting.mechanism import Release, joint_noise, merged
from lightning_secure.privacy.accounting.pld import affordable_steps, epsilon_by, epsilon_rdp
from lightning_secure.privacy.accounting.public_numbers import PublicNumbers
from lightning_secure.privacy.accounting.weight_notes import WeightNote
from lightning_secure.privacy.noise.banded.planned import Planned
from lightning_secure.util import events
from lightning_secure.util.validate import positive_int

log = logging.getLogger(__name__)

_AHEAD: Final = 1000


@dataclass(kw_only=True)
class Ledger:
    """The account of all releases so far, and their public numbers.

    Attributes:
        delta: Probability with which the epsilon may fail to hold.
        max_grad_norm: The clipping norm.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        public: The public numbers.
        run_id: 32 hexadecimal digits, the same in every checkpoint of a run.
        releases: Steps taken, equal ones together.
        insecure: Why the run is not private; empty if it is.
        secure_noise: Whether every draw and all noise came from a cryptographic keystream; see
            :class:`~lightning_secure.DPConfig`.
        accountant: By which :meth:`epsilon` is computed and the budget kept.
        beside: Noise multipliers of the metrics that each step releases of its draw.
        budget: What :meth:`charge` may not exceed; the strategy's, and in no checkpoint.
        mechanism: ``poisson``, in which each step is a release; or ``banded``, in which all steps
            of a fit are one, of all rows, and neighbouring datasets differ by one row that has no
            gradient.
        clip_bound: Where the clipping bound has got to, if it follows the rows' norms. It comes of
            noised counts only, which the steps were charged for.
        abandoned: Steps among ``releases`` that were charged because the run's journal has them and
            the checkpoint that it was resumed from had not.
        journaled: Whether the run has a journal, without which it cannot be resumed.
        journal_directory: Where the journal lay when it was last open in this process.
        declared_public: How often changes of the weights were declared to depend on no row.
        weights: What the weights were when the ledger was last complete in this process, by name;
            None while a private fit changes them.
        change_told: Whether a log has said, in this fit, that the weights have changed.

    >>> public = PublicNumbers(
    ...     dataset_size=600, dataset_size_declared=True, expected_batch_size=6, steps_per_epoch=100
    ... )
    >>> ledger = Ledger(delta=1e-5, max_grad_norm=1.0, noise_multiplier=1.0, public=public)
    >>> ledger.record()
    >>> ledger.steps, round(ledger.epsilon(), 2), round(ledger.epsilon(more_steps=999), 2)
    (1, 0.2, 1.83)
    >>> ledger.affords_a_step(3.0), ledger.affords_a_step(0.1)
    (True, False)
    >>> Ledger.from_state_dict(ledger.state_dict()).steps
    1
    >>> ledger.charge(Release(noise_multiplier=4.0, sample_rate=1.0, steps=1))
    >>> round(ledger.epsilon(), 2)
    0.93
    """

    delta: float
    max_grad_norm: float
    noise_multiplier: float
    public: PublicNumbers
    run_id: str = field(default_factory=lambda: secrets.token_hex(16))
    releases: list[Release] = field(default_factory=list)
    insecure: tuple[str, ...] = ()
    secure_noise: bool = False
    accountant: str = "pld"
    beside: tuple[float, ...] = ()
    budget: float | None = field(default=None, compare=False)
    mechanism: str = "poisson"
    clip_bound: float | None = None
    abandoned: int = 0
    journaled: bool = False
    journal_directory: Path | None = None
    declared_public: int = 0
    weights: dict[str, WeightNote] | None = field(default=None, repr=False, compare=False)
    change_told: bool = field(default=False, repr=False, compare=False)
    _journal_key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    _certified: dict[float, int] = field(default_factory=dict, repr=False)
    _horizon: int = field(default=0, repr=False, compare=False)
    _planned: Planned = field(default_factory=Planned, repr=False, compare=False)
    _journal: Journal | None = field(default=None, repr=False, compare=False)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return sum(release.steps for release in self.releases)

    @property
    def step(self) -> Release:
        """The release of one step: its gradient, and the metrics of the same draw."""
        noise = joint_noise(self.noise_multiplier, *self.beside)
        return Release(noise, self.public.sample_rate if self.mechanism == "poisson" else 1.0, 1)

    @property
    def adjacency(self) -> str:
        """Between which datasets epsilon holds.

        ``add-or-remove-one-row``: one has a row more, and both were trained with the same declared
        ``public_dataset_size``. ``zero-out-one-row``: both have the same number of rows, and one
        row has no gradient in one of them. That is what holds if the rows were counted, because
        the sampling rate of all rows follows their number, and for ``banded``.
        """
        return self._state().adjacency

    def plan(self, steps: int) -> None:
        """Let the next ``steps`` steps be one release, which is charged at the first of them."""
        self._planned = Planned(steps)

    def release_beside(self, noise_multipliers: Sequence[float]) -> None:
        """Let each step from now on release metrics of its draw, with noise of these multiples."""
        if self.beside != (beside := tuple(noise_multipliers)):
            self.beside = beside
            self._certified.clear()

    @property
    def private(self) -> bool:
        """Whether the run is private, so that its epsilon has a meaning."""
        return not self.insecure

    def record(self) -> None:
        """Enter one step. Call it before its result is released.

        Raises:
            BudgetExhaustedError: if all steps are one release, and that has no further step.
            LedgerError: if the journal cannot be written. The step must not be released.
        """
        if self.mechanism == "banded":
            if self._planned.take():
                self._charge(self.step, at_most=1)
            return
        left = min((most - self.steps for most in self._certified.values()), default=None)
        self._charge(self.step, at_most=left)

    def charge(self, release: Release) -> None:
        """Enter another release of the same rows, for example a noised metric.

        Args:
            release: Its noise is in units of what one row can change; a sample rate of 1 if all
                rows took part. Call it before the result is released.

        Raises:
            BudgetExhaustedError: if the release would exceed the budget.
            LedgerError: if the journal cannot be written or, after the fit, not be found. The
                release must not happen.
        """
        limited = self.private and self.budget is not None
        epsilon = self._epsilon([*self.releases, release]) if limited else 0.0
        if self.budget is not None and epsilon > self.budget:
            raise BudgetExhaustedError(
                f"the release would bring epsilon to {epsilon:.4g}, and the budget is "
                f"{self.budget:.4g}. Nothing was released."
            )
        closed = self._journal is None and self.journaled
        if closed:
            self._reopen_journal()
        try:
            self._charge(release, at_most=release.steps)
        finally:
            if closed:
                self.close_journal()
        # Which steps fit was found out without it.
        self._certified.clear()

    def enter(self, release: Release) -> None:
        """Enter what another process of the run has charged, and written into the journal."""
        self._charge(release)
        self._certified.clear()

    def _charge(self, release: Release, *, at_most: int | None = None) -> None:
        if self._journal is not None:
            self._journal.cover(release, at_most=at_most)
        if self.releases and self.releases[-1][:2] == release[:2]:
            self.releases[-1] = release._replace(steps=self.releases[-1].steps + release.steps)
        else:
            self.releases.append(release)

    # The journal

    def journal_key(self) -> bytes:
        """Return the key of the journal's authentication codes; only checkpoints hold it."""
        return bytes.fromhex(self._journal_key)

    def adopt(self, journal: Journal, directory: Path) -> None:
        """Enter releases in a journal from now on; :func:`attach_journal` has compared the two."""
        self._journal, self.journaled, self.journal_directory = journal, True, directory

    def _reopen_journal(self) -> None:
        if self.journal_directory is None:
            raise LedgerError(
                f"run {self.run_id} has a privacy journal, and this process does not know where: "
                "what is charged now would be missing there. Train or resume with it first. "
                "Nothing was released."
            )
        attach_journal(self, self.journal_directory)

    def add_abandoned(self, releases: Sequence[Release]) -> None:
        """Charge what another branch of the run has released."""
        self.releases.extend(releases)
        self.abandoned += sum(release.steps for release in releases)
        self._certified.clear()

    def close_journal(self) -> None:
        """Settle the journal and let others go on with the run; nothing if none is open."""
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is another branch: it opens the journal for itself.
        return {**self.__dict__, "_journal": None, "_planned": Planned()}

    def epsilon(self, *, more_steps: int = 0, accountant: str | None = None) -> float:
        """Return the epsilon spent, or that after ``more_steps`` more; infinite if not private.

        Args:
            more_steps: Steps like the last ones.
            accountant: Another one than the ledger's own, for comparison.
        """
        more = self.step._replace(steps=more_steps)
        return self._epsilon([*self.releases, more], accountant)

    def _epsilon(self, releases: Sequence[Release], accountant: str | None = None) -> float:
        if not self.private:
            return math.inf
        return epsilon_by(accountant or self.accountant, releases, delta=self.delta)

    def epsilon_rdp(self) -> float:
        """Return the looser bound by Rényi DP, for comparison with other tools."""
        return epsilon_rdp(self.releases, delta=self.delta) if self.private else math.inf

    def affords_a_step(self, target_epsilon: float | None) -> bool:
        """Return whether one more step stays within the budget.

        The answer is looked up, and computed again only when the steps that are known to fit are
        used up.
        """
        if self.mechanism == "banded" and (begun := self._planned.goes_on()) is not None:
            return begun
        if target_epsilon is None or not self.private:
            return True
        steps = self.steps
        if steps >= self._certified.get(target_epsilon, 0):
            # No further than the run is planned, or as far again: the rest may never be asked for.
            ahead = self._horizon - steps
            more = affordable_steps(
                target_epsilon=target_epsilon,
                delta=self.delta,
                noise_multiplier=self.step.noise_multiplier,
                sample_rate=self.step.sample_rate,
                before=self.releases,
                accountant=self.accountant,
                at_most=ahead if ahead > 0 else max(steps, _AHEAD),
            )
            self._certified[target_epsilon] = steps + more
        return steps < self._certified[target_epsilon]

    def certify(self, target_epsilon: float, *, steps: int) -> None:
        """Note that ``steps`` steps in all stay within the budget, as calibration has shown."""
        self._certified[target_epsilon] = steps
        self._horizon = max(self._horizon, steps)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts, for a checkpoint."""
        return self._state().to_dict()

    def _state(self) -> LedgerState:
        names = {field.name for field in fields(LedgerState)} - {"releases", "journal_key"}
        return LedgerState(
            **{name: getattr(self, name) for name in names},
            releases=tuple(self.releases),
            journal_key=self._journal_key,
        )

    @classmethod
    def from_state_dict(cls, state: Any) -> Self:
        """Read what :meth:`state_dict` wrote.

        Raises:
            LedgerError: if the state is not a ledger's.
        """
        read: LedgerState | None = None
        with contextlib.suppress(TypeError, KeyError, ValueError):
            read = LedgerState.from_dict(state)
        if read is None:
            raise LedgerError(
                "the checkpoint's privacy ledger cannot be read, so the spent epsilon is unknown. "
                "Nothing was resumed."
            )
        values = {**vars(read), "releases": list(read.releases)}
        return cls(_journal_key=values.pop("journal_key"), **values)

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Self | None:
        """Read the account of a checkpoint; None if it has none.

        Raises:
            LedgerError: if the checkpoint has an account that cannot be read.

        >>> Ledger.from_checkpoint({"state_dict": {}}) is None  # the checkpoint of an ordinary run
        True
        """
        state = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(state, dict) or "privacy" not in state:
            return None
        return cls.from_state_dict(state["privacy"])


def require_account(checkpoint: Mapping[str, Any]) -> Ledger:
    """Return the account of a checkpoint that is to be trained further.

    Raises:
        LedgerError: if the checkpoint has no account, or one that cannot be read.
    """
    ledger = Ledger.from_checkpoint(checkpoint)
    if ledger is None:
        raise LedgerError(
            "the checkpoint has no privacy ledger: it was not trained privately, or the ledger was "
            "removed. Going on with a fresh account would report too small an epsilon, so nothing "
            "was resumed. To start from public weights, load them into the module and call fit "
            "without ckpt_path."
        )
    return ledger


def attach_journal(ledger: Ledger, directory: Path) -> None:
    """Let a ledger enter its releases in its run's journal, and charge what only the journal knows.

    Args:
        ledger: A new one, or one from a checkpoint or module.
        directory: Where journals lie. A ledger that was attached in this process before stays with
            its journal of then, if that still exists.

    Raises:
        LedgerError: if the journal is in use, was altered, knows less than the checkpoint, or is
            absent although the run has one. The ledger is unchanged, and nothing may be trained.
    """
    ledger.close_journal()
    path = journal_path(ledger, directory)
    if ledger.journal_directory is not None:
        before = journal_path(ledger, ledger.journal_directory)
        path = before if before.exists() else path
    key = ledger.journal_key()
    if ledger.journaled or path.exists():
        journal = Journal.open(path, key=key, run_id=ledger.run_id)
    else:
        totals = merged(ledger.releases)
        journal = Journal.create(path, key=key, run_id=ledger.run_id, totals=totals)
    try:
        _charge(ledger, journal.entered, path)
    except BaseException:
        journal.close()
        raise
    ledger.adopt(journal, path.parent)


def _charge(ledger: Ledger, known: Totals, path: Path) -> None:
    own = merged(ledger.releases)
    short = sum(max(0, steps - known.get(mechanism, 0)) for mechanism, steps in own.items())
    if short:
        raise LedgerError(
            f"the privacy journal {str(path)!r} knows {short} steps fewer than the checkpoint: it "
            "was put back to an older state or belongs to a copy of the run. What it no longer "
            "knows may have been released, so nothing was resumed. Put the newest journal there; "
            "if it is lost, remove this one and see 'lightning-secure budget recover --help'."
        )
    missing = [
        Release(*mechanism, steps - own.get(mechanism, 0))
        for mechanism, steps in known.items()
        if steps > own.get(mechanism, 0)
    ]
    if missing:
        steps = sum(release.steps for release in missing)
        events.announce("privacy.abandoned", {"run_id": ledger.run_id, "steps": steps})
        ledger.add_abandoned(missing)
        log.warning(
            "run %s took %d steps that this checkpoint does not contain, or may have: it was "
            "resumed from an earlier one, or it crashed. They are charged to the account, which "
            "now has %d steps.",
            ledger.run_id,
            steps,
            ledger.steps,
        )


def known_releases(ledger: Ledger, directory: Path) -> list[Release]:
    """Return what the journal of a ledger's run says was released in all, without opening it.

    Raises:
        LedgerError: if the journal is absent or was altered.
    """
    path = journal_path(ledger, directory)
    totals = read_totals(path, key=ledger.journal_key(), run_id=ledger.run_id)
    return [Release(*mechanism, steps) for mechanism, steps in totals.items()]


def restore_journal(ledger: Ledger, directory: Path, *, steps: int) -> Path:
    """Begin a lost journal anew, with what its owner declares was released.

    Args:
        ledger: From a checkpoint of the run.
        directory: Where the journal is to lie.
        steps: All steps that the run has taken on any branch, at most. The declaration is not
            checked: if it is too small, so is every epsilon from then on.

    Returns:
        Where it lies.

    Raises:
        ConfigError: if ``steps`` is not a number of steps.
        LedgerError: if there is a journal, or the checkpoint alone has more steps.
    """
    positive_int(steps=steps)
    more = steps - ledger.steps
    if more < 0:
        raise LedgerError(
            f"the checkpoint alone has {ledger.steps} steps, and {steps} were declared for the "
            "whole run. No journal was begun."
        )
    rate = ledger.step.sample_rate
    # Which metrics another branch has released with its steps is not known: the most of any here.
    noises = [noise for noise, its_rate, _ in (*ledger.releases, ledger.step) if its_rate == rate]
    step = Release(min(noises), rate, more)
    path = journal_path(ledger, directory)
    totals = merged([*ledger.releases, step])
    key = ledger.journal_key()
    Journal.create(path, key=key, run_id=ledger.run_id, totals=totals).close()
    return path


def journal_path(ledger: Ledger, directory: Path) -> Path:
    """Return where the journal of a run lies."""
    return directory / f"{ledger.run_id}.journal"


@runtime_checkable
class HasLedger(Protocol):
    """A strategy that accounts for the privacy it spends."""

    @property
    def ledger(self) -> Ledger | None:
        """The account, from the first fit on."""

    def stop_training(self) -> None:
        """Make the Trainer take no further step, whatever minimum it was given."""


@runtime_checkable
class GuardsMetrics(Protocol):
    """A strategy that lets only some metrics out of the training loop."""

    @property
    def published_metrics(self) -> Mapping[str, bool]:
        """The metrics that pass, and whether each is of the rows, with charged noise."""
