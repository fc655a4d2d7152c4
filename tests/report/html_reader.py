"""Pages as a reader of HTML sees them."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image


class Reader(HTMLParser):
    VOID = ("meta", "img", "input", "br", "wbr")

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


def pictures(text: str) -> list[Image.Image]:
    files = re.findall(r"data:image/(?:png|jpeg);base64,([^\"]+)", text)
    return [Image.open(io.BytesIO(base64.b64decode(file))) for file in files]
