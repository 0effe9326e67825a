"""The worker in a system's process: trains, and measures itself while it does.

It is forked from a process that has imported everything, so that starting one takes no time.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import logging
import os
import re
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from training.systems import SYSTEMS, Setting

__all__ = ["about", "memory", "serve", "turns"]

_STEPS_WATCHED = 4
_UNREACHED = 1e6
_PACKAGES = ("lightning-secure", "lightning", "torch", "opacus", "dp-accounting", "numpy")


def serve(pipe: Connection, what: str, setting: Setting) -> NoReturn:
    """Do one thing, tell what came of it, and end."""
    # What was imported stays; to look through it takes a quarter of a second each time.
    gc.freeze()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "opacus"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        torch.set_num_threads(setting.threads)
        pipe.send({"about": about, "memory": memory, "turns": turns}[what](pipe, setting))
    except Exception as error:  # noqa: BLE001 - whatever it is, the other side must hear of it
        if not isinstance(error, (EOFError, BrokenPipeError)):  # which mean that the caller is gone
            traceback.print_exc()
            with suppress(OSError):
                pipe.send({"error": f"{type(error).__name__}: {error}"[:500]})
    # Without the clean-up of libraries that have started threads before the fork.
    os._exit(0)


def about(pipe: Connection, setting: Setting) -> dict[str, Any]:
    """Return versions, threads, and which GPU there is."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    found: dict[str, Any] = {"versions": versions, "threads": torch.get_num_threads()}
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": properties.name, "memory_gb": round(properties.total_memory / 1e9)}
        found["gpu"]["cuda"] = torch.version.cuda
    return found


# Time


class Pace:
    """Times steps, and waits between turns.

    A step lasts from the end of the one before until its own end, with the device idle, so
    fetching the rows belongs to it. The caller says how many steps are wanted, and gets the
    seconds and the rows of each.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self.rows = 0
        self._pipe = pipe
        self._device = device
        self._steps: list[tuple[float, int]] = []
        self._wanted = int(pipe.recv())
        self._last = 0.0

    def begin(self) -> None:
        """Start the clock."""
        _synchronise(self._device)
        self._last = time.perf_counter()

    def step_done(self, net: nn.Module) -> bool:
        """Take the time."""
        _synchronise(self._device)
        now = time.perf_counter()
        self._steps.append((now - self._last, self.rows))
        self.rows, self._last = 0, now
        if len(self._steps) < self._wanted:
            return True
        steps, self._steps = self._steps, []
        if self._device == "cuda":
            torch.cuda.empty_cache()  # others have their turn now, and need the room
        self._pipe.send({"steps": steps})
        self._wanted = int(self._pipe.recv())
        self.begin()
        return self._wanted > 0


def turns(pipe: Connection, setting: Setting) -> dict[str, Any]:
    """Train by turns, so many steps in each as are asked for, until none are."""
    SYSTEMS[setting.system](setting, Pace(pipe, setting.device))
    return {}


# Memory, and whether the work is the same


class Peak:
    """Finds the most memory that the first step and the later ones take."""

    def __init__(self, device: str) -> None:
        self.rows = 0
        self.most = [0.0, 0.0]
        self._device = device
        self._steps = 0
        _forget_peak(device)
        self._before = _memory(device)

    def begin(self) -> None:
        """Do nothing: the model counts as well, and is there already."""

    def step_done(self, net: nn.Module) -> bool:
        """Look at what the step took at most."""
        self.most[min(self._steps, 1)] = _memory(self._device, peak=True) - self._before
        self._steps += 1
        if self._steps == 1:
            _forget_peak(self._device)
        return self._steps < _STEPS_WATCHED


class FirstGradient:
    """Writes the first gradient down."""

    def __init__(self, path: Path) -> None:
        self.rows = 0
        self._path = path

    def begin(self) -> None:
        """Do nothing."""

    def step_done(self, net: nn.Module) -> bool:
        """Keep it."""
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        flat = torch.cat([item.detach().float().cpu().flatten() for item in gradients])
        np.save(self._path, flat.numpy())
        return False


def memory(pipe: Connection, setting: Setting) -> dict[str, Any]:
    """Return megabytes at the peak, and write down gradients of one batch without noise.

    With a sampling rate of 1, so that every batch has the same rows. The gradients come first: what
    libraries load and set up when they are first used is no part of the peak then.
    """
    train = SYSTEMS[setting.system]
    exact = replace(setting, noise=False, bf16=False)
    paths = {name: setting.folder / f"{setting.system}-{name}.npy" for name in ("sum", "clipped")}
    short, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    train(replace(exact, clip=_UNREACHED), FirstGradient(paths["sum"]))
    train(exact, FirstGradient(paths["clipped"]))
    torch.backends.cudnn.allow_tf32 = short
    watch = Peak(setting.device)
    train(setting, watch)
    first, later = watch.most
    return {"gradients": paths, "peak_mb": max(first, later), "peak_mb_later": later}


def _memory(device: str, *, peak: bool = False) -> float:
    """Return megabytes that are in use, or that were at most."""
    if device == "cuda":
        _synchronise(device)
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / 1e6
    name = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024 / 1e6


def _forget_peak(device: str) -> None:
    """Let the peak be what is in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        # glibc keeps what is freed, and would count it. Told to keep nothing at all, it lets
        # everything take ten times as long, so it is asked only here.
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
