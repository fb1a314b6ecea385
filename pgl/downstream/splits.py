"""Who is tested on and who is trained on: by patient, the same in every run.

The test patients follow from the cases' names and ``split.seed`` alone. The training patients stand in an
order that follows from their names and the run's seed; a fraction takes the first of them, so a smaller
fraction is a part of every larger one.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pgl.downstream.config import SplitSettings


@dataclass(frozen=True)
class Split:
    """Names of cases, sorted.

    Attributes:
        training: whose labels are used.
        unused: training cases beyond the fraction.
        test: never trained on.
    """

    training: list[str]
    unused: list[str]
    test: list[str]


def patient_of(subject: str, pattern: str) -> str:
    """The patient that a case belongs to.

    Raises:
        ValueError: the pattern does not match its name.
    """
    if not pattern:
        return subject
    match = re.search(pattern, subject)
    if match is None or match[1] is None:
        raise ValueError(f"split.patient {pattern!r} does not match the case {subject!r}")
    return match[1]


def split_cases(subjects: Sequence[str], settings: SplitSettings, fraction: float, seed: int) -> Split:
    """Divide the cases.

    Args:
        subjects: names of all labelled cases.
        settings: of the test cases.
        fraction: share of the training patients to use, in (0, 1].
        seed: of the training patients' order.

    Raises:
        ValueError: no case is left to test on or to train on, or a named test case is not there.
    """
    patients: dict[str, list[str]] = {}
    for subject in sorted(subjects):
        patients.setdefault(patient_of(subject, settings.patient), []).append(subject)
    test = _test_patients(patients, settings)
    order = sorted((p for p in patients if p not in test), key=lambda p: _hash(f"train {seed} {p}"))
    if not order:
        raise ValueError(
            f"all {len(patients)} patients are tested on and none is left to train on: lower "
            "split.test_fraction, name fewer split.test_subjects, or prepare more labelled cases"
        )
    count = math.floor(fraction * len(order) + 0.5)
    if count < 1:
        raise ValueError(
            f"fraction {fraction:g} of {len(order)} training patients leaves no case: give at least "
            f"{math.ceil(50 / len(order) * 10) / 1000:g}"
        )
    return Split(
        training=sorted(s for p in order[:count] for s in patients[p]),
        unused=sorted(s for p in order[count:] for s in patients[p]),
        test=sorted(s for p in test for s in patients[p]),
    )


def _test_patients(patients: dict[str, list[str]], settings: SplitSettings) -> set[str]:
    if settings.test_subjects:
        known = {subject: p for p, subjects in patients.items() for subject in subjects}
        missing = sorted(set(settings.test_subjects) - set(known))
        if missing:
            raise ValueError(
                f"split.test_subjects: no labelled case is called {', '.join(missing[:5])}; there are "
                f"{', '.join(sorted(known)[:5])}…"
            )
        return {known[subject] for subject in settings.test_subjects}
    count = max(1, math.floor(settings.test_fraction * len(patients) + 0.5))
    return set(sorted(patients, key=lambda p: _hash(f"test {settings.seed} {p}"))[:count])


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
