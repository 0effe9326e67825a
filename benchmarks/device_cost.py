"""The cost of a private step on a GPU, counted on a processor.

    python benchmarks/device_cost.py [--quick] [--json FILE]

One step of each model in ``bf16-mixed``, private and plain, noise off, runs on the CPU while every
dispatched operation is counted:

*Products*: floating-point operations of matrix products and convolutions. Tensor cores can run one
whose operands both hold bfloat16 values, whatever type holds them: the product of two such numbers
is exact in float32. The others run in IEEE float32. A matrix times a vector moves more bytes than
it multiplies; its operations are given apart.

*Predicted time*: products over the rates of one H200, 790 TFLOP/s in bfloat16 (measured) and 67 in
float32 (its maker's). ``ratio`` is private over plain.

*Launches*: dispatched operations that are no views. Operands that the CPU widens to multiply them
are not counted, nor their bytes: a GPU multiplies them as they are.

*Kept*: the most bytes of tensors that are alive at once, beyond those alive before the step.

Nothing here is measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from loading.machine import commit, describe_machine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from training.systems import CLIP, SYSTEMS, Setting

from lightning_secure.privacy.gradients import products
from lightning_secure.privacy.gradients.products import as_on_a_device

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("gpt2", "vit", "wrn", "gpt2_lora")
BF16, FLOAT32 = 790e12, 67e12
#: The step that is counted: the trial runs and the timings come before it.
STEP = 3
_NO_LAUNCH = ("empty", "detach", "is_", "lift_fresh")


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call] # of torch's metaclass
    """Counts what is dispatched in the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[str] = Counter()
        self.launches = 0
        self.names: Counter[str] = Counter()
        self._alive: dict[int, int] = {}
        self.kept = self._now = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.products[_kind(args)] += flops
        name = packet.__name__
        if name == "_to_copy" and _widens():
            return result
        if not func.is_view and not name.startswith(_NO_LAUNCH):
            self.launches += 1
            self.names[name] += 1
        return self._watched(result)

    def _watched(self, result: Any) -> Any:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = size
        self._now += size
        self.kept = max(self.kept, self._now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)

    def seconds(self) -> float:
        """Return the predicted time of the products."""
        return self.products["bf16"] / BF16 + self.products["float32"] / FLOAT32


def _widens() -> bool:
    """Return whether a copy widens the operand of a product, which a GPU takes as it is."""
    frame = sys._getframe(2)
    for _ in range(3):  # torch's own lie between
        if frame.f_code is products.product.__code__:
            return True
        frame = frame.f_back or frame
    return False


def _kind(args: tuple[Any, ...]) -> str:
    """Return which units can run a product: of bf16 values, of others, or of a vector."""
    operands = [a for a in args if isinstance(a, Tensor) and a.ndim > 1 and a.is_floating_point()]
    if any(min(operand.shape[-2:]) == 1 and operand.ndim < 4 for operand in operands):
        return "vector"
    return "bf16" if all(map(_holds_bf16, operands)) else "float32"


def _holds_bf16(tensor: Tensor) -> bool:
    with torch.utils._python_dispatch._disable_current_modes():
        return tensor.dtype == torch.bfloat16 or torch.equal(tensor.bfloat16().to(tensor), tensor)


class _OneStep:
    """Counts one step of a system."""

    def __init__(self) -> None:
        self.rows = 0
        self._steps = 0
        self.counted = Counted()

    def begin(self) -> None:
        """Nothing is counted yet."""

    def step_done(self, net: nn.Module) -> bool:
        """Count from the end of one step to that of the next; return whether another is wanted."""
        self._steps += 1
        if self._steps == STEP - 1:
            self.counted.__enter__()  # type: ignore[no-untyped-call]
        elif self._steps == STEP:
            self.counted.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return self._steps < STEP


def count(model: str, system: str, *, size: str, batch: int, folder: Path) -> Counted:
    """Return the counts of one step."""
    setting = Setting(
        system=system, model=model, size=size, batch=batch, rate=1.0, device="cpu", bf16=True,
        threads=1, noise=False, clip=CLIP, folder=folder,
    )  # fmt: skip
    watch = _OneStep()
    with as_on_a_device():
        SYSTEMS[system](setting, watch)
    return watch.counted


def table(*, size: str, batch: int, models: tuple[str, ...]) -> dict[str, Any]:
    """Return the counts of all models, private and plain."""
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            counts = {
                system: count(model, system, size=size, batch=batch, folder=Path(folder))
                for system in ("plain", "ours")
            }
            plain, ours = counts["plain"], counts["ours"]
            cells[model] = {system: _described(counted) for system, counted in counts.items()} | {
                "ratio_of_predicted_time": round(ours.seconds() / plain.seconds(), 3),
                "ratio_of_launches": round(ours.launches / plain.launches, 3),
                "ratio_of_bytes_kept": round(ours.kept / plain.kept, 3),
            }
    return cells


def _described(counted: Counted) -> dict[str, Any]:
    gflop = {f"{kind}_gflop": round(n / 1e9, 3) for kind, n in sorted(counted.products.items())}
    return {
        **gflop,
        "predicted_us": round(counted.seconds() * 1e6, 2),
        "launches": counted.launches,
        "kept_mb": round(counted.kept / 1e6, 2),
    }


def main() -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description="What a private step would cost on a GPU.")
    parser.add_argument("--quick", action="store_true", help="the smallest models")
    parser.add_argument("--size", choices=("quick", "small", "full"), default="small")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()
    size = "quick" if arguments.quick else arguments.size
    result: Mapping[str, Any] = {
        "machine": describe_machine(),
        "commit": commit(ROOT),
        "rates": {"bf16": BF16, "float32": FLOAT32},
        "size": size,
        "batch": arguments.batch,
        "models": table(size=size, batch=arguments.batch, models=tuple(arguments.models)),
    }
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
