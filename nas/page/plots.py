"""What every figure of a page shares: transparent ground, the page's ink and font, room for its labels."""

from __future__ import annotations

from typing import Any

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif'


def layout(height: int, **extra: Any) -> dict[str, Any]:
    """A figure's layout, `height` in pixels; `extra` adds to it or replaces parts."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 13, "family": _FONT},
        "hoverlabel": {
            "bgcolor": "@bg",
            "bordercolor": "@line",
            "font": {"color": "@ink", "size": 12},
            "align": "left",
        },
        "showlegend": False,
        **extra,
    }


def rings() -> list[dict[str, Any]]:
    """Two shapes for a layout whose meta names their places as "rings".

    The page sets the first around the chosen point, the second around the one it is compared with.
    """
    return [
        {
            "type": "circle",
            "visible": False,
            "xref": "x",
            "yref": "y",
            "xsizemode": "pixel",
            "ysizemode": "pixel",
            "xanchor": 0,
            "yanchor": 0,
            "x0": -radius,
            "x1": radius,
            "y0": -radius,
            "y1": radius,
            "line": {"color": color, "width": width},
        }
        for radius, color, width in ((13, "@ink", 1.8), (10, "@muted", 1.2))
    ]


def axis(title: str = "", **extra: Any) -> dict[str, Any]:
    """An axis in the page's colours; `title` says the unit."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zeroline": False,
        "automargin": True,
        **extra,
    }
