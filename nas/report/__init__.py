"""The report: one offline page from a study's files, from which a person can choose a network."""

from __future__ import annotations

from pathlib import Path

from nas.page import write_page
from nas.report import explorer, sections
from nas.report.files import read_files

__all__ = ["build_report"]


def build_report(folder: Path) -> Path:
    """Writes `index.html` beside the study's files.

    Reads only study.json, trials.csv, front.csv and blocks.csv; nothing is measured, trained or searched.

    Returns:
        The page.

    Raises:
        NasError: a file is missing or damaged; names the file and the field, or the line and column.
    """
    files = read_files(folder)
    made = files.record["provenance"]
    return write_page(
        folder / "index.html",
        title=sections.title(files),
        lead=sections.lead(files),
        sections=sections.ordered(files),
        scripts=(explorer.SCRIPT,),
        made_by=f"Study {files.record['name']}, nas {made.get('nas', '')}, {made.get('date', 'no date')}.",
    )
