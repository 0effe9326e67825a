"""Checkpoints."""

from __future__ import annotations

from mutation import Mutation

CHECKPOINT = "tests/plugins/test_checkpoint.py"
ASKING = "tests/plugins/test_asking.py"
CONSTRUCTOR = "tests/plugins/test_constructor.py"
READABLE = "tests/plugins/test_readable.py"

CATALOGUE = [
    Mutation(
        "a truncated stream is parsed",
        "crypto/stream.py",
        "        self._load(full, rest - _TAG)\n        return full",
        "        return full",
        "tests/crypto/test_stream.py -k truncated",
    ),
    Mutation(
        "a checkpoint's header is not bound to it",
        "plugins/checkpoint.py",
        "context=prefix, start=len(prefix))",
        'context=b"", start=len(prefix))',
        CHECKPOINT,
    ),
    Mutation(
        "a checkpoint can run code",
        "plugins/checkpoint.py",
        "map_location=map_location or _to_cpu, weights_only=True",
        "map_location=map_location or _to_cpu, weights_only=False",
        f"{CHECKPOINT} -k code",
    ),
    Mutation(
        "a plaintext checkpoint is taken",
        "plugins/checkpoint.py",
        "with opened(path, keys=self._keys) as stream, self._allowed():",
        "from pathlib import Path as P\n"
        "        known = P(path).read_bytes().startswith(CHECKPOINT.magic)\n"
        "        source = opened(path, keys=self._keys) if known else P(path).open('rb')\n"
        "        with source as stream, self._allowed():",
        f"{CHECKPOINT} -k plaintext",
    ),
    Mutation(
        "a strategy that writes checkpoints itself is not met in a Trainer",
        "plugins/entry_point.py",
        "return [Introduction()] if _OURS & sys.modules.keys() else []",
        "return []",
        f"{ASKING} -k 'past_a_checkpoint_io and background'",
    ),
    Mutation(
        "a datamodule sets up before it is known who writes checkpoints",
        "data/datamodule.py",
        "            introduce(self.trainer.strategy)\n",
        "            pass\n",
        f"{ASKING} -k looks_by_itself",
    ),
    Mutation(
        "a strategy that nobody knows counts as one that asks",
        "plugins/asking.py",
        "return owner in known and known[owner](strategy)",
        "return owner not in known or known[owner](strategy)",
        f"{ASKING} -k 'known_which and PassesOn'",
    ),
    Mutation(
        "what a strategy says of itself holds for whoever overrides it",
        "plugins/asking.py",
        "    if vars(owner).get(_DECLARED) is True:",
        "    if getattr(owner, _DECLARED, None) is True:",
        f"{ASKING} -k 'known_which and SaidElsewhere'",
    ),
    Mutation(
        "a run goes on from a checkpoint that nobody has authenticated",
        "plugins/checkpoint.py",
        "        if loaded:\n",
        "        if False:\n",
        f"{ASKING} -k read_past_it",
    ),
    Mutation(
        "a refused run is saved by whoever saves on exceptions",
        "plugins/entry_point.py",
        "        self.on_train_start(trainer, pl_module)\n",
        "        return\n",
        f"{ASKING} -k 'refusal and entry'",
    ),
    Mutation(
        "jsonargparse makes the module of a checkpoint that LightningCLI wrote",
        "plugins/constructor.py",
        "    return {_INSTANTIATOR: None, **_converted(kind, missing, parameters), **given}",
        "    return dict(given)",
        f"{CONSTRUCTOR} -k 'is_called and hyper_parameters and alone'",
        more=(
            ("    if named:\n        raise _to_be_given(kind, named)\n    if not", "    if not"),
        ),
    ),
    Mutation(
        "a class path is given to a module as a mapping",
        "plugins/constructor.py",
        'return any(isinstance(part, dict) and "class_path" in part for part in _all(value))',
        "return False",
        f"{CONSTRUCTOR} -k without_an_instantiator",
    ),
    Mutation(
        "what a checkpoint names as the type of its hyperparameters is called",
        "plugins/constructor.py",
        "    if not (made is None or isinstance(made, str)",
        "    if False and (made is None or isinstance(made, str)",
        f"{CONSTRUCTOR} -k type_of_hyperparameters",
    ),
    Mutation(
        "a resolver of OmegaConf that a checkpoint names is called",
        "plugins/constructor.py",
        "    if interpolated and any(",
        "    if False and any(",
        f"{CONSTRUCTOR} -k resolver",
    ),
    Mutation(
        "a checkpoint chooses the class",
        "plugins/constructor.py",
        'path.rpartition(".")[2] != kind.__name__:',
        "False:",
        f"{CONSTRUCTOR} -k choose_the_class",
    ),
    Mutation(
        "what would be written is looked at by its names only",
        "plugins/readable.py",
        '                loaded = torch.load(buffer, map_location="cpu", weights_only=True)\n',
        "                return None\n",
        f"{READABLE} -k until_nothing_is",
    ),
    Mutation(
        "what comes back as something else is written",
        "plugins/readable.py",
        "    if not _same(value, loaded, {}):",
        "    if False:",
        f"{READABLE} -k something_else",
    ),
    Mutation(
        "what has the id of a part that is gone is not compared",
        "plugins/readable.py",
        "    seen[id(given)] = given\n",
        "    seen[id(given)] = None\n",
        f"{READABLE} -k hide_nothing",
    ),
    Mutation(
        "a duration is written as a number",
        "plugins/readable.py",
        'plain if same and value.dtype.kind in "biufcSU" else value',
        "plain if same else value",
        f"{READABLE} -k 'refused_by_name and duration'",
    ),
    Mutation(
        "a scalar of numpy is written as what does not equal it",
        "plugins/readable.py",
        'plain if same and value.dtype.kind in "biufcSU" else value',
        'plain if value.dtype.kind in "biufcSU" else value',
        f"{READABLE} -k 'refused_by_name and cuts'",
    ),
    Mutation(
        "hyperparameters that cannot be read back cost the steps before the first save",
        "plugins/checkpoint.py",
        "        require_readable(planned, safe_globals=self._safe_globals, planned=True)\n",
        "",
        f"{READABLE} -k 'before_the_first_step and range and plain'",
    ),
    Mutation(
        "a run ends before its last checkpoint is written",
        "plugins/hyperparameters.py",
        "            self.checkpoint_io.teardown()\n",
        "            pass\n",
        f"{READABLE} -k last_checkpoint",
    ),
    Mutation(
        "what is written behind two threads is waited for by neither",
        "plugins/hyperparameters.py",
        "        if threading.current_thread() is not threading.main_thread():",
        "        if False:",
        f"{READABLE} -k last_checkpoint",
    ),
    Mutation(
        "LightningCLI reads an encrypted checkpoint by itself",
        "plugins/command_line.py",
        '        if "nothing" in used or _is_encrypted(Path(path)):',
        "        if False:",
        "tests/plugins/test_command_line.py -k is_opened",
    ),
    Mutation(
        "LightningCLI makes what a planted checkpoint in the clear names",
        "plugins/command_line.py",
        'if "nothing" in used or _is_encrypted(Path(path)):',
        "if _is_encrypted(Path(path)):",
        "tests/plugins/test_command_line.py -k 'makes_nothing and plain'",
    ),
    Mutation(
        "LightningCLI makes what a checkpoint names beside redacted hyperparameters",
        "plugins/command_line.py",
        '        if "plain values" in used:\n',
        "        if False:\n",
        "tests/plugins/test_command_line.py -k 'names_nothing and act'",
    ),
    Mutation(
        "what was redacted wins over what is given again",
        "plugins/command_line.py",
        "            cli.config[key] = before[key]\n",
        "            pass\n",
        "tests/plugins/test_command_line.py -k wins",
    ),
]
