"""Training with weights that are sharded over processes."""

from __future__ import annotations

from mutation import Mutation

FSDP = "tests/strategies/test_fsdp.py"

CATALOGUE = [
    Mutation(
        "each process keeps its own sum of its shard",
        "privacy/sharding.py",
        "home.device_mesh, [Partial()], run_check",
        "home.device_mesh, [Replicate()], run_check",
        f"{FSDP} -k by_hand",
        (("DTensor, Partial, distribute_tensor", "DTensor, Replicate, distribute_tensor"),),
    ),
    Mutation(
        "a step is taken with weights of an earlier one",
        "privacy/sharding.py",
        "        put_back(model)\n        if model is not",
        "        if model is not",
        f"{FSDP} -k by_hand",
    ),
    Mutation(
        "an account is read after the run was set up without it",
        "strategies/fsdp.py",
        "        return False\n",
        "        return True\n",
        f"{FSDP} -k goes_on_with_its_account",
    ),
    Mutation(
        "every process adds the noise to its sum of sharded weights",
        "privacy/sharding.py",
        "    def _tell_where_sums_are_due(self, ",
        "    adds_noise = True\n\n    def _tell_where_sums_are_due(self, ",
        f"{FSDP} -k noise_is_in_the_sum_once",
        (("int(noised)]))", "int(self.rank == 0)]))"),),
    ),
]
