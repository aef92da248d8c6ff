"""What can be said of the packages in `examples/` without installing them; `test_examples.py` does that."""

from __future__ import annotations

import shlex

import pytest
from readmes import EXAMPLES, METHODS, commands
from test_docs import parse


def test_every_package_is_tested() -> None:
    assert set(METHODS) == {path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")}


@pytest.mark.parametrize("package", METHODS)
def test_what_readmes_tell_to_type_is_understood(package: str) -> None:
    found = commands(package)
    assert [words[0] for words in found] == ["show", "check", "matrix"]
    for words in found:
        assert any(METHODS[package] in word for word in words)
        parse(shlex.join(words))
