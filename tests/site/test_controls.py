"""Every position of every control, by keyboard: the picture changes and its alt text says how."""

from __future__ import annotations

import base64
import hashlib
import io
import json

import pytest
from pages import CHAPTERS, PAGES, soup
from PIL import Image

STATE = 'script[type="application/vnd.jupyter.widget-state+json"]'
INTERACTIVE = [name for name in PAGES if soup(name).select_one(STATE)]


def stored_frames(name: str) -> int:
    """How many pictures the page holds."""
    models = json.loads(soup(name).select_one(STATE).string)["state"].values()
    values = [m["state"].get("value") for m in models if m["model_name"] == "HTMLModel"]
    return sum(str(value).startswith("<img") for value in values)


class Control:
    """A control of a figure as the keyboard sees it."""

    def __init__(self, box) -> None:
        self.box = box
        self.label = box.query_selector(".widget-label").inner_text().strip()
        self.handle = box.query_selector('[role="slider"]')
        self.menu = box.query_selector("select")
        self.buttons = box.query_selector_all(".widget-toggle-button")
        assert self.handle or self.menu or self.buttons
        for stop in [self.handle or self.menu, *self.buttons]:
            if stop:
                assert stop.evaluate("e => e.tabIndex") == 0, f"{self.label}: not reached by Tab"

    def value(self) -> str:
        if self.handle:
            return self.box.query_selector(".widget-readout").inner_text().strip()
        if self.menu:
            # a menu sets its spaces so that they do not break
            chosen = self.menu.evaluate("e => e.selectedOptions[0].textContent")
            return " ".join(chosen.split())
        return self.box.query_selector(".mod-active").inner_text().strip()

    def positions(self):
        """Move through all positions; yield what the control reads at each."""
        if self.buttons:
            for button in self.buttons:
                button.press("Enter")
                yield self.value()
            return
        moved = self.handle or self.menu
        moved.press("Home")
        last = None
        while (value := self.value()) != last:
            yield value
            last = value
            moved.press("ArrowRight" if self.handle else "ArrowDown")


def walk(controls):
    if not controls:
        yield ()
        return
    for value in controls[0].positions():
        for rest in walk(controls[1:]):
            yield (value, *rest)


def look(figure, names):
    """The picture at this position: its alt text names the position, its pixels are returned."""
    deadline = 40
    while True:
        images = figure.query_selector_all(".explore-frame img")
        alt = images[0].get_attribute("alt") if len(images) == 1 else ""
        missing = [name for name in names if name.casefold() not in (alt or "").casefold()]
        if not missing or not deadline:
            break
        deadline -= 1
        figure.evaluate("() => new Promise(done => setTimeout(done, 25))")
    assert len(images) == 1, f"{len(images)} pictures are visible at {names}"
    assert not missing, f"the alt text {alt!r} does not name {missing}"
    assert images[0].evaluate("e => e.decode().then(() => e.naturalWidth)") > 0
    data = base64.b64decode(images[0].get_attribute("src").split(",", 1)[1])
    with Image.open(io.BytesIO(data)) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_has_a_figure_with_controls(name):
    assert name in INTERACTIVE


@pytest.mark.parametrize("place", ["http", "file"])
@pytest.mark.parametrize("name", INTERACTIVE)
def test_every_position_shows_its_own_named_picture(visit, server, unzipped, name, place):
    seen = visit(
        f"{server}/{name}.html" if place == "http" else (unzipped / f"{name}.html").as_uri()
    )
    visited = 0
    for figure in seen.page.query_selector_all(".explore"):
        boxes = figure.query_selector_all(".explore-controls > *")
        controls = [Control(box) for box in boxes]
        pixels: dict[str, tuple] = {}
        for position in walk(controls):
            names = [f"{c.label} {v}" for c, v in zip(controls, position, strict=True)]
            shot = look(figure, names)
            assert shot not in pixels, f"{names} looks like {pixels[shot]}"
            pixels[shot] = position
        assert len(pixels) > 1
        visited += len(pixels)
    assert visited == stored_frames(name)
    assert seen.errors == []
