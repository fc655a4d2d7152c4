"""HTML pieces: parsed back, self-contained, and safe with hostile text."""

import base64
import io
import math
import re
from html.parser import HTMLParser

from PIL import Image

from latent_ae import page

HOSTILE = "<script>alert('x')</script> & \"quotes\" größe_日本.png"


class Reader(HTMLParser):
    VOID = ("meta", "img", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def whole_page() -> str:
    picture = Image.new("RGB", (40, 30), (200, 10, 10))
    rows = [{"name": HOSTILE, "psnr": 27.51234, "lpips": None}, {"name": "b", "psnr": math.inf, "lpips": 0.1}]
    return page.page(
        HOSTILE,
        [
            page.section("Result", page.table(rows), page.paragraph(HOSTILE)),
            page.section(
                "Losses",
                page.line_chart({"<b>größe": [(0, 1.0), (1, math.nan), (2, 3.0)], "_b$": []}, log_y=True),
            ),
            page.section("Previews", page.figure(picture, HOSTILE), page.figure(picture, jpeg_quality=90)),
            page.section("Settings", page.preformatted("a: 1\nb: <c>")),
        ],
        subtitle=HOSTILE,
    )


def test_text_is_escaped_everywhere_and_read_back_whole():
    reader = read(whole_page())
    assert "script" not in [tag for tag, _ in reader.tags]
    # title, h1, subtitle, cell, paragraph, caption
    assert reader.text.count(HOSTILE) >= 6 and "<b>größe" in reader.text
    assert any(attributes.get("alt") == HOSTILE for _, attributes in reader.tags)


def test_no_external_file_is_referred_to():
    reader = read(whole_page())
    for _, attributes in reader.tags:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:")), attributes
    assert "@import" not in page.STYLE and "url(" not in page.STYLE


def test_table_marks_numbers_and_gaps():
    text = page.table([{"name": "a", "psnr": 27.51234, "lpips": None}, {"name": "b", "psnr": 3, "lpips": 0.1}])
    assert '<td class="number">27.51</td>' in text and '<td class="number">–</td>' in text and "<td>a</td>" in text
    assert read(page.table([])).text == "No rows."


def test_figure_holds_the_picture_itself():
    picture = Image.new("RGB", (5, 3), (1, 2, 3))
    data = re.search(r"data:image/png;base64,([^\"]+)", page.figure(picture)).group(1)
    assert list(Image.open(io.BytesIO(base64.b64decode(data))).getdata()) == [(1, 2, 3)] * 15
    jpeg = page.figure(Image.new("RGBA", (5, 3)), jpeg_quality=80)
    assert "data:image/jpeg;base64," in jpeg


def test_chart_of_nothing_and_of_one_point_is_drawn_the_same_each_time():
    assert read(page.line_chart({}, title="empty")).text.count("empty") == 1
    assert page.line_chart({"a": [(0, 1)]}) == page.line_chart({"a": [(0, 1)]})


def test_names_that_no_file_can_hold_are_shown():
    assert page.escape("bad\udcff") == "bad\\udcff"
    page.page("bad\udcff", []).encode("utf-8")
