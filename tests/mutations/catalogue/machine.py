"""A machine on which something is absent or damaged: what the doctor says of it."""

from __future__ import annotations

from mutation import Mutation

DOCTOR = "tests/cli/test_doctor.py"

CATALOGUE = [
    Mutation(
        "an extra whose package cannot be imported is called well",
        "cli/doctor.py",
        "    if module in broken:\n",
        "    if False:\n",
        f"{DOCTOR} -k 'damaged and vault'",
    ),
    Mutation(
        "a package with damaged metadata is called well",
        "cli/doctor.py",
        'return "bad", f"its metadata is damaged; ',
        'return "ok", f"its metadata is damaged; ',
        f"{DOCTOR} -k 'damaged and plot'",
    ),
    Mutation(
        "half of an extra is called well",
        "cli/doctor.py",
        'else "missing" if "missing" in statuses else "ok"',
        'else "ok" if "ok" in statuses else "missing"',
        f"{DOCTOR} -k optional_package",
    ),
    Mutation(
        "an extra is not looked at",
        "cli/doctor.py",
        "if name != _DEVELOPMENT]",
        'if name not in {_DEVELOPMENT, "images"}]',
        f"{DOCTOR} -k every_extra",
    ),
    Mutation(
        "a wheel whose own metadata is damaged is called well",
        "cli/doctor.py",
        'Check(_DISTRIBUTION, "bad", found)',
        'Check(_DISTRIBUTION, "ok", found)',
        f"{DOCTOR} -k own_metadata",
    ),
    Mutation(
        "a bad release that came with another package is not seen",
        "cli/doctor.py",
        "        *_infected({requirement.name for requirement in required}),\n",
        "",
        f"{DOCTOR} -k 'damaged and pytorch'",
    ),
]
