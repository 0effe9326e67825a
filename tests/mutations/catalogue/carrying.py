"""A ledger stays with its weights, and notes what they are."""

from __future__ import annotations

from mutation import Mutation

ACCOUNT = "tests/attacks/test_account.py"

CATALOGUE = [
    Mutation(
        "a plain Trainer saves weights without their ledger",
        "privacy/accounting/carried_ledger.py",
        '    "on_save_checkpoint": _saving,\n',
        "",
        f"{ACCOUNT} -k 'saves_the_ledger and redacted'",
    ),
    Mutation(
        "a hook of the module's own takes the ledger out again",
        "privacy/accounting/carried_ledger.py",
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
        "privacy/accounting/carried_ledger.py",
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
        "        introduce(trainer.strategy)\n"
        "        bring_ledger_with_weights(trainer.strategy)\n",
        "        introduce(trainer.strategy)\n",
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
        "privacy/accounting/carried_ledger.py",
        "        ledger.weights = noted_weights(module, *((state, average) if average else ()))\n",
        "",
        f"{ACCOUNT} -k 'past_the_ledger and by_hand-validated'",
    ),
    Mutation(
        "weights are noted before they are loaded",
        "privacy/accounting/carried_ledger.py",
        "    try:\n        load()\n    finally:\n",
        "    with contextlib.ExitStack() as late:\n        late.callback(load)\n",
        f"{ACCOUNT} -k 'hook_renames and False'",
    ),
    Mutation(
        "a part of another module has no ledger there",
        "privacy/accounting/carried_ledger.py",
        "    found = list(carriers)\n",
        "    return [one for one in carriers if not one.name]\n",
        f"{ACCOUNT} -k 'part_brings and itself-False'",
    ),
    Mutation(
        "layers do not know that they were trained privately",
        "privacy/accounting/carried_ledger.py",
        "            vars(part)[_PART] = (ledger, name)\n",
        "            pass\n",
        f"{ACCOUNT} -k 'part_brings and layers-False'",
    ),
    Mutation(
        "public parts count as privately trained",
        "strategies/account.py",
        "if parameter.requires_grad)",
        "if parameter is not None)",
        f"{ACCOUNT} -k public_parts",
    ),
    Mutation(
        "weights of a part are noted under their former names",
        "privacy/accounting/carried_ledger.py",
        "            prefix + name.removeprefix(below): note\n",
        "            name: note\n",
        f"{ACCOUNT} -k 'part_brings and itself-False'",
    ),
    Mutation(
        "one of several runs is forgotten",
        "privacy/accounting/carried_ledger.py",
        "    if len({one.ledger.run_id for one in released}) > 1:\n",
        "    if len(released) > 99:\n",
        f"{ACCOUNT} -k 'several_runs and itself'",
    ),
    Mutation(
        "a plain Trainer does not look for ledgers in parts",
        "privacy/accounting/carried_ledger.py",
        "        watch_ledger(strategy.lightning_module)\n",
        "",
        f"{ACCOUNT} -k 'part_brings and itself-False'",
    ),
    Mutation(
        "parts that setup makes are not looked at",
        "plugins/entry_point.py",
        "        self.on_fit_start(trainer, pl_module)\n",
        "",
        f"{ACCOUNT} -k made_in_setup",
    ),
    Mutation(
        "each checkpoint warns again of changed weights",
        "privacy/accounting/carried_ledger.py",
        "        if not ledger.change_told:\n",
        "        if ledger:\n",
        f"{ACCOUNT} -k warns_once",
    ),
    Mutation(
        "averaged weights count as changed",
        "privacy/accounting/carried_ledger.py",
        "*((state, average) if average else ()))",
        ")",
        f"{ACCOUNT} -k 'averaged and EMA'",
    ),
    Mutation(
        "frozen weights are not noted",
        "privacy/accounting/weight_notes.py",
        "        if parameter is not None:\n",
        "        if parameter is not None and parameter.requires_grad:\n",
        f"{ACCOUNT} -k 'past_the_ledger and frozen_by_hand-fitted'",
    ),
    Mutation(
        "buffers are not noted",
        "privacy/accounting/weight_notes.py",
        "        if buffer is not None:\n",
        "        if False:\n",
        f"{ACCOUNT} -k 'past_the_ledger and a_buffer-fitted'",
    ),
    Mutation(
        "weights of another type are not compared",
        "privacy/accounting/weight_notes.py",
        "        if own is None or own in note.digests.get(now, ()):\n",
        "        if own is None or own in note.digests.get(now, (own,)):\n",
        f"{ACCOUNT} -k 'past_the_ledger and by_hand_and_cast'",
    ),
    Mutation(
        "a renamed weight is taken for a new one",
        "privacy/accounting/weight_notes.py",
        "                changed.append(name)\n",
        "                pass\n",
        f"{ACCOUNT} -k 'past_the_ledger and renamed_after'",
    ),
    Mutation(
        "elements may change places",
        "privacy/accounting/weight_notes.py",
        "(bits[whole:] * places[: bits.numel() - whole])",
        "bits[whole:]",
        f"{ACCOUNT} -k 'past_the_ledger and permuted'",
    ),
    Mutation(
        "weights that were added are trained without noise",
        "privacy/accounting/carried_ledger.py",
        '    "on_fit_start": _fit_begins,\n',
        "",
        f"{ACCOUNT} -k 'past_the_ledger and a_new_head-fitted'",
    ),
    Mutation(
        "weights are trained without noise and given another shape",
        "privacy/accounting/carried_ledger.py",
        '    "on_fit_end": _fit_ends,\n',
        "",
        f"{ACCOUNT} -k 'past_the_ledger and another_shape'",
    ),
    Mutation(
        "a cast is taken for training",
        "privacy/accounting/weight_notes.py",
        "            if narrower != now and narrower.is_floating_point\n",
        "            if False\n",
        f"{ACCOUNT} -k 'no_training and rounded'",
    ),
    Mutation(
        "a weight of which one process holds all counts as whole there",
        "privacy/accounting/weight_notes.py",
        "WeightNote(held.shape, _is_sharded(weight), persistent, digests)",
        "WeightNote(held.shape, held.shape != weight.shape, persistent, digests)",
        "tests/strategies/test_fsdp.py -k failed_midway",
    ),
]
