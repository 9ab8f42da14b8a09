"""Every page of the table of contents, in a real browser."""

from __future__ import annotations

import json

import pytest
from pages import CHAPTERS, PAGES, SITE, soup
from playwright.sync_api import TimeoutError as NotInTime

FORMULAS = r"""() => {
  const article = document.querySelector('article');
  const sources = [...article.querySelectorAll('span.math, div.math')];
  const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
  const raw = [];
  while (walker.nextNode()) {
    const inside = walker.currentNode.parentElement;
    if (inside.closest('code, pre, script, style, mjx-container, textarea')) continue;
    if (/\$|\\\(|\\\[|\\[a-z]{2,}/.test(walker.currentNode.data)) raw.push(walker.currentNode.data);
  }
  return {
    untypeset: sources.filter(s => !s.querySelector('mjx-container')).map(s => s.textContent),
    errors: [...article.querySelectorAll(
      'mjx-merror, [data-mjx-error], mjx-container [style*="color: red"]')].map(e => e.textContent),
    raw,
  };
}"""

# what is wider than the screen, and is neither in a box that scrolls to its end nor cut off
ESCAPED = """() => {
  const wrong = [], width = document.documentElement.clientWidth;
  const things = 'mjx-container, pre, table, img, svg, .explore *, .sd-card, dt.sig, p, li';
  for (const thing of document.querySelectorAll(`article :is(${things})`)) {
    const box = thing.getBoundingClientRect();
    if (!box.width || thing.closest('mjx-assistive-mml, .visually-hidden')) continue;
    let held = false;
    for (let up = thing; up && up !== document.body; up = up.parentElement) {
      const flow = getComputedStyle(up).overflowX, edge = up.getBoundingClientRect();
      if (['auto', 'scroll'].includes(flow) && up.scrollWidth > up.clientWidth + 1) {
        const before = up.scrollLeft;
        up.scrollLeft = 1e6;
        held = up.scrollLeft + up.clientWidth >= up.scrollWidth - 2 &&
          up.getBoundingClientRect().right <= width + 1;
        up.scrollLeft = before;
        break;
      }
      if (['hidden', 'clip'].includes(flow) && up !== thing && box.right > edge.right + 2) break;
      if (up.parentElement === document.body) held = box.right <= width + 1;
    }
    if (!held) wrong.push(`${thing.tagName}.${thing.className}: ${thing.textContent.slice(0, 60)}`);
  }
  return wrong;
}"""

OPEN_EVERYTHING = """() => {
  for (const box of document.querySelectorAll('details')) box.open = true;
  const closed = '.toggle-hidden .toggle-button, button.toggle-button-hidden';
  for (const button of document.querySelectorAll(closed)) button.click();
}"""


def violations(page, axe: str) -> list[str]:
    if not page.evaluate("() => !!window.axe"):
        page.evaluate(axe)
    found = page.evaluate(
        "async () => (await axe.run(document, {preload: false, resultTypes: ['violations']}))"
        ".violations.map(v => [v.id, v.impact, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))])"
    )
    return [json.dumps(violation) for violation in found]


@pytest.fixture(scope="module", params=PAGES)
def opened(request, visit, server):
    return visit(f"{server}/{request.param}.html")


def test_nothing_is_asked_from_another_host(opened):
    assert opened.strangers() == []


def test_no_console_error(opened):
    assert opened.errors == []


def test_every_formula_is_typeset(opened):
    found = opened.page.evaluate(FORMULAS)
    assert found == {"untypeset": [], "errors": [], "raw": []}


def show(page, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    # polling: by default it waits for animation frames, and a page that stands still draws none
    shown = f"() => document.documentElement.dataset.theme === '{scheme}'"
    try:
        page.wait_for_function(shown, polling=50, timeout=5_000)
    except NotInTime:
        page.screenshot()  # forces a frame, and with it the page is told of the scheme
        page.wait_for_function(shown, polling=50)
    page.wait_for_timeout(300)  # colors fade from one scheme to the other


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 375])
def test_axe_finds_no_violation(opened, axe, width, scheme):
    show(opened.page, width, scheme)
    assert violations(opened.page, axe) == []


@pytest.mark.parametrize(("width", "scheme"), [(1300, "dark"), (375, "light")])
def test_axe_finds_no_violation_in_what_opens(opened, axe, width, scheme):
    page = opened.page
    show(page, width, scheme)
    page.evaluate(OPEN_EVERYTHING)
    page.wait_for_timeout(500)  # what opens fades in
    assert violations(page, axe) == []
    for tab in page.query_selector_all("article .sd-tab-set > label"):
        tab.click()
        assert violations(page, axe) == []


def test_a_phone_never_scrolls_sideways(opened):
    page = opened.page
    page.evaluate(OPEN_EVERYTHING)
    show(page, 375, "light")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 375
    assert page.evaluate(ESCAPED) == []


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_complete_from_a_zip_without_a_server(visit, unzipped, name):
    seen = visit((unzipped / f"{name}.html").as_uri())
    assert seen.strangers() == []
    assert seen.errors == []
    assert seen.page.evaluate(FORMULAS) == {"untypeset": [], "errors": [], "raw": []}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_stays_small(name):
    own = (SITE / f"{name}.html").stat().st_size
    pictures = {tag["src"] for tag in soup(name).select("article img[src]")}
    files = [SITE / name / ".." / src for src in pictures if not src.startswith("data:")]
    own += sum(file.resolve().stat().st_size for file in files)
    assert own < 1_500_000


def test_there_are_chapters():
    assert CHAPTERS
