"""Needs a package that is not there."""

from __future__ import annotations

import a_package_that_is_not_installed  # type: ignore[import-not-found]

print(a_package_that_is_not_installed)
