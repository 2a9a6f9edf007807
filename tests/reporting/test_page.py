import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from forge import ConflictError, UnknownNameError
from forge.reporting import Chart, Page, Series

EVIL = "<script>alert('1')</script>\"'&"
VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Fails on tags that do not balance; keeps the elements, their attributes and the text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def loss(title="Loss"):
    return Chart(title, (Series("train", (1, 2, 3), (2.5, float("nan"), 1.5)),))


def full(text="word"):
    page = Page(text, text)
    page.heading(text)
    page.text(text)
    page.facts({text: text, "Steps": 3})
    page.table((text, "loss"), [(text, 1.5), (text, 2)])
    page.chart(Chart(text, (Series(text, (1, 2), (1, 2)),), x_label=text, y_label=text, marks=((1, text),)))
    page.preformatted(text)
    for kind in ("error", "warning", "good", "note"):
        page.notice(text, kind=kind)
    return page


def test_what_is_handed_in_is_text():
    html = full(EVIL).html()
    read = Reader(html)
    assert "<script" not in html.lower()
    assert read.all("script") == []
    # title, h1, subtitle, heading, text, fact's name and value, head, two cells, pre, four notices
    assert "".join(read.words).count(EVIL) == 15
    (image,) = read.all("img")
    assert image["alt"].count(EVIL) == 4
    assert set(image) == {"alt", "width", "height", "src"}


def test_cells_and_facts_of_any_type_are_escaped():
    class Named:
        def __str__(self):
            return EVIL

    page = Page("Report")
    page.facts({Named(): Named()})
    page.table((Named(),), [(Named(),)])
    assert "".join(Reader(page.html()).words).count(EVIL) == 4


def test_nothing_comes_from_outside():
    html = full("see https://example.org/x.png").html()
    read = Reader(html)
    links = [
        value
        for _, attributes in read.elements
        for key, value in attributes.items()
        if key in {"src", "href", "srcset"}
    ]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not {"link", "script", "iframe", "object", "form"} & {tag for tag, _ in read.elements}
    style = re.search("<style>(.*)</style>", html, re.DOTALL)[1]
    assert not re.search(r"url\(|@import|http", style)
    assert style.count("{") == style.count("}")
    (policy,) = [meta["content"] for meta in read.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")


def test_the_picture_is_the_chart():
    page = Page("Report")
    page.chart(loss())
    (image,) = Reader(page.html()).all("img")
    assert base64.b64decode(image["src"].partition(",")[2]) == loss().png()
    assert image["alt"] == loss().alt
    assert (image["width"], image["height"]) == ("1200", "660")


def test_charts_that_follow_each_other_share_a_grid():
    page = Page("Report")
    for _ in range(2):
        page.chart(loss())
    page.text("between")
    page.chart(loss())
    html = page.html()
    assert html.count('<div class="charts">') == 2
    first, second = html.split("between")
    assert (first.count("<figure>"), second.count("<figure>")) == (2, 1)
    Reader(html)


def test_it_suits_dark_rooms_narrow_screens_and_paper():
    html = Page("Report").html()
    assert html.startswith("<!DOCTYPE html>")
    assert '<html lang="en">' in html
    assert '<meta charset="utf-8">' in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    assert "color-scheme: light dark" in html
    # Paper is white whatever the screen's mode.
    assert "@media screen and (prefers-color-scheme: dark)" in html
    assert "@media print" in html


def test_columns_of_numbers_are_flush_right():
    page = Page("Report")
    page.table(("step", "loss", "note", "ok"), [(100, 1.25, "", True), (200, 1 / 3, "best", False)])
    html = page.html()
    assert html.count('class="number"') == 6
    assert '<th scope="col" class="number">step</th>' in html
    assert '<td class="number">0.333333</td>' in html
    assert "<td>True</td>" in html
    page.table(("rounded",), [("1,024.50",), ("nan",)])
    assert '<td class="number">1,024.50</td>' in page.html()


def test_a_table_without_rows():
    page = Page("Report")
    page.table(("step", "loss"), [])
    assert len(Reader(page.html()).all("th")) == 2


def test_a_row_must_fit_its_header():
    with pytest.raises(ConflictError, match="1 cells under a header of 2"):
        Page("Report").table(("step", "loss"), [(1, 2.0), (2,)])


def test_notices_say_their_kind_in_words():
    page = Page("Report")
    page.notice("the loss was nan")
    assert '<p class="notice error"><strong>Error:</strong> the loss was nan</p>' in page.html()
    with pytest.raises(UnknownNameError, match="Did you mean 'warning'"):
        page.notice("x", kind="warnin")


def test_paragraphs():
    page = Page("Report")
    page.text("one\nline\n\n\n  two  \n\n")
    assert "<p>one\nline</p>\n<p>two</p>" in page.html()


def test_saving_replaces_the_page_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    Page("first").save(path)
    Page("second").save(str(path))
    assert path.read_text(encoding="utf-8") == Page("second").html()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]

    def full_disk(file, data):
        with file.open("wb") as half:
            half.write(data[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Page("third").save(path)
    assert path.read_text(encoding="utf-8") == Page("second").html()
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_halves_of_characters_can_be_saved(tmp_path):
    page = Page("Report")
    page.preformatted("a token cut in half: \ud83d")
    page.save(tmp_path / "report.html")
    assert "cut in half: ?" in (tmp_path / "report.html").read_text(encoding="utf-8")
