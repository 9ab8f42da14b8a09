"""The notation page and the glossary tell the truth: names exist, symbols stand where they say."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest
import yaml

BOOK = Path(__file__).resolve().parents[2] / "book"
SOURCE = yaml.safe_load((BOOK / "symbols.yml").read_text())
CHAPTERS = {
    path: [cell["source"] for cell in json.loads(path.read_text())["cells"]]
    for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))
}
TEXTS = {path: "\n".join("".join(cell) for cell in cells) for path, cells in CHAPTERS.items()}
FORMULAS = re.compile(r"```\{math\}.*?```|\$\$.*?\$\$|\$[^$\n]+\$", re.S)
LABELLED = [*SOURCE["symbols"], *SOURCE["terms"]]


def exists(dotted: str) -> bool:
    """Whether a name of the library, or a field of one of its data classes, is there."""
    parts = dotted.split(".")
    for split in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for name in parts[split:]:
            fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
            if name in {field.name for field in fields}:
                return name == parts[-1]
            if not hasattr(thing, name):
                return False
            thing = getattr(thing, name)
        return True
    return False


def plain(tex: str) -> str:
    """TeX without what does not change the symbol: spaces, braces around one sign."""
    tex = re.sub(r"\\[;,!: ]|\s", "", tex)
    return re.sub(r"\{(\w)\}", r"\1", tex)


def home(label: str) -> list[Path]:
    return [path for path, text in TEXTS.items() if f"({label})=" in text]


@pytest.mark.parametrize("entry", LABELLED, ids=lambda e: e.get("symbol") or e["term"])
def test_every_label_stands_in_one_chapter(entry):
    assert len(home(entry["first"])) == 1


@pytest.mark.parametrize("entry", SOURCE["symbols"], ids=lambda e: e["symbol"])
def test_every_symbol_stands_in_the_chapter_that_introduces_it(entry):
    (path,) = home(entry["first"])
    formulas = " ".join(FORMULAS.findall(TEXTS[path]))
    assert plain(entry["symbol"]) in plain(formulas)


@pytest.mark.parametrize("entry", SOURCE["symbols"], ids=lambda e: e["symbol"])
def test_every_name_in_code_exists(entry):
    for name in entry.get("code", []):
        assert exists(name), f"{name} is no name of the library"
    if "shown" in entry:
        assert entry["shown"].rsplit(".", 1)[-1].split("[")[0] in entry["code"][0]


@pytest.mark.parametrize("entry", SOURCE["terms"], ids=lambda e: e["term"])
def test_every_term_is_used_in_the_chapter_that_explains_it(entry):
    (path,) = home(entry["first"])
    words = re.sub(r"\s*\(.*\)", "", entry["term"]).lower().split(" and ")
    for word in words:
        assert word in TEXTS[path].lower(), f"{word} does not occur in {path.name}"


def test_a_name_that_is_not_there_is_noticed():
    assert exists("kfac_lib.rows.LayerRows.x")
    assert not exists("kfac_lib.rows.LayerRows.nothing")
    assert not exists("kfac_lib.nothing.flatten")


@pytest.mark.parametrize("letter", SOURCE["letters"], ids=lambda e: e["symbol"])
def test_every_index_letter_is_used(letter):
    assert any(re.search(rf"[\s{{_,]{letter['symbol']}[\s}},]", text) for text in TEXTS.values())
