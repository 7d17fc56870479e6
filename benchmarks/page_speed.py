"""How fast the page of a large study opens and answers, in headless Chromium.

    python benchmarks/page_speed.py                      # a made-up study of 500 trials
    python benchmarks/page_speed.py reports/<study>      # or one of yours

Every opening is in a fresh browser with a fresh profile, so nothing is cached: the time is from the start of the
navigation until the figures near the window are drawn and two frames have been shown. A move of the slider is timed
from the input to the frame after the figure is drawn. Times grow with whatever else runs: the load and the processor
seconds of the page's main thread are written beside them. Writes reports/search/page_speed.json and a picture of each
window.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import chromium  # noqa: E402
from synthetic_study import make_study  # noqa: E402

from nas.paths import atomic_write  # noqa: E402
from nas.provenance import provenance  # noqa: E402
from nas.report import build_report  # noqa: E402

_TRIALS = 500
_WINDOWS = (("wide", 1280, 900, False), ("phone", 390, 844, False), ("dark", 1280, 900, True))
_MOVE = """
(async () => {
  const slider = document.getElementById("budget"), frame = () => new Promise(requestAnimationFrame), times = [];
  const last = Number(slider.max);
  for (let i = 0; i < 20; i++) {
    slider.value = Math.round(last * (1 - i / 20));
    const start = performance.now();
    slider.dispatchEvent(new Event("input", { bubbles: true }));
    await frame();
    await frame();
    times.push(performance.now() - start);
  }
  return times;
})()
"""


def measure(page: Path, repeats: int, pictures: Path) -> dict[str, Any]:
    """Opens `page` in each window `repeats` times; seconds, milliseconds and what went wrong."""
    found: dict[str, Any] = {}
    for name, width, height, dark in _WINDOWS:
        opened, busy, moves, errors = [], [], [], []
        for _ in range(repeats):
            with chromium.page() as tab:
                opened.append(tab.open(page, width=width, height=height, dark=dark))
                busy.append(tab.busy_s())
                tab.screenshot(pictures / f"page-{name}.png")
                moves += tab.run(_MOVE)
                tab.run("dispatchEvent(new Event('beforeprint'))")  # every figure
                errors += [*tab.errors, *tab.fetched]
        found[name] = {
            "open_s": [round(each, 3) for each in opened],
            "main_thread_s": [round(each, 3) for each in busy],
            "slider_ms": {"median": round(statistics.median(moves), 1), "worst": round(max(moves), 1)},
            "errors": errors,
        }
        print(
            f"{name}: opens in {statistics.median(opened):.2f} s, worst {max(opened):.2f} s; main thread"
            f" {max(busy):.2f} s; a move of the slider {statistics.median(moves):.0f} ms"
        )
    return found


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("study", type=Path, nargs="?", help=f"default: a made-up one of {_TRIALS} trials")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "search")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        study = given.study or make_study(Path(folder) / "made-up", trials=_TRIALS)
        started = time.monotonic()
        page = build_report(study)
        built_s = time.monotonic() - started
        windows = measure(page, given.repeats, given.out)
        size = page.stat().st_size
    worst_s = max(max(window["open_s"]) for window in windows.values())
    result = {
        "study": study.name,
        "build_s": round(built_s, 2),
        "page_bytes": size,
        "windows": windows,
        "worst_open_s": worst_s,
        "load": [round(each, 2) for each in os.getloadavg()],
        "processors": os.cpu_count(),
        "provenance": provenance(),
    }
    atomic_write(given.out / "page_speed.json", json.dumps(result, indent=1) + "\n")
    errors = sum(len(window["errors"]) for window in windows.values())
    print(f"{study.name}: {size / 1e6:.1f} MB, opens in {worst_s:.2f} s at worst, {errors} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
