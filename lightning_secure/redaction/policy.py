"""The policy of what may be stored of each kind of content, besides redaction."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from lightning_secure.crypto.keys import KeyProvider
from lightning_secure.errors import ConfigError

Mode = Literal["detect", "allowlist", "drop"]
Binaries = Literal["insecure_allow", "encrypt", "refuse"]

#: The kinds of things that MLflow stores.
SINKS: Final = ("params", "metrics", "tags", "artifacts", "traces", "models", "datasets")
_BINARIES: Final[tuple[Binaries, ...]] = get_args(Binaries)  # the strictest last


@dataclass(frozen=True, kw_only=True)
class RedactionPolicy:
    """The policy of what MLflow may store.

    For each sink a mode: ``detect``, all of it, with what the redactors find taken out;
    ``allowlist``, only what is named in ``allow``, and that redacted as well; ``drop``, nothing.
    A value that does not pass is left out: the call goes on, and the audit log counts it.

    Attributes:
        params: Of runs, and of models.
        metrics: Of runs and models, by the names of the metrics.
        tags: Of runs, experiments, traces, models and datasets. What MLflow itself needs to find
            things by (a run's name, its parent) passes, and this package's own (what a run has
            spent of its privacy, digests).
        artifacts: Files, by their path below the run's or the model's artifacts; of those that will
            be encrypted, without ``.encrypted``.
        traces: Attributes, events and links of spans, previews, assessments; tags and metadata by
            their names. With ``drop`` no trace is stored at all; otherwise spans keep their names.
        models: Descriptions, tags, params and prompts in the model registry and of logged models,
            by the names of tags and params or of MLflow's arguments (``description``,
            ``template``). Names stay, also with ``drop``: MLflow goes on by them.
        datasets: Source, schema and profile of a run's inputs, records of evaluation datasets
            (``records``), and the tags of both. Names and digests stay, but with ``drop`` a run's
            inputs are not stored at all.
        allow: For each sink in mode ``allowlist``, the names that pass, as they are stored, with
            ``*``, ``?`` and ``[...]`` as in a shell.
        binaries: Files that hold no text (figures, pickles, models) are ``refuse``-d, or sent as
            ciphertext (``encrypt``), for :func:`~lightning_secure.decrypt_artifacts`. With
            ``insecure_allow`` they pass unchecked. Modes of ``artifacts`` hold for them too.
        keys: Under which they are encrypted.
        strict: Whether what a detector fails at raises, instead of being dropped.

    A field that belongs to two sinks (a model's param, a trace's tag) has to pass both.

    Raises:
        ConfigError: if a mode or sink is unknown, a list would be without effect or would let
            nothing pass, or keys and ``encrypt`` are not given together.

    >>> RedactionPolicy(params="allowlist", allow={"params": ["lr", "optimizer/*"]}, traces="drop")
    RedactionPolicy(params='allowlist', metrics='detect', tags='detect', artifacts='detect', \
traces='drop', models='detect', datasets='detect', allow={'params': ('lr', 'optimizer/*')}, \
binaries='refuse', strict=False)
    """

    params: Mode = "detect"
    metrics: Mode = "detect"
    tags: Mode = "detect"
    artifacts: Mode = "detect"
    traces: Mode = "detect"
    models: Mode = "detect"
    datasets: Mode = "detect"
    allow: Mapping[str, Sequence[str]] = field(default_factory=dict)
    binaries: Binaries = "refuse"
    keys: KeyProvider | None = field(default=None, repr=False)
    strict: bool = False

    def __post_init__(self) -> None:
        for sink in SINKS:
            if self.mode(sink) not in get_args(Mode):
                raise ConfigError(
                    f"{sink} must be one of {', '.join(get_args(Mode))}, not {self.mode(sink)!r}."
                )
        if self.binaries not in _BINARIES:
            raise ConfigError(
                f"binaries must be one of {', '.join(_BINARIES)}, not {self.binaries!r}."
            )
        if (self.binaries == "encrypt") != (self.keys is not None):
            raise ConfigError(
                "binaries='encrypt' and keys are given together: nothing can be encrypted without "
                "keys, and keys alone encrypt nothing."
            )
        given: Any = self.allow  # a file may have given it
        if not isinstance(given, Mapping) or not set(given) <= set(SINKS):
            raise ConfigError(
                f"allow must map sinks ({', '.join(SINKS)}) to the names that pass in each."
            )
        for sink in SINKS:
            names = given.get(sink)
            if (self.mode(sink) == "allowlist") != bool(names):
                raise ConfigError(
                    f"{sink}='allowlist' and names in allow[{sink!r}] must be given together: a "
                    "list in another mode would be without effect. To let nothing pass, use 'drop'."
                )
            if names is not None and (
                isinstance(names, str) or not all(isinstance(name, str) for name in names)
            ):
                raise ConfigError(f"allow[{sink!r}] must be a list of names.")
        allow = {sink: tuple(names) for sink, names in given.items()}
        object.__setattr__(self, "allow", allow)

    def mode(self, sink: str) -> str:
        """Return the mode of a sink.

        >>> policy = RedactionPolicy(traces="drop")
        >>> policy.mode("traces"), policy.mode("params")
        ('drop', 'detect')
        """
        return str(getattr(self, sink))

    def passes(self, sink: str, name: str) -> bool:
        """Return whether what stands under ``name`` in ``sink`` may be stored, redacted.

        >>> policy = RedactionPolicy(params="allowlist", allow={"params": ["optimizer/*"]})
        >>> policy.passes("params", "optimizer/lr"), policy.passes("params", "data_path")
        (True, False)
        """
        mode = self.mode(sink)
        return mode == "detect" or (
            mode == "allowlist"
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.allow[sink])
        )


class Rules:
    """Several policies, of which the strictest counts, whichever was stated first.

    >>> rules = Rules()
    >>> rules.add(RedactionPolicy(traces="drop"))
    >>> rules.drops("traces"), rules.drops("params")
    (True, False)
    """

    def __init__(self) -> None:
        self._policies: list[RedactionPolicy] = []
        self._limited: frozenset[str] = frozenset()
        self.strict = False

    def add(self, policy: RedactionPolicy) -> None:
        """Let a policy count too.

        Raises:
            ConfigError: if the policy encrypts under other keys than an earlier one. The policy
                does not count then.
        """
        if policy in self._policies:
            return
        if self.keys is not None and policy.keys is not None and not _same(self.keys, policy.keys):
            raise ConfigError(
                "binaries are encrypted under one key in a process, and another policy has named "
                "a different one already. The new policy does not count, and nothing was sent "
                "by it."
            )
        self._policies.append(policy)
        self.strict |= policy.strict
        self._limited |= {sink for sink in SINKS if policy.mode(sink) != "detect"}

    @property
    def binaries(self) -> Binaries:
        """The treatment of binaries; without any policy they are refused."""
        stated = [_BINARIES.index(policy.binaries) for policy in self._policies]
        return _BINARIES[max(stated, default=-1)]

    @property
    def keys(self) -> KeyProvider | None:
        """Under which binaries are encrypted, if a policy says so."""
        return next((policy.keys for policy in self._policies if policy.keys is not None), None)

    def limits(self, sinks: Iterable[str]) -> bool:
        """Return whether not all of one of these sinks may be stored."""
        return not self._limited.isdisjoint(sinks)

    def drops(self, sink: str) -> bool:
        """Return whether nothing of a sink may be stored."""
        return any(policy.mode(sink) == "drop" for policy in self._policies)

    def passes(self, sinks: Iterable[str], name: str) -> bool:
        """Return whether what stands under a name in all of these sinks may be stored."""
        return all(policy.passes(sink, name) for sink in sinks for policy in self._policies)


def _same(one: KeyProvider, other: KeyProvider) -> bool:
    return (one.name, one.recipients) == (other.name, other.recipients)
