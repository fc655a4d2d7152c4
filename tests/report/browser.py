"""Pages laid out by a headless Chromium, and what a probe finds in them."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NO_BROWSER = "no chromium, chromium-browser or google-chrome is on PATH; on Debian: apt-get install chromium"


# CI sets LATENT_AE_REQUIRE_BROWSER: there a missing browser fails
in_browser = pytest.mark.skipif(BROWSER is None and "LATENT_AE_REQUIRE_BROWSER" not in os.environ, reason=NO_BROWSER)


# fmt: off
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0", "--window-size=1280,900",
    "--virtual-time-budget=20000",
]
PROBE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  const found = {width: innerWidth, overflow: root.scrollWidth - root.clientWidth,
                 fetched: performance.getEntriesByType("resource").map(entry => entry.name), pictures: []};
  const drawn = text => { const m = text.getScreenCTM();
                          return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(m.a, m.b); };
  const color = text => (text.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  // WCAG 2.2: relative luminance, and the contrast ratio of two of them
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, at) => sum + v * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = at => { for (; at; at = at.parentElement) {
    const behind = color(getComputedStyle(at).backgroundColor);
    if (behind.length < 4 || behind[3] > 0) return behind;
  } return [255, 255, 255]; };
  const contrast = at => { const style = getComputedStyle(at);
    const [a, b] = [light(color(at.closest("svg") ? style.fill : style.color)), light(ground(at))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
  const written = [...document.body.querySelectorAll("*")].filter(at => !at.closest("style, script, metadata")
    && [...at.childNodes].some(node => node.nodeType == 3 && node.textContent.trim()));
  const contrasts = written.map(contrast);
  found.contrast = Math.min(21, ...contrasts);
  found.faintest = written[contrasts.indexOf(found.contrast)]?.outerHTML.slice(0, 200);
  found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  found.letters = Math.min(...[...document.querySelectorAll("svg text")].map(drawn));
  const keys = [...document.querySelectorAll(".pairs th")].filter(key => key.textContent.length < 40);
  const lines = key => { const range = document.createRange(); range.selectNodeContents(key);
                         return new Set([...range.getClientRects()].map(box => Math.round(box.top))).size; };
  found.broken = keys.filter(key => lines(key) > 1).map(key => key.textContent);
  for (const label of document.querySelectorAll("label.zoom")) {
    const image = label.querySelector("img"), shown = () => image.getBoundingClientRect().width, small = shown();
    label.click();
    const frame = label.querySelector(".frame"), box = frame.getBoundingClientRect();
    const reach = frame.scrollWidth, large = shown();
    label.click();
    found.pictures.push({small, large, again: shown(), natural: image.naturalWidth,
                         covers: box.width == root.clientWidth && box.height == root.clientHeight, reach});
  }
  document.body.append(Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
  parent.postMessage(JSON.stringify(found), "*");
});</script>"""
NARROW = """<!doctype html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre><script>
const all = [];
addEventListener("message", event => {
  all[Array.from(frames).indexOf(event.source)] = JSON.parse(event.data);
  if (Object.keys(all).length == frames.length) document.getElementById("found").textContent = JSON.stringify(all);
});
</script>%s</body>"""
FRAME = '<iframe style="border:0;width:%dpx;height:800px" srcdoc="%s"></iframe>'


def narrow(folder, texts: Sequence[str], width_px: int, *, dark: bool = False) -> list[dict]:
    """What the probe found in each page, in frames of `width_px`: a window cannot be as narrow."""
    probed = [text.replace("</body>", PROBE + "</body>") for text in texts]
    return _found(folder, NARROW % "".join(FRAME % (width_px, html.escape(text)) for text in probed), dark=dark)


def _found(folder, probed: str, *, dark: bool = False):
    assert BROWSER, NO_BROWSER
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    file = folder / "probed.html"
    file.write_text(probed, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, *FLAGS, scheme, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    match = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1]))
