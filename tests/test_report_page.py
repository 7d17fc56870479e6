"""The report in headless Chromium: it draws without an error, and does what it says under mouse and keyboard."""

from __future__ import annotations

import types

import chromium
import pytest
from synthetic_study import BUDGET_MS, make_study

from nas.report import build_report, data
from nas.report.files import read_files

pytestmark = pytest.mark.skipif(chromium.browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def tab():
    with chromium.page() as opened:
        yield opened


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("reports") / "2026-01-02-snapgen_unet-iphone")


@pytest.fixture(scope="module")
def path(study):
    return build_report(study)


@pytest.fixture
def page(tab, path):
    tab.open(path)
    yield tab
    assert tab.errors == []
    assert tab.fetched == []


def slide(page, position):
    page.run(
        f"(() => {{ const s = document.getElementById('budget'); s.value = {position};"
        " s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    page.settle()


def taken(page):
    return page.run("(document.querySelector('.answer b.key') || {}).textContent")


def runner_up(page):
    return page.run("document.querySelector('.answer b:not(.key)').textContent")


def drawn(page, figure):
    """What plotly has in its hands."""
    return page.run(
        f"(() => {{ const p = document.querySelector('#{figure} .plot'); return {{rings: p.layout.shapes.slice(3),"
        " cursor: p.layout.shapes[2]}; })()"
    )


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_whole_page_draws_without_an_error_and_never_scrolls_sideways(tab, path, width, dark):
    tab.open(path, width=width, dark=dark)
    assert tab.run("document.documentElement.scrollWidth") <= width
    for selector in ("#stability", "#where", "#choices", "#matters", "#progress", "footer"):
        tab.run(f"document.querySelector('{selector}').scrollIntoView({{behavior: 'instant'}})")
        tab.settle()
    assert tab.run("document.querySelectorAll('figure .main-svg').length") >= 8
    assert tab.run("document.documentElement.scrollWidth") <= width
    assert tab.errors == []
    assert tab.fetched == []
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


@pytest.mark.parametrize("first_version", [False, True])
def test_the_slider_takes_what_the_search_would_recommend(tab, tmp_path, first_version):
    """The page's arithmetic against the search's own, at every budget at which anything new fits."""
    from nas import record

    folder = make_study(tmp_path / "study", seed=1, first_version=first_version)
    tab.open(build_report(folder))
    files = read_files(folder)
    fit = data.points(files).query("standing in ['front', 'dominated']")
    content = tab.run("JSON.parse(document.querySelector('.explorer-data').textContent)")
    step = (content["budget_ms"] - content["from_ms"]) / content["positions"]
    seen = set()
    for position in (*range(0, content["positions"], 25), content["positions"]):
        slide(tab, position)
        within = fit[fit["latency_high_ms"] <= content["from_ms"] + position * step + 1e-9]
        rows = [types.SimpleNamespace(others={}, **row) for row in within.to_dict("records")]
        members = sorted(
            (a for a in rows if not any(b.latency_ms < a.latency_ms and b.quality > a.quality for b in rows)),
            key=lambda row: row.latency_ms,
        )
        expected = (record.recommend(members, "dB") or {"key": None})["key"]
        assert taken(tab) == expected
        seen.add(expected)
    assert len(seen) > 3
    assert expected == files.recommended  # at the study's own budget
    assert tab.errors == []


def test_the_slider_moves_the_choice_the_line_the_rings_and_the_comparison(page, study):
    before = drawn(page, "figure-front")
    first = taken(page)
    assert before["cursor"]["x0"] == BUDGET_MS
    assert page.run("document.querySelector('article.chosen').id") == f"candidate-{first}"
    slide(page, 60)
    second, after = taken(page), drawn(page, "figure-front")
    assert second != first
    assert after["cursor"]["x0"] < BUDGET_MS
    for i, (key, ring) in enumerate(zip((second, runner_up(page)), after["rings"], strict=True)):
        assert ring["visible"]
        assert ring["xanchor"] < before["rings"][i]["xanchor"]
        assert ring["xanchor"] == read_files(study).trials.set_index("key").loc[key, "latency_ms"]
    head = page.run("[...document.querySelectorAll('.explorer-pair thead th')].map((th) => th.textContent)")
    assert head[1] == f"{second} (taken)"
    assert head[2] == f"{runner_up(page)} (runner-up)"
    assert page.run("document.querySelector('tr.chosen').dataset.key") == second
    assert page.run("document.querySelector('.explorer output').textContent") != "1.4 s"


def test_below_the_fastest_nothing_fits_and_the_page_says_so(page):
    slide(page, 0)
    assert "No scored candidate fits" in page.run("document.querySelector('.answer').textContent")
    assert taken(page) is None
    assert page.run("document.querySelectorAll('.explorer-pair table, article.chosen').length") == 0


def test_the_keyboard_alone_moves_the_slider_and_finds_the_changes(page):
    page.run("document.getElementById('budget').focus()")
    page.press("ArrowLeft", 3)
    page.settle()
    content = page.run("JSON.parse(document.querySelector('.explorer-data').textContent)")
    assert page.run("Number(document.getElementById('budget').value)") == content["positions"] - 3
    assert page.run("document.getElementById('budget').getAttribute('aria-valuetext')").startswith("1.3")
    before = taken(page)
    page.run("document.querySelector('.step[data-step=\"-1\"]').focus()")
    page.press("Enter")
    page.settle()
    assert taken(page) != before
    page.run("document.querySelector('.step[data-step=\"1\"]').focus()")
    page.press("Enter")
    page.settle()
    assert taken(page) == before
    page.run("document.getElementById('budget').focus()")
    page.press("Tab")
    assert page.run("document.activeElement.dataset.step") == "1"


def test_every_control_has_a_name(page):
    nameless = page.run(
        "[...document.querySelectorAll('button, input, summary, [role=img]')].filter((e) => !(e.textContent.trim()"
        " || e.getAttribute('aria-label') || (e.labels && e.labels.length))).map((e) => e.outerHTML.slice(0, 120))"
    )
    assert nameless == []


def test_the_list_of_changes_ends_with_the_study_s_own_choice(page, study):
    page.run("document.querySelector('.explorer-changes').open = true")
    rows = page.run(
        "[...document.querySelectorAll('.explorer-changes tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert len(rows) > 3
    assert rows[-1][1] == read_files(study).recommended


def test_tables_sort_by_figure_not_by_text(page):
    head = "#candidates th:nth-child(2) button"
    assert page.run(f"document.querySelector('{head}').textContent") == "latency"

    def column():
        return page.run(
            "[...document.querySelectorAll('#candidates tbody tr')].map((r) => Number(r.cells[1].dataset.sort))"
        )

    fastest_first = sorted(column())
    assert fastest_first[0] < 1000 < fastest_first[-1]  # as texts they would stand the other way round
    page.click("#candidates th:nth-child(1) button")
    assert column() != fastest_first
    page.click(head)
    assert column() == fastest_first
    assert page.run("document.querySelector('#candidates th:nth-child(2)').getAttribute('aria-sort')") == "ascending"
    page.run(f"document.querySelector('{head}').focus()")
    page.press("Enter")
    assert column() == fastest_first[::-1]


def test_a_row_shows_its_network(page):
    page.click("#candidates tbody tr:first-child td:nth-child(2)")
    key = page.run("document.querySelector('#candidates tbody tr').dataset.key")
    assert page.run("[...document.querySelectorAll('article')].filter((a) => a.offsetParent).map((a) => a.id)") == [
        f"candidate-{key}"
    ]


def test_a_click_on_a_point_of_the_front_shows_its_network(page):
    """The point is found where plotly drew it."""
    page.run("document.querySelector('#figure-front').scrollIntoView({behavior: 'instant'})")
    key, x, y = page.run(
        "(() => { const p = document.querySelector('#figure-front .plot'), a = p._fullLayout;"
        " const t = p.data.find((t) => t.error_y && t.marker.symbol === undefined);"
        " const b = p.getBoundingClientRect();"
        " const x = a.xaxis._offset + a.xaxis.d2p(t.x[0]), y = a.yaxis._offset + a.yaxis.d2p(t.y[0]);"
        " return [t.ids[0], b.x + x, b.y + y]; })()"
    )
    page.point(x, y)
    page.wait(f"document.getElementById('candidate-{key}').classList.contains('chosen')")


def test_the_legend_hides_its_points_and_the_views_change(page):
    page.click("#figure-front .legend .key:last-child")
    traces = page.run("JSON.parse(document.querySelector('#figure-front .legend .key:last-child').dataset.traces)")
    assert page.run(f"document.querySelector('#figure-front .plot').data[{traces[0]}].visible") is False
    page.click("#views-values .tabs button:nth-child(2)")
    page.wait("document.querySelector('#figure-values-1 .main-svg') !== null")
    assert page.run("document.querySelector('#figure-values-0').offsetParent") is None
    assert page.run("document.querySelectorAll('#views-values .tabs [aria-pressed=true]').length") == 1


def test_every_dot_of_the_values_is_drawn(page):
    page.run("document.querySelector('#figure-values-0').scrollIntoView({behavior: 'instant'})")
    page.settle()
    counts = page.run(
        "(() => { const p = document.querySelector('#figure-values-0 .plot');"
        " return [p.querySelectorAll('.trace:first-child .point').length, p.data[0].x.length]; })()"
    )
    assert counts[0] == counts[1] > 100


def test_the_page_follows_a_change_of_the_colour_scheme(page, path):
    ink = "getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    light = page.run(ink)
    page.scheme(dark=True)
    page.wait(f"{ink} !== '{light}'")
    page.wait(f"document.querySelector('#figure-front .plot').layout.font.color === {ink}")
