"""Where BK-SDM-Tiny spends its call on this machine: python benchmarks/profile_bk_sdm_tiny.py [--px 256].

Runs `nas profile --space sd_unet --reference bk-sdm-tiny --target cpu-onnxruntime --measure`: the network and its
distinct blocks timed with the protocol of `nas measure`, onnxruntime's own profile mapped back to blocks, and the page.
The page is opened in headless Chromium, which must draw every figure that is in view. Writes
reports/benchmarks/profile_bk_sdm_tiny.json; the page goes to --page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nas.paths import atomic_write
from nas.provenance import provenance

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--virtual-time-budget=5000",
)
OUT = Path(__file__).resolve().parent.parent / "reports" / "benchmarks" / "profile_bk_sdm_tiny.json"


def profiled(px: int, target: str, page: Path) -> dict[str, Any]:
    """What the command prints."""
    command = ["profile", "--space", "sd_unet", "--reference", "bk-sdm-tiny", "--resolution", str(px)]
    command += ["--target", target, "--measure", "--json", "--out", str(page)]
    done = subprocess.run([sys.executable, "-m", "nas", *command], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def drawn(page: Path) -> dict[str, int]:
    """Figures in the page, how many Chromium has drawn (those of a view that is not chosen wait), and icicle pieces.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", page.resolve().as_uri()]
        dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    body = dom[dom.index("<body") :]
    counted = {
        "figures": "<figure ",
        "waiting": "<div hidden",  # each holds one figure
        "drawn": "js-plotly-plot",
        "icicle_pieces": 'class="slice',
    }
    return {name: body.count(text) for name, text in counted.items()}


def main() -> None:
    """Profiles, looks at the page, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--px", type=int, default=256)
    parser.add_argument("--target", default="cpu-onnxruntime")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=Path("reports/profiles/bk-sdm-tiny-measured.html"))
    options = parser.parse_args()
    load = list(os.getloadavg())
    found = profiled(options.px, options.target, options.page)
    seen, measured, nodes = drawn(options.page), found["measured"], found["measured"]["nodes"]
    if seen["drawn"] != seen["figures"] - seen["waiting"] or not seen["icicle_pieces"]:
        sys.exit(f"Chromium did not draw every figure of {options.page}: {seen}")
    del nodes["nodes"]
    atomic_write(options.out, json.dumps(_kept(found, seen, options.target, load), indent=1) + "\n")
    print(found["headline"])
    print(f"{'stage':16s} {'part':13s} {'time':>6s} {'MACs':>6s} {'params':>6s}")
    for row in found["shares"]:
        shares = " ".join(f"{row[m]:6.1%}" for m in ("step_ms", "macs", "params"))
        print(f"{row['stage']:16s} {row['part']:13s} {shares}")
    print(f"page {options.page}: {seen['drawn']} of {seen['figures']} figures in view, all drawn by Chromium")
    print(f"wrote {options.out}")
    predicted, whole = found["latency"]["ms"], measured["whole_ms"]
    print(
        f"bk-sdm-tiny at {options.px} px on {options.target}: {whole:.1f} ms measured, {predicted:.1f} ms predicted"
        f" ({predicted / whole - 1:+.1%}); blocks alone add up to {measured['block_sum_ms']:.1f} ms"
        f" ({measured['block_sum_over_whole']:.1%} of the whole); {nodes['mapped_share']:.2%} of kernel time belongs to"
        f" a block"
    )


def _kept(found: dict[str, Any], seen: dict[str, int], target: str, load: list[float]) -> dict[str, Any]:
    """What is worth keeping of the command's answer."""
    return {
        "conditions": {
            "what": "one denoiser call, batch 1, random weights; blocks alone and the whole interleaved in one session",
            "target": target,
            "resolution_px": found["resolution_px"],
            "load_average_before": load,
        },
        "headline": found["headline"],
        "roof": found["roof"],
        "latency": found["latency"],
        "measured": found["measured"],
        "shares": found["shares"],
        "kinds": found["kinds"],
        "counters": found["counters"],
        "page": seen,
        "provenance": provenance(seed=0),
    }


if __name__ == "__main__":
    main()
