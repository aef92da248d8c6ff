"""What the detection benchmark makes of stored scans: the verdict of now on their sizes, the counts of its table."""

from __future__ import annotations

from typing import Any

import detection

OTHERS = (60.0, 44.0, 62.0, 47.0, 54.0, 45.0, 54.0, 60.0, 51.0)


def line(attack: str, first: float, target: int | None) -> dict[str, Any]:
    """A stored scan: patches of these sizes, label 0 first, as an earlier verdict of another mind wrote it."""
    labels = [
        {"kind": "patch", "label": label, "size": size, "success": 100.0, "index": None, "ratio": None, "chance": None}
        for label, size in enumerate((first, *OTHERS))
    ]
    return {"attack": attack, "target": target, "call": "undecided", "said": None, "kind": None, "labels": labels}


def test_a_stored_scan_is_judged_as_a_new_one() -> None:
    found = detection.judged_again(line("badnets", 12.0, 0))
    assert (found["call"], found["said"], found["kind"]) == ("suspicious", 0, "patch")
    clean = detection.judged_again(line("none", 50.0, None))
    assert (clean["call"], clean["said"]) == ("clean", None)


def test_a_scan_that_failed_stays_one() -> None:
    failed = {**line("badnets", 12.0, 0), "call": "failed", "labels": []}
    assert detection.judged_again(failed) == failed


def test_the_table_counts_alarms_labels_and_doubts() -> None:
    lines = [line("badnets", 12.0, 0), line("badnets", 12.0, 3), line("badnets", 50.0, 0), line("none", 50.0, None)]
    *_, badnets, none = detection.table([detection.judged_again(one) for one in lines]).splitlines()
    assert [cell.strip() for cell in badnets.split("|")][1:6] == ["badnets", "3", "2", "1", "0"]
    assert [cell.strip() for cell in none.split("|")][1:4] == ["none", "1", "0"]
