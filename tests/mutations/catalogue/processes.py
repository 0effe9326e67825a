"""Training in several processes."""

from __future__ import annotations

from mutation import Mutation

DDP = "tests/strategies/test_ddp.py"

CATALOGUE = [
    Mutation(
        "every process adds the noise",
        "strategies/processes.py",
        "return super()._noise_multiplier() if self.is_global_zero else 0.0",
        "return super()._noise_multiplier()",
        f"{DDP} -k noise_is_in_the_sum_once",
        (("if noises != int(", "if noises < int("),),
    ),
    Mutation(
        "no process adds the noise",
        "strategies/processes.py",
        "if self.is_global_zero else 0.0",
        "if self.global_rank == self.world_size else 0.0",
        f"{DDP} -k noise_is_in_the_sum_once",
        (("if noises != int(", "if noises > int("),),
    ),
    Mutation(
        "the sums of the others are left out",
        "strategies/reduction.py",
        "            distributed.all_reduce(flat)\n",
        "            distributed.broadcast(flat, 0)\n",
        f"{DDP} -k by_hand",
    ),
    Mutation(
        "processes draw alike",
        "strategies/private_loader.py",
        "        seed = seed_of_rank(seed, rank)\n",
        "        seed = 7\n",
        f"{DDP} -k draw_apart",
        (("                rank=rank,\n", "                rank=0,\n"),),
    ),
    Mutation(
        "a process that draws nothing takes no step",
        "strategies/processes.py",
        "        tensors = [sums[parameter] for parameter in required(self._engine).parameters]\n",
        "        tensors = [sums[parameter] for parameter in required(self._engine).parameters]\n"
        "        if not any(bool(tensor.any()) for tensor in tensors):\n            return\n",
        f"{DDP} -k by_hand",
    ),
    Mutation(
        "the others are not told of a failure",
        "strategies/processes.py",
        "                tell()\n",
        "                pass\n",
        f"{DDP} -k 'fails_in_all and fails_later'",
    ),
    Mutation(
        "a release is in the account of the first process only",
        "strategies/processes.py",
        "            ledger.enter(release)\n",
        "            pass\n",
        f"{DDP} -k paid_for",
    ),
    Mutation(
        "a metric that is computed in a step waits for other processes' chunks",
        "strategies/processes.py",
        "metric.sync_on_compute = metric._to_sync = False",
        "metric.sync_on_compute = False",
        f"{DDP} -k paid_for",
    ),
]
