"""Steps that are one release together."""

from __future__ import annotations

from lightning_secure.errors import BudgetExhaustedError


class Planned:
    """Counts the steps of a release that has so many at most.

    Args:
        steps: How many.

    >>> planned = Planned(2)
    >>> planned.take(), planned.take(), planned.goes_on()
    (True, False, False)
    """

    def __init__(self, steps: int = 0) -> None:
        self._left = steps
        self._begun = False

    def take(self) -> bool:
        """Take a step, and return whether it is the first, for which the release is charged.

        Raises:
            BudgetExhaustedError: if all planned steps are taken, or none was planned. The step must
                not be released.
        """
        if self._left == 0:
            raise BudgetExhaustedError(
                "all steps that this fit was planned for are taken, and its epsilon covers no "
                "other: they are one release. To go on, fit again, which is charged anew. The step "
                "was not taken."
            )
        first, self._begun = not self._begun, True
        self._left -= 1
        return first

    def goes_on(self) -> bool | None:
        """Return whether there is a step that is paid for; None if the release has yet to begin."""
        return self._left > 0 if self._begun or not self._left else None
