"""HTML pieces: parsed back, self-contained, and safe with hostile text."""

import base64
import io
import itertools
import math
import re

from PIL import Image

from latent_ae.report import charts, page
from tests.report.html_reader import read

HOSTILE = "<script>alert('x')</script> & \"quotes\" größe_日本.png"


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


def test_histogram_counts_every_finite_value():
    text = page.histogram({"<b>": [1.0, 2.0, math.nan, math.inf], "none": [], "_c$d$": [5.0]}, title="x<y", mark=1.5)
    reader = read(text)
    assert "x<y" in reader.text and "<b>" in reader.text and "c$d$" in reader.text and "none" not in reader.text
    ticks = re.findall(r'id="ytick_\d+">.*?<text[^>]*>([^<]+)</text>', text, re.DOTALL)
    assert ticks == ["0", "1"]  # counts are whole
    assert page.histogram({"a": [1.0, 2.0]}) == page.histogram({"a": [1.0, 2.0]})


def test_histogram_of_nothing_one_value_and_nearly_equal_values():
    for values in ([], [0.0], [27.5] * 3, [1.0, 1.0 + 1e-15], [1e300, -1e300], [math.nan]):
        assert "<svg" in page.histogram({"a": values})


def test_interval_chart_draws_points_and_lines_for_what_it_is_given():
    series = {"mode": {"A": (1.0, 0.9, 1.1), "B": (2.0, None, None)}, "sample": {"B": (3.0, math.nan, 3.0)}}
    text = page.interval_chart(series, title="PSNR")
    assert text.count(f"stroke: {charts.COLOURS[0]}; stroke-width: 2") == 1
    assert f"stroke: {charts.COLOURS[1]}; stroke-width: 2" not in text
    assert {"A", "B", "mode", "sample", "PSNR"} <= set(re.findall(r">([^<]+)</text>", text))
    assert "<svg" in page.interval_chart({})


def test_scatter_chart_writes_each_name_beside_its_point_and_takes_logarithms_of_wide_ranges():
    points = {"A": (10.0, 28.0), "B": (10_000.0, 31.0), "n" * 30: (20.0, 29.0)}
    text = page.scatter_chart(points, title="PSNR", x_label="ms", y_label="dB")
    written = set(re.findall(r">([^<]+)</text>", text))
    assert {"A", "B", "n" * 23 + "…", "PSNR", "ms", "dB", "10", "10000"} <= written
    assert text.count(f"fill: {charts.COLOURS[1]}") == 1  # a point for B
    alone = page.scatter_chart({"B": (1.0, 2.0)}, everyone=["A", "B"])
    assert f"fill: {charts.COLOURS[1]}" in alone and f"fill: {charts.COLOURS[0]}" not in alone
    near = page.scatter_chart({"A": (10.0, 28.0), "B": (90.0, 31.0)})
    assert {"20", "40", "60", "80"} <= set(re.findall(r">([^<]+)</text>", near))
    # three points above each other: no two names meet, and a lone one is beside its point
    close = page.scatter_chart({name: (8.0, 20.0 + 0.1 * at) for at, name in enumerate("PQR")} | {"S": (8.0, 26.0)})
    places = {
        name: (float(x), float(y))
        for x, y, name in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([PQRS])</text>', close)
    }
    assert len(places) == 4
    for one, other in itertools.combinations("PQR", 2):
        assert math.dist(places[one], places[other]) > 9, places
    assert "<svg" in page.scatter_chart({}) and "<svg" in page.scatter_chart({"A": (0.0, 1.0), "B": (5.0, 1.0)})


def test_charts_take_the_colour_of_the_pages_text():
    text = page.histogram({"a": [1.0, 2.0]}, title="t")
    assert "currentColor" in text and charts.INK not in text and "#ffffff" not in text


def test_manifest_shows_every_value_by_its_path():
    text = read(page.manifest({"a": {"b": None, "c": {}}, HOSTILE: [1, "x", {"y": True}], "d": []})).text
    for line in ("a.bnull", "a.c{}", f'{HOSTILE}1\nx\n{{"y": true}}', "d[]"):
        assert line in text


def test_estimates_facts_and_notes_are_escaped():
    cell = page.estimate(HOSTILE, HOSTILE, best=True)
    text = (
        page.table([{"x": cell}]) + page.facts({HOSTILE: HOSTILE}) + page.notes([HOSTILE]) + page.card(HOSTILE, HOSTILE)
    )
    assert read(text).text.count(HOSTILE) == 7 and "script" not in [tag for tag, _ in read(text).tags]
    assert page.notes([]) == ""


def test_a_figure_keeps_within_its_bytes_and_says_what_it_gave_up():
    noise = Image.effect_noise((600, 400), 90)
    text = page.figure(noise, "n", max_bytes=1_000_000)
    assert "data:image/png" in text and 'width="600" height="400"' in text
    text = page.figure(noise, "n", max_bytes=200_000)
    assert "data:image/jpeg" in text and 'width="600" height="400"' in text and "of its size" not in text
    text = page.figure(noise, "n", max_bytes=60_000)
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text).group(1))
    assert len(data) <= 60_000 and 'width="300" height="200"' in text and "n (1/2 of its size)" in read(text).text
    assert "data:image/jpeg" in page.figure(noise, max_bytes=1)  # ends, whatever is asked for


def test_small_pictures_are_enlarged_in_whole_steps():
    assert 'width="130" height="78" class="enlarged"' in page.figure(Image.new("RGB", (5, 3)))
    assert 'width="128" height="9"' in page.figure(Image.new("RGB", (128, 9)))


def test_a_page_is_written_whole(tmp_path):
    page.write(tmp_path / "a.html", page.page(HOSTILE, []))
    assert read((tmp_path / "a.html").read_text("utf-8")).text.count(HOSTILE) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
