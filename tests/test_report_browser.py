"""The report in a real browser: no complaint, no request, no overflow, and it answers a finger."""

import browser
import made_run
import pytest

from branchcore.run_report import write_report

WIDTHS = {"desktop": 1280, "phone": 390}
TIPS = "[...document.querySelectorAll('.tip')].filter(t => !t.hidden).map(t => t.textContent)"


@pytest.fixture(scope="module")
def shown():
    pytest.importorskip("PIL.Image")
    program = browser.find()
    if program is None:
        pytest.skip("no Chromium is installed")
    page = browser.Browser(program)
    yield page
    page.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    pytest.importorskip("PIL.Image")
    run = made_run.make(tmp_path_factory.mktemp("runs") / "a <b> & 'c'", sessions=2)
    return write_report(run).as_uri()


def box(page, selector, inside=0.5):
    """Scrolls to an element; returns a point on it."""
    at = f"document.querySelector({selector!r})"
    page.value(f"{at}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    x, y, width, height = page.value(
        f"(r => [r.x, r.y, r.width, r.height])({at}.getBoundingClientRect())"
    )
    return x + inside * width, y + height / 2


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_nothing_is_loaded_complained_of_or_too_wide(shown, url, width, dark):
    shown.open(url, width=width, dark=dark)
    assert shown.complaints() == []
    assert [u for u in shown.requests() if not u.startswith("data:")] == [url]
    assert shown.value("document.documentElement.scrollWidth") == width
    assert shown.value("innerWidth") == width
    inside = "e => e.getBoundingClientRect().right > innerWidth + 0.5"
    wide = f"[...document.querySelectorAll('main *')].filter({inside}).map(e => e.outerHTML)"
    assert shown.value(wide) == []
    red, green, blue = shown.value(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert max(red, green, blue) < 60 if dark else min(red, green, blue) > 230
    sections = shown.value("[...document.querySelectorAll('section')].map(s => s.id)")
    assert sections == [
        *("warnings", "reward", "held-out", "samples", "tree", "policy", "time", "settings")
    ]


def test_a_loaded_picture_would_be_seen(shown, tmp_path):
    """The test above can fail: it sees requests, errors and an overflow."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<div style='width:2000px'>x</div><img src='http://x.invalid/'><script>a(</script>"
    )
    shown.open(page.as_uri(), width=390)
    assert "http://x.invalid/" in shown.requests()
    assert len(shown.complaints()) >= 1
    assert shown.value("document.documentElement.scrollWidth") >= 2000


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_curves_tell_their_values(shown, url, width):
    shown.open(url, width=width)
    charts = "document.querySelectorAll('.charts .chart')"
    titles = shown.value(f"[...{charts}].map(c => c.querySelector('h3').firstChild.textContent)")
    assert titles[:3] == ["reward", "a", "b"]
    shown.value(f"{charts}[1].id = 'asked'")
    x, y = box(shown, "#asked .plot", 20 / 30)
    shown.move(x, y)
    (tip,) = shown.value(TIPS)
    assert tip == "iteration 20training1 ± 0.25held-out0.1"
    shown.value("document.querySelector('#asked .frame').focus()")
    key = {"type": "keyDown", "key": "ArrowRight"}
    shown.ask("Input.dispatchKeyEvent", **key)
    (tip,) = shown.value(TIPS)
    assert tip.startswith("iteration 21training1.05 ± 0.25held-out at 20")
    shown.ask("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert shown.value(TIPS) == []
    assert shown.complaints() == []


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_trees_and_samples_move_through_time(shown, url, width):
    shown.open(url, width=width)
    visible = "[...document.querySelectorAll('.trees figure')].filter(f => f.checkVisibility())"
    assert shown.value(f"{visible}.map(f => f.dataset.at)") == ["30"]
    shown.value("document.querySelector('button[data-at=\"10\"]').click()")
    assert shown.value(f"{visible}.map(f => f.dataset.at)") == ["10"]
    shown.move(*box(shown, ".trees figure[data-at='10'] .edge.up:not(.even) > .hit"))
    (tip,) = shown.value(TIPS)
    assert tip == "noise level 1 to 0.5\ntrained, advantage +1"
    shown.move(*box(shown, ".trees figure[data-at='10'] .score.up .hit"))
    (tip,) = shown.value(TIPS)
    assert tip == "reward 2\na 1\nb 0.5"
    picture = "getComputedStyle(document.querySelector('.shot.now')).backgroundImage"
    before = shown.value(picture)
    slide = "document.getElementById('moment')"
    shown.value(f"{slide}.value = 1; {slide}.dispatchEvent(new Event('input'))")
    assert shown.value("document.querySelector('output.now').textContent") == "iteration 10"
    assert shown.value(picture) != before
    assert shown.value(picture).startswith('url("data:image/png;base64,')


def test_the_page_is_whole_without_script(shown, url):
    shown.open(url, width=390, script=False)
    assert shown.value("document.documentElement.scrollWidth") == 390
    visible = "[...document.querySelectorAll({!r})].filter(e => e.checkVisibility()).length"
    assert shown.value(visible.format(".trees figure")) == 1
    assert shown.value(visible.format(".shot")) == 2 * len(made_run.PROMPTS)
    assert shown.value(visible.format(".slider, .choice")) == 0
    drawn = "[...document.querySelectorAll('.curve')].map(c => c.getBBox().width)"
    assert min(shown.value(drawn)) > 100.0
