"""One-run audit: canaries among the rows of a real job, and guesses about which of them were.

Source:
    Steinke, Nasr, Jagielski 2023, arXiv:2305.08846.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.auditing.audit_report import AuditReport
from lightning_secure.privacy.auditing.bounds import epsilon_one_run
from lightning_secure.util.validate import open_unit_interval, positive_int

#: Parts of the canaries that are guessed about, on either side; the rest is abstained from.
_PARTS: Final = (0.01, 0.05, 0.2, 0.5)


class IndexedRows(Protocol):
    """A dataset whose rows can be had by number."""

    def __getitem__(self, index: int, /) -> Any:
        """Return a row."""
        ...

    def __len__(self) -> int:
        """Return how many there are."""
        ...


class OneRunAudit:
    """Puts canaries among the rows of a job, each by a fair coin, and guesses afterwards which.

    Args:
        canaries: Rows made for the purpose, in the form of the dataset's own; hundreds of them, of
            which the model will learn as much as possible: inputs like no other, wrong labels. They
            must not be a real person's: reports say something about them.
        included: Which of them are, if another process of the same run has tossed the coins. By
            default the operating system tosses them.

    ::

        audit = OneRunAudit(canaries)
        train = DataLoader(audit.among(rows), batch_size=256, shuffle=True)
        trainer.fit(module, train)
        report = audit.report(audit.scores(losses), claimed=epsilon, delta=1e-5)

    The number of rows, which is public, then depends on the coins a little. Declare one that does
    not: ``DPConfig(public_dataset_size=audit.public_size(rows))``.

    Raises:
        ConfigError: if there are no canaries, or the number of coins is not that of the canaries.

    >>> canaries = list(range(1000))
    >>> audit = OneRunAudit(canaries, included=[number % 2 == 0 for number in canaries])
    >>> scores = torch.tensor([1.0, -1.0] * 500)  # a model that has learnt each canary by heart
    >>> audit.report(scores, claimed=1.0, delta=1e-5).holds
    False
    """

    def __init__(self, canaries: IndexedRows, *, included: Sequence[bool] | None = None) -> None:
        positive_int(canaries=len(canaries))
        self._canaries = canaries
        coins = _tossed(len(canaries)) if included is None else np.array(included, dtype=bool)
        if coins.shape != (len(canaries),):
            raise ConfigError(f"{len(canaries)} canaries need as many coins, not {len(coins)}.")
        self._included = coins
        self._tossed = included is None

    @property
    def tossed(self) -> bool:
        """Whether the coins were tossed in this process, by itself."""
        return self._tossed

    @property
    def included(self) -> list[bool]:
        """Whether each canary is among the rows; keep it to resume the run in another process."""
        return list(map(bool, self._included))

    def among(self, rows: IndexedRows) -> Dataset[Any]:
        """Return the rows, and behind them those canaries that the coins have chosen.

        >>> rows, canaries = list(range(100)), list(range(100, 104))
        >>> audit = OneRunAudit(canaries, included=[True, False, False, True])
        >>> joined = audit.among(rows)
        >>> len(joined), joined[100], joined[101], audit.public_size(rows)
        (102, 100, 103, 102)
        """
        return _Joined(rows, self._canaries, np.flatnonzero(self._included).tolist())

    def public_size(self, rows: IndexedRows) -> int:
        """Return a number of rows to declare, which does not depend on the coins."""
        return len(rows) + (len(self._canaries) + 1) // 2

    def scores(
        self,
        losses: Callable[[Any], Tensor],
        *,
        collate_fn: Callable[[Any], Any] = default_collate,
        batch_size: int = 256,
    ) -> Tensor:
        """Return a score for each canary, shape ``(canaries,)``: the less its loss, the higher.

        Args:
            losses: From a batch of canaries to the loss of each by the trained model, shape
                ``(rows,)``. The loss now minus the loss before training tells more.
            collate_fn: As that of the training loader.
            batch_size: Canaries at once.
        """
        positive_int(batch_size=batch_size)
        parts = []
        with torch.no_grad():
            for start in range(0, len(self._canaries), batch_size):
                stop = min(start + batch_size, len(self._canaries))
                found = losses(collate_fn([self._canaries[i] for i in range(start, stop)]))
                if found.shape != (stop - start,):
                    raise ConfigError(
                        f"losses returned shape {tuple(found.shape)} for {stop - start} canaries: "
                        "one loss a canary is needed, as with reduction='none'."
                    )
                parts.append(-found.detach().float().cpu())
        return torch.cat(parts)

    def report(
        self, scores: Tensor, *, claimed: float, delta: float, confidence: float = 0.95
    ) -> AuditReport:
        """Guess that the highest scores are of canaries that were included and the lowest not.

        Args:
            scores: Of all canaries, in their order; higher for those that seem included.
            claimed: Epsilon by the account.
            delta: Of the account.
            confidence: Probability with which the bound is to hold.

        The best of several numbers of guesses is reported, each held to its share of the error.

        Raises:
            ConfigError: if a number is out of range, or not every canary has a score.
        """
        open_unit_interval(delta=delta, confidence=confidence)
        count = len(self._canaries)
        if scores.shape != (count,):
            raise ConfigError(f"{count} canaries need as many scores, not {tuple(scores.shape)}.")
        values = np.nan_to_num(scores.detach().double().cpu().numpy(), nan=np.inf)
        # Ties are broken by chance: the order of the canaries must not help.
        shuffled = np.random.default_rng().permutation(count)
        order = shuffled[np.argsort(values[shuffled], kind="stable")]
        sides = sorted({max(1, int(part * count)) for part in _PARTS} if count > 1 else set())
        best = 0.0
        for side in sides:
            right = int((~self._included[order[:side]]).sum() + self._included[order[-side:]].sum())
            found = epsilon_one_run(
                canaries=count,
                guesses=2 * side,
                right=right,
                delta=delta,
                alpha=(1 - confidence) / len(sides),
            )
            best = max(best, found)
        return AuditReport(
            method="one-run",
            lower_bound=best,
            claimed=claimed,
            delta=delta,
            confidence=confidence,
            trials=count,
        )


class _Joined(Dataset[Any]):
    def __init__(self, rows: IndexedRows, canaries: IndexedRows, chosen: list[int]) -> None:
        self._rows = rows
        # Only those: a worker process has no use for the others.
        self._chosen = [canaries[index] for index in chosen]

    def __len__(self) -> int:
        return len(self._rows) + len(self._chosen)

    def __getitem__(self, index: int) -> Any:
        own = len(self._rows)
        return self._rows[index] if index < own else self._chosen[index - own]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        own = len(self._rows)
        wanted = [index for index in indices if index < own]
        together: Callable[[list[int]], list[Any]] | None
        together = getattr(self._rows, "__getitems__", None)
        own_rows = together(wanted) if together else [self._rows[index] for index in wanted]
        found: Iterator[Any] = iter(own_rows)
        return [next(found) if i < own else self._chosen[i - own] for i in indices]


def _tossed(count: int) -> npt.NDArray[np.bool_]:
    bits = np.unpackbits(np.frombuffer(secrets.token_bytes(count // 8 + 1), np.uint8))
    return bits[:count].astype(bool)
