"""All checks, which of them concern a kind of method, and the decorator that makes tests of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import NotApplicable
from ..method import Method
from . import attacks, confined, datasets, every, networks, repairs
from .core import Check, CheckFailed, Skipped, Subject

if TYPE_CHECKING:
    import pytest

_MODULES = (every, attacks, repairs, networks, datasets, confined)
CHECKS: tuple[Check, ...] = tuple(
    found for module in _MODULES for found in vars(module).values() if isinstance(found, Check)
)


def checks_for(kind: str) -> list[Check]:
    """The checks of methods of one kind: "attack", "inverter", "defense", "model" or "dataset"."""
    return [check for check in CHECKS if kind in check.kinds]


def parametrize_with_checks(
    methods: Iterable[Method | Subject], expected_failures: Mapping[str, str] | None = None
) -> pytest.MarkDecorator:
    """A pytest decorator: one test per method and check. The test takes `check` and calls it.

    expected_failures: names of checks, or `"label:check_name"` for one of several methods, to the reason. They are
    strict: a check that is expected to fail and passes fails the test. Raises ValueError for a name that is no check.

    Example::

        @parametrize_with_checks([MyDefense(), MyDefense(smoothing=0.2)])
        def test_conformance(check):
            check()
    """
    import pytest

    expected = dict(expected_failures or {})
    subjects = [method if isinstance(method, Subject) else Subject.of(method) for method in methods]
    known = {check.name for check in CHECKS}
    wrong = sorted(name for name in expected if name.rpartition(":")[2] not in known)
    if wrong:
        raise ValueError(f"expected_failures names {', '.join(wrong)}; the checks are {', '.join(sorted(known))}")
    cases = []
    for subject in subjects:
        label = subject.label or subject.target
        for check in checks_for(subject.kind):
            reason = expected.get(f"{label}:{check.name}", expected.get(check.name))
            marks = [] if reason is None else [pytest.mark.xfail(strict=True, raises=CheckFailed, reason=reason)]
            cases.append(pytest.param(_bound(check, subject), id=f"{label}-{check.name}", marks=marks))
    return pytest.mark.parametrize("check", cases)


def _bound(check: Check, subject: Subject) -> Callable[[], Any]:
    def run() -> None:
        import pytest
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as `bbmcl check` does: on tensors this small, threads wait for each other
        try:
            check(subject)
        except (Skipped, NotApplicable) as reason:
            pytest.skip(str(reason))
        finally:
            torch.set_num_threads(before)

    return run


__all__ = ["CHECKS", "checks_for", "parametrize_with_checks"]
