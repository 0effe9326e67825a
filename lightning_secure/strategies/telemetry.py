"""The telemetry of a private run while it trains.

A training loss, a gradient norm and even the number of rows that were drawn are computed from the
rows without noise. Logged, they are a release that no account contains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor

log = logging.getLogger(__name__)

#: What the package itself logs while training; none of it depends on the rows, lower bounds on
#: epsilon only on canaries, which are rows of no person.
PUBLIC_METRICS: Final = frozenset(
    {
        "privacy/epsilon",
        "privacy/epsilon_lower_bound_canary",
        "privacy/epsilon_lower_bound_one_run",
        "privacy/delta",
        "privacy/steps",
    }
)


class GuardedResults(_ResultCollection):
    """Stands where ``self.log`` of a training loop puts its values, and lets only public ones in.

    Args:
        public: Names that may pass.
        released: Names under which the strategy publishes metrics with noise; the module's own of
            the same names are withheld.

    Attributes:
        muted: Whether nothing passes, not even a remark: during trial runs.
        again: Whether the step has logged already, for a chunk before this one.

    A public metric counts once a step, whatever the draw: its mean over an epoch, weighed by rows
    or by chunks, would tell how many were drawn.
    """

    def __init__(self, public: Iterable[str], released: Iterable[str] = ()) -> None:
        super().__init__(training=True)
        self.muted = False
        self.again = self._begun = False
        self._last: dict[tuple[str, str], tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._public = frozenset(public)
        self._released = frozenset(released)
        self._withheld: set[str] = set()

    @contextmanager
    def muting(self) -> Iterator[None]:
        """Let nothing pass while a block runs."""
        self.muted = True
        try:
            yield
        finally:
            self.muted = False

    def begin_chunk(self) -> None:
        """Begin a chunk of the step: only the first one logs."""
        self.again, self._begun = self._begun, True

    def end_step(self) -> None:
        """Count a step that has drawn nothing, and so has not logged, like the one before it."""
        if not self._begun:
            for (fx, name), (args, kwargs) in self._last.items():
                super().log(fx, name, *args, **kwargs)
        self.again = self._begun = False

    def log(self, fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Keep the value if its name is public; otherwise say once that it was withheld."""
        if self.muted:
            return
        if name in self._public:
            if self.again:
                return
            kwargs["batch_size"] = 1
            if fx == "training_step":
                # Of several processes each has its own number of chunks, and would wait for the
                # others' values in vain.
                kwargs["sync_dist"] = False
                self._last[fx, name] = args, kwargs
            super().log(fx, name, *args, **kwargs)
        elif name not in self._withheld | self._released:
            self._withheld.add(name)
            log.warning(
                "metric %r, logged in %s, is computed from training rows without noise and is "
                "withheld from loggers, callbacks and the progress bar. Log it on validation data "
                "instead, release it with noise, PrivateStrategy(released_metrics={...}), or name "
                "it in PrivateStrategy(public_metrics=[...]) if it is public.",
                name,
                fx,
            )

    def publish(self, metrics: Mapping[str, Tensor]) -> None:
        """Take in metrics of one step that were released with noise; their mean is an epoch's."""
        for name, value in metrics.items():
            # Each step counts alike: how many rows it has drawn must not weigh.
            super().log("training_step", name, value, batch_size=1)
