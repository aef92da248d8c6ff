"""The page on a handed model in a real browser: nothing is loaded, run or broken by names from a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backdoorbench_mcl.audit.handed import Handed
from backdoorbench_mcl.audit.page import page
from backdoorbench_mcl.audit.purify import ClassAccuracy, Judgement, Repair
from backdoorbench_mcl.audit.scan import KINDS, Found, Scan
from backdoorbench_mcl.audit.verdict import Sized, standings
from backdoorbench_mcl.registry import Described

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By
from test_page import CHROMIUM, DRIVER, HOSTILE, chromium, shot

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver on this machine")
SIZES = (40.0, 44.0, 39.0, 47.0, 4.0, 45.0)


def written(folder: Path) -> Path:
    """A page on a made-up model whose classes have hostile names."""
    rng = np.random.Generator(np.random.PCG64(0))
    x = rng.integers(0, 256, (30, 3, 16, 16)).astype(np.uint8)
    names = tuple(f"class {i}{HOSTILE}" for i in range(6))
    handed = Handed(
        folder, Described("model", "net", "net", "m:N", "", {}, 1, "net", {}), "ab", 6, (3, 16, 16), (0.5,) * 3,
        (0.25,) * 3, True, x, np.arange(30) % 6, np.arange(20), np.arange(20, 30), "cd", names,
    )  # fmt: skip
    labels = [one for kind in KINDS for one in standings(Sized(kind.name, SIZES, (100.0,) * 6), 2)]
    pattern = rng.random((3, 16, 16)).astype(np.float32)
    triggers = [Found(kind.name, label, size, 100.0, pattern, None if kind.name == "additive" else pattern[0])
                for kind in KINDS for label, size in enumerate(SIZES)]  # fmt: skip
    found = Scan("suspicious", f"because {HOSTILE}", 4, "patch", 1e-4, tuple(labels), tuple(triggers), (triggers[4],),
                 (HOSTILE,), 20, 3.0, names)  # fmt: skip
    told = Judgement(10, 90.0, 90.0, 80.0, (ClassAccuracy(0, 5, 100.0, 80.0),), 99.0, 1.0, 2.0)
    features: dict[str, Any] = {f"xy.{name}": rng.random((20, 2)) for name in ("before", "after")}
    features |= {"label": np.arange(20) % 6, "triggered": (np.arange(20) > 14).astype(np.uint8)}
    repairs = [Repair(f"mcldef{HOSTILE}", 4, folder, told, 1.0, False, features=features),
               Repair("ft", 4, None, Judgement(0), 1.0, True, HOSTILE)]  # fmt: skip
    file = folder / "card.html"
    file.write_text(page(f"bbmcl: {HOSTILE}", [("model", HOSTILE)], handed, found, [97.0], repairs))
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(written(tmp_path_factory.mktemp("card")), 2600) as driver:
        yield driver


def test_the_page_has_no_error_and_runs_nothing(browser: Any) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert browser.find_elements(By.TAG_NAME, "script") == []
    shot(browser, "card")


def test_names_are_text_and_every_picture_is_drawn(browser: Any) -> None:
    assert HOSTILE in browser.find_element(By.TAG_NAME, "h1").text
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 2 * len(SIZES) + 4 + 1
    sizes = [browser.execute_script("return arguments[0].naturalWidth", picture) for picture in pictures]
    assert all(size > 0 for size in sizes)
    marked = browser.find_element(By.CSS_SELECTOR, "tr.target")
    assert marked.text.startswith("4 (class 4") and "<--" in marked.text
