"""A page as a PNG, by headless Chromium: how a reader sees it, at a width and in a colour scheme.

    python benchmarks/screenshot.py reports/<study>/index.html page.png --width 390 --height 2400 --dark

The page is opened from disk; nothing is fetched.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
)


def screenshot(page: Path, image: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> Path:
    """Writes `image`: the top left of the page, `width` by `height` CSS pixels.

    Headless Chromium makes no window narrower than 500 pixels, so a narrower page is shown in a frame of that width.

    Raises:
        FileNotFoundError: there is no such page, or no Chromium.
        subprocess.CalledProcessError: Chromium failed.
    """
    if not page.is_file():
        raise FileNotFoundError(f"no page at {page}")
    browser = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(_BROWSERS)} is installed (Debian: apt-get install chromium)")
    image.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        shown = page.resolve().as_uri()
        if width < 500:
            frame = Path(folder) / "frame.html"
            style = f"border:0;width:{width}px;height:{height}px"
            frame.write_text(f'<body style="margin:0"><iframe src="{shown}" style="{style}"></iframe>')
            shown = frame.as_uri()
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
        command = [
            browser,
            *_FLAGS,
            *scheme,
            f"--user-data-dir={folder}/profile",
            f"--window-size={width},{height}",
            f"--screenshot={image.resolve()}",
            shown,
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    if not image.is_file():
        raise FileNotFoundError(f"{browser} wrote no {image}")
    return image


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true", help="in the dark colour scheme")
    given = parser.parse_args()
    try:
        print(screenshot(given.page, given.image, width=given.width, height=given.height, dark=given.dark))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
