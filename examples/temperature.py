"""How MCLDef depends on its temperature, as a table and a picture: `python examples/temperature.py [RUNS]`.

A quick run on the toy data set `shapes`: about 15 minutes on 2 cores the first time, seconds afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

import backdoorbench_mcl as bbmcl

TEMPERATURES = [0.1, 0.5, 2.0]


def main(runs: str = "bbmcl-runs", **options: Any) -> None:
    """options: of `bbmcl.run`, instead of those of the example."""
    cells = bbmcl.run(
        "badnets", ["ft", "mcldef"], runs=runs, sweep={"mcldef.temperature": TEMPERATURES}, parameters=True, **options
    )
    done = cells[(cells.state == "ok") & (cells.defense != "before")]
    table = done.groupby("defense")[["asr", "ftr", "ba", "tca", "seconds"]].mean()
    print(table.round(2).to_string())

    curve = done[done["defense.temperature"].notna()].set_index("defense.temperature")[["asr", "ftr", "ba"]]
    figure, axes = plt.subplots()
    curve.plot(ax=axes, logx=True, marker="o", xlabel="temperature", ylabel="%", title="badnets, mcldef")
    file = Path(runs) / "temperature.png"
    figure.savefig(file)
    plt.close(figure)
    print(file)

    stored = bbmcl.load_results(runs)  # everything in the folder, earlier runs included
    print(f"{len(stored)} cells stored; seconds in all: {stored.seconds.sum():.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
