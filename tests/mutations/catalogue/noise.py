"""Where noise and draws come from."""

from __future__ import annotations

from mutation import Mutation

NOISE = "tests/privacy/test_noise.py"
STREAM = "tests/crypto/test_keystream.py"

CATALOGUE = [
    Mutation(
        "a number of noise is used twice",
        "privacy/noise/gaussian.py",
        "self._ready[dtype] = ready[most:]",
        "self._ready[dtype] = ready[max(most - 1, 0) :]",
        f"{NOISE} -k used_twice",
    ),
    Mutation(
        "secure noise is one number and not four",
        "privacy/noise/gaussian.py",
        "return four.sum(1).div_(2).view(-1)",
        "return four[:, 0].reshape(-1)",
        f"{NOISE} -k four_numbers",
    ),
    Mutation(
        "the keystream begins anew with each call",
        "crypto/keystream.py",
        "        view = memoryview(out)\n",
        "        view = memoryview(out)\n        self._begin(bytes(KEY_BYTES))\n",
        f"{STREAM} -k 'goes_on or system'",
    ),
    Mutation(
        "a fork goes on with its parent's keystream",
        "crypto/keystream.py",
        "            self._begin(secrets.token_bytes(KEY_BYTES))\n        out",
        "            pass\n        out",
        f"{STREAM} -k fork",
    ),
    Mutation(
        "secure noise leaves the draws to numpy",
        "strategies/training.py",
        "            secure=self.config.secure_noise,\n            rank=",
        "            rank=",
        "tests/strategies/test_private.py -k secure_noise",
    ),
]
