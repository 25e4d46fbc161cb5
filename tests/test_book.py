"""The web edition: built from the repository as it is, read by a parser and by a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
from chromium import PROGRAM, Chromium

from s2d.lab.book import build
from s2d.lab.book.mathml import markup
from s2d.lab.book.pages import API, claims, public_names
from s2d.lab.book.stage import _linked, stage
from s2d.lab.figures.registry import sections
from s2d.lab.moving import Decay, Rounding
from s2d.lab.moving.picture import moving
from s2d.lab.paths import repository_root

ROOT = repository_root()


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("book") / "site").parent


class Page(HTMLParser):
    """What a page points to, what can be pointed at, and its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links, self.parts, self.anchors, self.silent = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.anchors |= {found.get("id"), found.get("name")} - {None}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in ("img", "script", "iframe") and found.get("src"):
            self.parts.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical" and found.get("href"):
            self.parts.append(found["href"])
        if tag == "img" and not (found.get("alt") or "").strip():
            self.silent.append(found.get("src"))


@pytest.fixture(scope="module")
def pages(book) -> dict[Path, Page]:
    return {path: Page(path) for path in book.rglob("*.html")}


def test_every_notebook_guide_and_figure_is_in_it(book):
    for folder, pattern in (("notebooks", "[0-9][0-9]_*.ipynb"), ("docs", "*.md")):
        for source in (ROOT / folder).glob(pattern):
            assert (book / folder / source.name).with_suffix(".html").is_file()
    gallery = (book / "gallery.html").read_text()
    for figures in sections().values():
        for figure in figures:
            assert f"{figure.name}.png" in gallery
            assert all(f"{table.split('/')[-1]}.csv" in gallery for table in figure.tables)


def test_every_public_name_is_in_the_reference(book):
    for page, (_, modules) in API.items():
        text = (book / "api" / f"{page}.html").read_text()
        for module in modules:
            assert all(f'id="{module}.{name}"' in text for name in public_names(module)), module


def test_no_link_is_dead_and_nothing_comes_from_elsewhere(pages):
    dead = []
    for path, page in pages.items():
        for address in (*page.links, *page.parts):
            where = urlsplit(address)
            if where.scheme or where.netloc:
                if address in page.parts:
                    dead.append((path.name, address, "from elsewhere"))
                continue
            target = (path.parent / unquote(where.path)).resolve() if where.path else path
            if not target.is_file():
                dead.append((path.name, address, "no such file"))
            elif where.fragment and target.suffix == ".html" and unquote(where.fragment) not in pages[target].anchors:
                dead.append((path.name, address, "no such place"))
    assert not dead


def test_every_picture_has_a_text_alternative(pages):
    assert not {path.name: page.silent for path, page in pages.items() if page.silent}


def test_it_is_at_most_20_megabytes(book):
    assert sum(path.stat().st_size for path in book.rglob("*") if path.is_file()) <= 20e6


def test_equations_are_mathml(book):
    text = (book / "notebooks" / "00_by_hand.html").read_text()
    assert text.count("<math") >= 20
    outside_code = re.sub(r"<(pre|script|code)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.findall(r"\$[^$]+\$|\\frac|\\sigma", outside_code)


def test_a_formula_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"not a formula.*x\^2\^3"):
        markup(r"x^2^3", "inline")
    with pytest.raises(ValueError, match=r"unknown command \\sigmma"):
        markup(r"\sigmma_1", "block")


def test_links_to_files_bring_them_and_folders_become_their_readme(tmp_path):
    text = "[a](data/laptop/claims.csv) [b](data/paper) [c](examples) [d](https://e.f) [g](#h)"
    text += " ![i](figures/laptop/claims.png)"
    made = _linked(text, Path("README.md"), ROOT, tmp_path)
    assert made == text.replace("data/paper", "data/paper/README.md").replace("[c](examples)", "c")
    assert (tmp_path / "data/laptop/claims.csv").is_file() and (tmp_path / "figures/laptop/claims.png").is_file()


def test_a_dead_link_is_named_before_anything_is_built(tmp_path):
    with pytest.raises(FileNotFoundError, match="README.md links to gone.md"):
        _linked("[x](gone.md)", Path("README.md"), ROOT, tmp_path)


def test_the_stage_is_made_anew(tmp_path):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "old.md").touch()
    stage(ROOT, tmp_path / "stage")
    assert not (tmp_path / "stage" / "old.md").exists()
    notebook = json.loads((tmp_path / "stage" / "notebooks" / "02_quantizer_by_hand.ipynb").read_text())
    outputs = [output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert not any("image/png" in data for data in outputs)
    assert any('class="moving"' in "".join(data.get("text/html", "")) for data in outputs)


def test_claims_with_angles_and_without_numbers():
    row = {"group": "paper", "claim": "a < b", "source": "A", "reported": None, "measured": None, "low": None}
    row |= {"high": None, "unit": "", "seeds": None, "verdict": "not measured", "details": None, "real_checkpoints": ""}
    text = claims(pd.DataFrame([row]))
    assert "a &lt; b" in text and "data-verdict='not measured'" in text and "nan" not in text


def test_moving_pictures_store_few_numbers():
    import torch

    assert moving(Decay(torch.tensor([2.0, 1.0])), power=3)["controls"]["power"]["start"] == 3
    assert len(Rounding(torch.randn(5000, 8)).numbers()["x"]) <= 32


# --- in a browser -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    chromium = Chromium(tmp_path_factory.mktemp("chromium"))
    yield chromium
    chromium.close()


def read_by_people(book: Path) -> list[Path]:
    return [path for path in sorted(book.rglob("*.html")) if "_modules" not in path.parts]


def test_no_page_complains_asks_elsewhere_or_is_wider_than_a_telephone(book, tab):
    wide = []
    tab.look(390)
    for path in read_by_people(book):
        tab.open(path)
        if (width := tab.ask("document.scrollingElement.scrollWidth")) > 390:
            wide.append((path.name, width))
    assert not tab.problems
    assert not wide


def test_dark_mode_is_readable(book, tab):
    tab.look(1200, dark=True)
    luminance = """(colour => { const c = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
      return 0.2126 * c[0] + 0.7152 * c[1] + 0.0722 * c[2]; })"""
    white = "[...document.querySelectorAll('article img')].map(i => getComputedStyle(i).backgroundColor)"
    for name in ("index.html", "claims.html", "notebooks/00_by_hand.html"):
        tab.open(book / name)
        text, behind = (
            tab.ask(f"{luminance}(getComputedStyle(document.querySelector('article p')).color)"),
            tab.ask(f"{luminance}(getComputedStyle(document.body).backgroundColor)"),
        )
        assert behind < 0.1 and (text + 0.05) / (behind + 0.05) >= 7
        assert set(tab.ask(white)) <= {"rgb(255, 255, 255)"}


def test_the_search_finds(book, tab):
    tab.look(1200)
    tab.open(book / "search.html", "?q=kurtosis")
    found = tab.ask(
        "new Promise(done => { const look = () => { const n = document.querySelectorAll('#search-results li').length;"
        " n >= 3 ? done(n) : setTimeout(look, 50); }; look(); })"
    )
    assert found >= 3 and not tab.problems


def test_claims_are_filtered(book, tab):
    tab.open(book / "claims.html")
    every = len(pd.read_csv(ROOT / "data/laptop/claims.csv"))
    shown = "[...document.querySelectorAll('#claims tbody tr')].filter(r => !r.hidden).length"
    assert tab.ask(shown) == every
    verdict = "document.querySelectorAll('#claims select')[1]"
    tab.ask(f"{verdict}.value = 'reproduced'; {verdict}.dispatchEvent(new Event('input'))")
    assert 0 < tab.ask(shown) == int((pd.read_csv(ROOT / "data/laptop/claims.csv").verdict == "reproduced").sum())


@pytest.mark.parametrize(
    ("notebook", "pictures"),
    [("00_by_hand", 3), ("02_quantizer_by_hand", 1), ("03_bound_and_pcdr", 1), ("04_s2d_finetuning", 1)],
)
def test_pictures_move_without_python(book, tab, notebook, pictures):
    tab.open(book / "notebooks" / f"{notebook}.html")
    assert tab.ask("document.querySelectorAll('div.moving.lives svg').length") == pictures
    for index in range(pictures):
        place = f"document.querySelectorAll('div.moving')[{index}]"
        controls = tab.ask(f"{place}.querySelectorAll('input, select').length")
        assert controls >= 2
        for at in range(controls):
            before = tab.ask(f"{place}.querySelector('svg').innerHTML + {place}.querySelector('p').textContent")
            tab.ask(
                f"(c => {{ c.value = c.options ? [...c.options].find(o => o.value !== c.value).value"
                f" : (Number(c.value) > (Number(c.min) + Number(c.max)) / 2 ? c.min : c.max);"
                f" c.dispatchEvent(new Event('input')); }})({place}.querySelectorAll('input, select')[{at}])"
            )
            assert tab.ask(f"{place}.querySelector('svg').innerHTML + {place}.querySelector('p').textContent") != before
        assert "NaN" not in tab.ask(f"{place}.innerHTML") and "undefined" not in tab.ask(f"{place}.innerText")
    assert not tab.problems


def test_the_browser_says_what_python_says(book, tab):
    """At the start, where the still picture's sentence is its text alternative."""
    for notebook in ("00_by_hand", "03_bound_and_pcdr", "04_s2d_finetuning"):
        tab.open(book / "notebooks" / f"{notebook}.html")
        for python, browser in tab.ask(
            "[...document.querySelectorAll('div.moving')]"
            ".map(d => [d.getAttribute('aria-label'), d.querySelector('p').textContent])"
        ):
            assert browser == python
