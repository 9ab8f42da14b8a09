"""Links and anchors, formula to function and back, search."""

from __future__ import annotations

import collections
import posixpath
import re
from urllib.parse import unquote, urldefrag

import pytest
from pages import CHAPTERS, PAGES, SITE, soup

# modules that serve the book and derive nothing
HELPERS = {"examples", "exercises", "plotting", "interactive", "coverage"}
MODULES = [name for name in PAGES if name.startswith("api/") and name != "api/index"]


def resolve(page: str, href: str) -> tuple[str, str]:
    """Path inside the site and anchor that a link on a page leads to."""
    path, anchor = urldefrag(href)
    full = posixpath.normpath(posixpath.join(posixpath.dirname(page), unquote(path)))
    return (full if path else f"{page}.html"), unquote(anchor)


def links(page: str, where) -> set[tuple[str, str]]:
    hrefs = [a["href"] for a in where.select("a[href]")]
    return {resolve(page, h) for h in hrefs if not re.match(r"[a-z]+:", h)}


def anchors(path: str) -> set[str]:
    page = soup(path.removesuffix(".html"))
    return {tag["id"] for tag in page.select("[id]")} | {
        tag["name"] for tag in page.select("a[name]")
    }


@pytest.mark.parametrize("name", [*PAGES, "genindex", "search"])
def test_every_internal_link_leads_somewhere(name):
    page = soup(name)
    dead = []
    for path, anchor in links(name, page):
        there = (SITE / path).is_file()
        if not there or (anchor and path.endswith(".html") and anchor not in anchors(path)):
            dead.append(f"{path}#{anchor}")
    for tag, attribute in [("script", "src"), ("img", "src"), ("link", "href")]:
        for element in page.select(f"{tag}[{attribute}]"):
            target = element[attribute].split("?")[0]
            assert not re.match(r"(https?:)?//", target), f"{target} is on another host"
            if not target.startswith("data:") and not (SITE / resolve(name, target)[0]).is_file():
                dead.append(target)
    assert dead == []


DERIVING = [*CHAPTERS, "how_fast"]
"""Pages that derive what the library computes."""


def documented(page: str):
    """The top-level functions and classes of a module's page: name, element, chapter links."""
    for entry in soup(page).select("dl.py.function, dl.py.class, dl.py.exception"):
        if entry.find_parent("dl", class_="py") or not entry.dt.get("id"):
            continue
        targets = {(p, a) for p, a in links(page, entry.dd) if p.removesuffix(".html") in DERIVING}
        yield entry.dt["id"], targets


@pytest.mark.parametrize("page", [m for m in MODULES if m.split("/")[1] not in HELPERS])
def test_formula_and_function_link_to_each_other(page):
    intro = soup(page).select_one("article section")
    chapters = {p for p, _ in links(page, intro) if p.removesuffix(".html") in DERIVING}
    if not chapters:
        pytest.fail(f"the module's docstring names no chapter ({DERIVING})")
    for name, targets in documented(page):
        anchored = {(p, a) for p, a in targets if a}
        assert anchored, f"the docstring of {name} refers to no label of a chapter"
        for path, anchor in anchored:
            assert anchor in anchors(path), f"{name} refers to {path}#{anchor}, which is not there"
        home = f"{page}.html"
        back = {
            link
            for chapter in {path.removesuffix(".html") for path, _ in anchored}
            for link in links(chapter, soup(chapter))
            if link == (home, name) or (link[0] == home and link[1].startswith(f"{name}."))
        }
        assert back, f"none of {sorted({path for path, _ in anchored})} links to {name}"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_chapter_leads_to_functions(chapter):
    assert any(path.startswith("api/") and a for path, a in links(chapter, soup(chapter)))


def telling_word() -> str:
    """A long word that the last chapter alone uses."""
    texts = {name: " ".join(p.get_text() for p in soup(name).select("article p")) for name in PAGES}
    words = {
        name: collections.Counter(re.findall(r"\b[a-z]{8,}\b", text))
        for name, text in texts.items()
    }
    last = CHAPTERS[-1]
    others = set().union(*(words[name] for name in PAGES if name != last))
    own = [word for word in words[last] if word not in others]
    return max(own, key=lambda word: (words[last][word], word))


@pytest.mark.parametrize("place", ["http", "file"])
def test_search_finds_a_word_of_the_last_chapter(visit, server, unzipped, place):
    base = server if place == "http" else unzipped.as_uri()
    seen = visit(f"{base}/search.html?q={telling_word()}")
    seen.page.wait_for_selector("#search-results li a")
    found = [a.get_attribute("href") for a in seen.page.query_selector_all("#search-results li a")]
    assert any(CHAPTERS[-1] in href for href in found)
    assert seen.strangers() == []
    assert seen.errors == []
