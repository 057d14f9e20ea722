"""Chromium for the tests that look at pages, and what a reader would see in them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """A headless browser; the test is skipped where none is installed."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox", *arguments])
        yield opened
        opened.close()


def overflow(view: Any) -> int:
    """Pixels by which the page is wider than its window."""
    wider: int = view.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    return wider


def own_words(view: Any) -> str:
    """What the page itself says, in text and attributes, folded parts included; nothing that comes from the data."""
    said: list[str] = view.evaluate(
        """() => {
          const own = (node) => !node.closest("script, style, #language, [translate=no]");
          const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
          while (texts.nextNode()) if (own(texts.currentNode.parentElement)) found.push(texts.currentNode.data);
          for (const name of ["placeholder", "aria-label"])
            for (const node of document.querySelectorAll(`[${name}]`)) found.push(node.getAttribute(name));
          return found;
        }"""
    )
    return "\n".join(said)


def english_words(text: str) -> set[str]:
    """Words of two letters and more."""
    return set(re.findall(r"[A-Za-z][A-Za-z_.]*[A-Za-z]", text))


def broken_names(view: Any) -> list[str]:
    """Ids, labels and parts of paths that stand on more than one line."""
    found: list[str] = view.evaluate(
        """() => [...document.querySelectorAll(".name")].filter((node) => node.getClientRects().length &&
          node.getBoundingClientRect().height > 1.9 * parseFloat(getComputedStyle(node).lineHeight)).map((node) => node.innerText)"""
    )
    return found


def faint(view: Any) -> list[str]:
    """Texts whose contrast with what they stand on is below 4.5 (WCAG 2 AA), or that are smaller than 10 pixels."""
    found: list[str] = view.evaluate(
        """() => {
          const rgba = (told) => { const n = told.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
          const over = (top, below) => below.map((c, i) => i < 3 ? top[i] * top[3] + c * (1 - top[3]) : 1);
          const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ground = (node) => over(rgba(getComputedStyle(node).backgroundColor), node === document.body ? [0, 0, 0, 1] : ground(node.parentElement));
          const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
          while (texts.nextNode()) {
            const node = texts.currentNode.parentElement, style = getComputedStyle(node);
            if (!texts.currentNode.data.trim() || node.closest("script, style, title, option") || !node.getClientRects().length) continue;
            const svg = node.closest("svg"), scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            const back = ground(svg ? svg.parentElement : node), ink = over(rgba(svg ? style.fill : style.color), back);
            const [a, b] = [light(ink), light(back)].sort((x, y) => y - x), contrast = (a + 0.05) / (b + 0.05);
            if (contrast < 4.5 || parseFloat(style.fontSize) * scale < 10)
              found.push(`${texts.currentNode.data.trim().slice(0, 40)}: ${contrast.toFixed(2)}, ${style.fontSize}`);
          }
          return found;
        }"""
    )
    return found
