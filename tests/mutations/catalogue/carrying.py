"""A ledger stays with its weights, and notes what they are."""

from __future__ import annotations

from mutation import Mutation

ACCOUNT = "tests/attacks/test_account.py"

CATALOGUE = [
    Mutation(
        "a plain Trainer saves weights without their ledger",
        "privacy/carrying.py",
        '    "on_save_checkpoint": _saving,\n',
        "",
        f"{ACCOUNT} -k 'saves_the_ledger and redacted'",
    ),
    Mutation(
        "a hook of the module's own takes the ledger out again",
        "privacy/carrying.py",
        '    _own_hook(module, "on_save_checkpoint", own)(checkpoint)\n    write_ledger(module, '
        "checkpoint)\n",
        "    write_ledger(module, checkpoint)\n"
        '    _own_hook(module, "on_save_checkpoint", own)(checkpoint)\n',
        f"{ACCOUNT} -k hooks_of_the_modules_own",
    ),
    Mutation(
        "a private strategy relies on the module's hook for the ledger",
        "strategies/accounted.py",
        "            write_ledger(self._module, checkpoint)\n",
        "            pass\n",
        f"{ACCOUNT} -k hook_is_exchanged",
    ),
    Mutation(
        "a checkpoint claims weights that were trained without noise",
        "privacy/carrying.py",
        "            ledger = _marked(ledger, changed)\n",
        "            pass\n",
        f"{ACCOUNT} -k says_what_was_trained",
    ),
    Mutation(
        "checkpoints of a later private fit count as changed",
        "strategies/training.py",
        "                self._ledger.weights = None\n",
        "                pass\n",
        f"{ACCOUNT} -k within_a_later",
    ),
    Mutation(
        "ckpt_path in a plain Trainer brings no ledger",
        "plugins/entry_point.py",
        "        bring_ledger_with_weights(trainer.strategy)\n",
        "",
        f"{ACCOUNT} -k 'ckpt_path and encrypted-validate'",
    ),
    Mutation(
        "a datamodule relies on a callback for the ledger",
        "data/datamodule.py",
        "            bring_ledger_with_weights(self.trainer.strategy)\n",
        "",
        f"{ACCOUNT} -k where_no_callback",
    ),
    Mutation(
        "weights are not noted when they are loaded",
        "plugins/checkpoint.py",
        "        ledger.weights = noted_weights(module)\n",
        "",
        f"{ACCOUNT} -k 'past_the_ledger and by_hand-loaded'",
    ),
    Mutation(
        "weights are not noted when a Trainer loads them",
        "privacy/ledger.py",
        "        ledger.weights = noted_weights(module, *taken_over)\n",
        "",
        f"{ACCOUNT} -k 'past_the_ledger and by_hand-validated'",
    ),
    Mutation(
        "averaged weights count as changed",
        "privacy/ledger.py",
        '("state_dict", "current_model_state"))',
        '("state_dict",))',
        f"{ACCOUNT} -k 'averaged and EMA'",
    ),
    Mutation(
        "frozen weights are not noted",
        "privacy/weights.py",
        "        if parameter is not None:\n",
        "        if parameter is not None and parameter.requires_grad:\n",
        f"{ACCOUNT} -k 'past_the_ledger and frozen_by_hand-fitted'",
    ),
    Mutation(
        "buffers are not noted",
        "privacy/weights.py",
        "        if buffer is not None:\n",
        "        if False:\n",
        f"{ACCOUNT} -k 'past_the_ledger and a_buffer-fitted'",
    ),
    Mutation(
        "weights of another type are not compared",
        "privacy/weights.py",
        "        if own is None or own in note.digests.get(now, ()):\n",
        "        if own is None or own in note.digests.get(now, (own,)):\n",
        f"{ACCOUNT} -k 'past_the_ledger and by_hand_and_cast'",
    ),
    Mutation(
        "a renamed weight is taken for a new one",
        "privacy/weights.py",
        "                changed.append(name)\n",
        "                pass\n",
        f"{ACCOUNT} -k 'past_the_ledger and renamed_after'",
    ),
    Mutation(
        "elements may change places",
        "privacy/weights.py",
        "(bits[whole:] * places[: bits.numel() - whole])",
        "bits[whole:]",
        f"{ACCOUNT} -k 'past_the_ledger and permuted'",
    ),
    Mutation(
        "weights that were added are trained without noise",
        "privacy/carrying.py",
        '    "on_fit_start": _fit_begins,\n',
        "",
        f"{ACCOUNT} -k 'past_the_ledger and a_new_head-fitted'",
    ),
    Mutation(
        "weights are trained without noise and given another shape",
        "privacy/carrying.py",
        '    "on_fit_end": _fit_ends,\n',
        "",
        f"{ACCOUNT} -k 'past_the_ledger and another_shape'",
    ),
    Mutation(
        "a cast is taken for training",
        "privacy/weights.py",
        "            if narrower != now and narrower.is_floating_point\n",
        "            if False\n",
        f"{ACCOUNT} -k 'no_training and rounded'",
    ),
    Mutation(
        "a weight of which one process holds all counts as whole there",
        "privacy/weights.py",
        "WeightNote(held.shape, _is_sharded(weight), persistent, digests)",
        "WeightNote(held.shape, held.shape != weight.shape, persistent, digests)",
        "tests/strategies/test_fsdp.py -k failed_midway",
    ),
]
