"""The HTML page in a real browser: no error on its console, sorting by mouse and by keyboard, the drill-down.

`tox -e browser`; skipped, visibly, where no Chromium and driver are installed. BBMCL_SHOTS=DIR keeps screenshots.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import make, page_of
from shelves import Shelves

from backdoorbench_mcl.report import html
from backdoorbench_mcl.report.html import Part, page
from backdoorbench_mcl.report.sheets import Sheet

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver on this machine")


@contextmanager
def chromium(file: Path, height: int) -> Iterator[Any]:
    """A headless Chromium at a page, in a window of 1300 x height pixels."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size=1300,{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    try:
        driver.get(file.as_uri())
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium at the page of a made-up matrix."""
    rows = []
    for i, attack in enumerate(("badnets", "blend", f"sig{HOSTILE}")):
        rows += [
            make(attack, "before", 99.0, 83.0), make(attack, "ft", 30.0 - 10 * i, 80.0 + i),
            make(attack, "mcldef", 2.0 + i, 81.0 - i, knows=("target",)),
        ]  # fmt: skip
    rows.append(make("cl", "ft", state="failed", reason=HOSTILE, stages={"failed": "defend 9"}))
    rows[2] = replace(rows[2], target=0, stages={k: f"{k} 0" for k in ("model", "invert", "defend", "predict")})
    store = Shelves(tmp_path_factory.mktemp("runs"), {"model": 1, "invert": 2, "defend": 1}, 300)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page_of(rows, store=store, below=[
        Sheet("Claims", ("", "claim"), (("C1", HOSTILE),), 2, (HOSTILE,)),
        Sheet("Spread", ("attack", "ASR"), (("a", "10.00±0.10"), ("b", "–"), ("c", "2.50±1.00"), ("d", "-1")), 1),
    ]))  # fmt: skip
    with chromium(file, 1400) as driver:
        yield driver


def shot(browser: Any, name: str) -> None:
    folder = os.environ.get("BBMCL_SHOTS")
    if folder:
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def order(browser: Any) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "table.grid tbody th")]


def heading(browser: Any, text: str) -> Any:
    found = browser.find_elements(By.CSS_SELECTOR, "table.grid thead button")
    return next(button for button in found if button.text.startswith(text))


def test_a_column_sorts_by_mouse_and_by_keyboard(browser: Any) -> None:
    first = order(browser)
    assert [name[:3] for name in first] == ["bad", "ble", "sig", "cl"]
    shot(browser, "page")
    heading(browser, "ft ASR").click()
    assert [name[:3] for name in order(browser)] == ["sig", "ble", "bad", "cl"]  # the failed cell stays below
    button = heading(browser, "ft ASR")
    assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    button.send_keys(Keys.ENTER)
    assert [name[:3] for name in order(browser)] == ["bad", "ble", "sig", "cl"]
    heading(browser, "attack").send_keys(Keys.SPACE)
    assert order(browser) == sorted(order(browser), key=str.lower)


def test_a_sheet_sorts_by_numbers(browser: Any) -> None:
    table = browser.find_element(By.XPATH, "//h2[text()='Spread']/following::table[1]")

    def lines() -> str:
        return "".join(row.text[0] for row in table.find_elements(By.CSS_SELECTOR, "tbody tr"))

    button = next(b for b in table.find_elements(By.CSS_SELECTOR, "thead button") if b.text.startswith("ASR"))
    button.click()
    assert lines() == "dcab"  # as text 10.00 would be before 2.50; what is no number stays below
    button.send_keys(Keys.ENTER)
    assert lines() == "acdb"


def test_a_cell_opens_and_closes_by_keyboard(browser: Any) -> None:
    cell = browser.find_element(By.CSS_SELECTOR, "td button")
    cell.send_keys(Keys.ENTER)
    dialog = browser.find_element(By.ID, "cell")
    assert dialog.get_attribute("open") is not None
    assert "victim seed 0" in dialog.text
    assert "8910 of 9000" in dialog.text
    shot(browser, "cell")
    dialog.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None


def test_a_cell_shows_what_its_stages_left(browser: Any) -> None:
    cell = browser.find_elements(By.XPATH, "//tr[th='badnets']//td/button")[-1]
    assert cell.text.startswith("81.00")
    cell.click()
    dialog = browser.find_element(By.ID, "cell")
    titles = [title.text for title in dialog.find_elements(By.TAG_NAME, "h3")]
    assert titles == [
        "Triggers", "Training of the victim: curve 0", "Inversion: curve 0", "Inversion: curve 1", "Repair: curve 0",
        "Clean images of the target class 0: what the model calls them", "Triggered images: what the model calls them",
        "Parameters", "Provenance",
    ]  # fmt: skip
    lines = dialog.find_elements(By.TAG_NAME, "polyline")
    assert [len(line.get_attribute("points").split()) for line in lines] == [200] * 4
    assert "steps 0 to 299" in dialog.find_element(By.TAG_NAME, "svg").text
    assert '"name": "mcldef"' in dialog.text
    shot(browser, "stages")
    browser.find_element(By.CSS_SELECTOR, "button.close").click()


def test_text_of_others_stays_text(browser: Any) -> None:
    failed = next(b for b in browser.find_elements(By.CSS_SELECTOR, "td button") if b.text == "failed")
    failed.click()
    dialog = browser.find_element(By.ID, "cell")
    assert HOSTILE in dialog.text
    assert "defend 9" in dialog.text  # the end of the log
    assert not browser.find_elements(By.CSS_SELECTOR, "img[src=x]")
    browser.find_element(By.CSS_SELECTOR, "button.close").click()


def test_two_parts_have_each_its_grids_and_a_link(tmp_path: Path) -> None:
    shared = [make("badnets", "before", 99.0, 83.0), make("badnets", "mcldef", 3.0, 80.0)]
    parts = [Part("Table 1", [*shared, make("badnets", "nad", 30.0, 81.0)]),
             Part("Table 2", [*shared, make("badnets", "mcldef(inverter=mesa)", 20.0, 82.0)]),
             Part("table1, table2: claims", (), [Sheet("Claims", ("", "claim"), (("C1", "holds"),), 2)])]  # fmt: skip
    file = tmp_path / "page.html"
    file.write_text(page(parts, printed_names=True))
    with chromium(file, 1400) as driver:
        assert [link.text for link in driver.find_elements(By.CSS_SELECTOR, "nav a")] == [part.title for part in parts]
        shot(driver, "parts")
        driver.find_element(By.LINK_TEXT, "Table 2").click()
        assert driver.execute_script("return document.querySelector(':target').textContent") == "Table 2"
        best = [[cell.text for cell in table.find_elements(By.CSS_SELECTOR, "td.best button")]
                for table in driver.find_elements(By.CSS_SELECTOR, "table.grid")]  # fmt: skip
        assert best == [["3.00", "81.00"], ["3.00", "82.00"]]
        tops = [table.location["y"] for table in driver.find_elements(By.CSS_SELECTOR, "table.grid")]
        heads = [head.location["y"] for head in driver.find_elements(By.CSS_SELECTOR, "h2.part")]
        assert heads[0] < tops[0] < heads[1] < tops[1] < heads[2]
        driver.find_elements(By.XPATH, "//tr[th='BadNets']//td/button")[-1].click()  # of the second grid
        assert "badnets / mcldef(inverter=mesa), victim seed 0" in driver.find_element(By.ID, "cell").text
        shot(driver, "part-cell")
        assert driver.get_log("browser") == []


def test_a_cell_says_how_many_of_its_runs_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "SIZE", 0)
    monkeypatch.setattr(html, "LEAST", 3_000)
    file = tmp_path / "page.html"
    file.write_text(page_of([make("badnets", "ft", 5.0 + victim, victim=victim) for victim in range(20)]))
    with chromium(file, 1400) as driver:
        driver.find_elements(By.XPATH, "//tr[th='badnets']//td/button")[-1].click()
        dialog = driver.find_element(By.ID, "cell")
        shown = len(dialog.find_elements(By.TAG_NAME, "h2"))
        assert 1 <= shown < 20
        assert dialog.text.endswith(f"Not shown, to keep the page small: {20 - shown} of the 20 runs of this cell.")


def test_the_console_stays_empty(browser: Any) -> None:
    assert browser.get_log("browser") == []
