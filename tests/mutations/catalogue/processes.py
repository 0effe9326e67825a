"""Training in several processes."""

from __future__ import annotations

from mutation import Mutation

DDP = "tests/strategies/test_ddp.py"

CATALOGUE = [
    Mutation(
        "every process adds the noise",
        "privacy/collective.py",
        "        return self.rank == 0\n",
        "        return True\n",
        f"{DDP} -k noise_is_in_the_sum_once",
        (("if found != noises:", "if found < noises:"),),
    ),
    Mutation(
        "no process adds the noise",
        "privacy/collective.py",
        "        return self.rank == 0\n",
        "        return self.rank == self.size\n",
        f"{DDP} -k noise_is_in_the_sum_once",
        (("if found != noises:", "if found > noises:"),),
    ),
    Mutation(
        "the sums of the others are left out",
        "privacy/collective.py",
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
        "privacy/collective.py",
        "        counts = self._added([0, int(noised)], [sums",
        "        if not any(bool(tensor.any()) for tensor in sums.values()):\n            return\n"
        "        counts = self._added([0, int(noised)], [sums",
        f"{DDP} -k by_hand",
    ),
    Mutation(
        "the others are not told of a failure",
        "privacy/collective.py",
        "                tell()\n",
        "                pass\n",
        f"{DDP} -k 'fails_in_all and fails_later'",
    ),
    Mutation(
        "a release is in the account of the first process only",
        "privacy/step.py",
        "            ledger.enter(release)\n",
        "            pass\n",
        f"{DDP} -k paid_for",
    ),
    Mutation(
        "a metric that is computed in a step waits for other processes' chunks",
        "privacy/collective.py",
        "metric.sync_on_compute = metric._to_sync = False",
        "metric.sync_on_compute = False",
        f"{DDP} -k paid_for",
    ),
]
