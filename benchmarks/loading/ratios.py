"""The readers that are measured, and the ratios of their times."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["READERS", "SYSTEMS", "Reader", "median_of", "ratios"]

BOTH = ("sequential", "shuffled")
ALL = (*BOTH, "random")

#: A process for each: whether it runs in the peers' environment, and what it runs.
SYSTEMS: Mapping[str, tuple[bool, list[str]]] = {
    "ours": (False, ["loading.ours"]),
    "clear": (False, ["loading.ours", "--clear"]),
    "ram": (False, ["loading.ram"]),
    "litdata": (True, ["loading.peer_litdata"]),
    "mds": (True, ["loading.peer_mds"]),
    "webdataset": (True, ["loading.peer_webdataset"]),
}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A way to read.

    Attributes:
        name: What it is called in results.
        system: The process that does it.
        variant: How that one stores the rows.
        modes: In which orders it can read.
        workers: Numbers of worker processes to try.
        options: Settings of the system's own to try.
        quick: The only modes that a quick run takes.
    """

    name: str
    system: str
    variant: str
    modes: tuple[str, ...] = BOTH
    workers: tuple[int, ...] = (0, 2)
    options: tuple[str, ...] = ("",)
    quick: tuple[str, ...] | None = None


#: litdata's batch_decode; its default decodes shuffled images again and again.
DECODE = ("auto", "256")

FERNET: Any = {"options": ("256",), "quick": ("shuffled",)}

READERS = (
    Reader(name="aes", system="ours", variant="256k", workers=(0,)),
    Reader(name="aes", system="ours", variant="row", modes=("random",), workers=(0,)),
    Reader(name="clear", system="clear", variant="256k", workers=(0,)),
    Reader(name="ram", system="ram", variant="rows", modes=ALL, workers=(0,)),
    Reader(name="ram_batches", system="ram", variant="batches", modes=ALL, workers=(0,)),
    Reader(name="litdata_plain", system="litdata", variant="plain", options=("auto", "256")),
    Reader(
        name="litdata_plain",
        system="litdata",
        variant="plain",
        modes=("random",),
        options=("auto", "1"),
    ),
    Reader(name="litdata_fernet_chunk", system="litdata", variant="fernet_chunk", **FERNET),
    Reader(name="litdata_fernet_sample", system="litdata", variant="fernet_sample", **FERNET),
    Reader(name="mds_plain", system="mds", variant="plain", modes=ALL, quick=("shuffled",)),
    Reader(name="webdataset_plain", system="webdataset", variant="plain", quick=("shuffled",)),
)

Rates = Mapping[str, list[float]]


def median_of(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the quotients within each round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def ratios(rates: Rates, fits: Rates) -> dict[str, float]:
    """Return what the results' ``ratios`` say about speed.

    Args:
        rates: Rows a second in each round, by ``size/mode/reader``.
        fits: Seconds of ``Trainer.fit`` in each round, by what feeds it.

    What shuffles is compared with the faster way of a peer, in each round: reading in order, or
    shuffled. Ratios whose two sides were not both measured are left out.
    """
    found: dict[str, float] = {}

    def add(name: str, ours: str, *theirs: str) -> None:
        measured = [rates[key] for key in theirs if key in rates]
        if ours in rates and measured:
            best = [max(several) for several in zip(*measured, strict=True)]
            found[name] = median_of(rates[ours], best)

    for size in ("3kb", "150kb"):
        for reader in ("litdata_plain", "mds_plain", "webdataset_plain", "ram", "ram_batches"):
            both = (f"{size}/{mode}/{reader}" for mode in BOTH)
            add(f"window_aes_vs_{reader}_{size}", f"{size}/shuffled/aes", *both)
        fernet = (
            f"{size}/{mode}/litdata_fernet_{level}"
            for mode in BOTH
            for level in ("chunk", "sample")
        )
        add(f"window_aes_vs_litdata_fernet_{size}", f"{size}/shuffled/aes", *fernet)
        for reader in ("litdata_plain", "mds_plain", "webdataset_plain"):
            add(
                f"sequential_aes_vs_{reader}_{size}",
                f"{size}/sequential/aes",
                f"{size}/sequential/{reader}",
            )
        # Against reading in order: no peer is made for fully random access.
        add(
            f"random_aes_vs_litdata_plain_{size}",
            f"{size}/random/aes",
            f"{size}/sequential/litdata_plain",
        )
        for reader in ("litdata_plain", "mds_plain", "ram_batches"):
            add(
                f"random_aes_vs_{reader}_random_{size}",
                f"{size}/random/aes",
                f"{size}/random/{reader}",
            )
    add("aes_vs_clear_256k", "3kb/shuffled/aes", "3kb/shuffled/clear")
    add("sequential_aes_vs_clear_256k", "3kb/sequential/aes", "3kb/sequential/clear")
    add("aes_vs_clear_150kb", "150kb/shuffled/aes", "150kb/shuffled/clear")
    for feed in ("ram", "ram_batches"):
        if "aes" in fits and feed in fits:
            found[f"trainer_fit_aes_vs_{feed}"] = median_of(fits["aes"], fits[feed])
    return found
