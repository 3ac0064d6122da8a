"""Pages that people read: whatever stands in captions, names, labels and numbers, it stays text."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lcl_mcore import templates
from lcl_mcore.data.format import Document
from lcl_mcore.evaluation.heldout import HeldoutResult, PairEmbeds
from lcl_mcore.evaluation.heldout_report import write_report
from lcl_mcore.export.model_card import numbers, results
from lcl_mcore.untrusted import BadJsonError

ATTACKS = (
    '"><script>alert(1)</script>',
    "' onerror='alert(1)",
    '" onload="alert(1)" x="',
    "</style><img src=x onerror=alert(1)>",
    "<!-- --!> <svg/onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }} {% raw %}",
    "]]> <![CDATA[ &lt;b&gt; &#60;",
    "\x00\x1b[2J\u2028\u202e\x85\x0c\ud800",
    "` </code> ``` ` ````",
    "\n```\n# Heading\n---\n- list\n",
    "a | b \\| c",
    "[x](javascript:alert(1)) ![y](https://example.com/z.png) <https://example.com>",
    "\\`",
    "---\ntitle: x\n---",
    " ",
)
hostile = st.sampled_from(ATTACKS) | st.text(max_size=30) | st.text(alphabet="<>\"'&`|\\-=/# \n[]()!a", max_size=30)
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
ALLOWED = {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content"}, "title": set(), "style": set(), "h1": set(),
    "h2": set(), "p": {"class"}, "table": set(), "tr": set(), "th": set(), "td": set(), "figure": set(),
    "figcaption": set(), "div": {"class"}, "img": {"src", "alt", "title"}, "br": set(), "span": {"class"},
}  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: elements in order, and all their text and titles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[str] = []
        self.text = ""
        self.policy = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        values = dict(attrs)
        assert values.keys() <= ALLOWED[tag], (tag, values)
        assert len(values) == len(attrs)
        if tag == "img":
            assert str(values["src"]).startswith("data:image/")
            self.text += f"{values.get('title', '')}"
        if tag == "meta" and "http-equiv" in values:
            assert values["http-equiv"] == "Content-Security-Policy"
            self.policy = str(values["content"])

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def printed(text: str) -> str:
    """How a page shows a text."""
    return templates._UNPRINTABLE.sub("\ufffd", text)


def document_page(fill: dict[str, str]) -> str:
    image = {"source": templates.data_url(b"x", "png"), "label": fill["label"]}
    return templates.render(
        "document.html.j2",
        title=fill["title"],
        facts=fill["facts"],
        begin=True,
        end=True,
        segments=[
            {"image": image, "cut": True, "first": 0, "length": 4, "tokens": []},
            {"image": None, "cut": False, "first": 4, "length": 1, "tokens": [fill["token"]]},
        ],
        skipped=[(image, 0.5)],
        texts=[fill["text"]],
    )


DOCUMENT_FIELDS = ("title", "facts", "label", "token", "text")


@settings(max_examples=60, deadline=None)
@given(fill=st.fixed_dictionaries(dict.fromkeys(DOCUMENT_FIELDS, hostile)))
@example(fill=dict.fromkeys(DOCUMENT_FIELDS, ATTACKS[2]))
def test_an_inspected_document_stays_text(fill: dict[str, str]) -> None:
    page, plain = Page(document_page(fill)), Page(document_page(dict.fromkeys(DOCUMENT_FIELDS, "x")))
    assert page.elements == plain.elements
    assert page.policy == CSP
    for value in fill.values():
        assert printed(value) in page.text


def report(folder: Path, fill: dict[str, str]) -> str:
    pair = PairEmbeds(torch.eye(2), torch.eye(2), torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    recall = {f"{prefix}R@{k}": 0.25 for prefix in ("", "image_to_text_", "text_to_image_") for k in (1, 5)}
    summary: dict[str, Any] = {
        **{name: fill[name] for name in ("run", "heldout", "hardware")},
        "steps": 3,
        "images_seen": 12,
        "candidates": 2,
        "retrieval": {"trained": recall, "untrained": recall, "chance": {"R@1": 0.5, "R@5": 1.0}},
        "generation": {"right": 1.0, "shuffled": 2.0, "none": 3.0},
    }
    records = [{"step": i, "loss": 2.0, "contrastive": 1.0, "generation": 1.0} for i in (1, 2)]
    write_report(folder / "report.json", HeldoutResult(summary, pair, (fill["caption"], "two")), records)
    return (folder / "report.html").read_text("utf-8")


REPORT_FIELDS = ("run", "heldout", "hardware", "caption")


@settings(max_examples=3, deadline=None)
@given(fill=st.fixed_dictionaries(dict.fromkeys(REPORT_FIELDS, hostile)))
@example(fill=dict.fromkeys(REPORT_FIELDS, ATTACKS[0]))
@example(fill=dict.fromkeys(REPORT_FIELDS, ATTACKS[8]))
def test_a_report_stays_text(fill: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("report")
    page, plain = Page(report(folder, fill)), Page(report(folder, dict.fromkeys(REPORT_FIELDS, "x")))
    assert page.elements == plain.elements
    assert page.policy == CSP
    for value in fill.values():
        assert printed(value) in page.text


CARD_FIELDS = (
    "recipe", "weights", "format", "version", "usage", "skipped", "reason", "label", "fingerprint", "order", "result",
    "path", "problem", "config",
)  # fmt: skip


def card(fill: dict[str, str]) -> str:
    vision = SimpleNamespace(layers=2, width=32, heads=4, patch_size=8, image_size=32)
    return templates.render(
        "model_card.md.j2",
        recipe=fill["recipe"],
        vision=vision,
        weights=fill["weights"],
        state=SimpleNamespace(step=1, images_seen=2, tokens_seen=3, order_hash=fill["order"] or "x"),
        pixel_mean=[0.5],
        pixel_std=[0.5],
        formats=[
            {
                "name": fill["format"],
                "version": fill["version"],
                "deviation": "1e-07",
                "sizes": [32],
                "usage": fill["usage"],
            }
        ],
        skipped={fill["skipped"]: fill["reason"]},
        llava="use()",
        origin=fill["recipe"],
        changes={fill["path"]: fill["reason"]},
        fingerprints={fill["label"]: fill["fingerprint"]},
        results=[
            {"name": fill["result"], "numbers": numbers({fill["path"]: 0.5, "plain": 3}), "problem": ""},
            {"name": fill["result"], "numbers": [], "problem": fill["problem"] or "x"},
        ],
        config=fill["config"],
    )


MARKDOWN = MarkdownIt("commonmark").enable("table")


def markdown_structure(text: str) -> tuple[list[str], list[str]]:
    """Front matter's lines and kinds of all blocks and spans; and the contents of all code."""
    assert text.startswith("---\n")
    front, _, body = text[4:].partition("\n---\n")
    kinds, code = front.split("\n"), []
    for block in MARKDOWN.parse(body):
        for token in [block, *(block.children or [])]:
            kinds.append(f"{token.type} {token.tag} {token.info} {token.markup.strip('`')}")
            if token.type in ("code_inline", "fence"):
                code.append(token.content)
    return kinds, code


@settings(max_examples=100, deadline=None)
@given(fill=st.fixed_dictionaries(dict.fromkeys(CARD_FIELDS, hostile)))
@example(fill=dict.fromkeys(CARD_FIELDS, ATTACKS[9]))
@example(fill=dict.fromkeys(CARD_FIELDS, ATTACKS[10]))
@example(fill=dict.fromkeys(CARD_FIELDS, ATTACKS[11]))
def test_a_model_card_stays_text(fill: dict[str, str]) -> None:
    plain, _ = markdown_structure(card(dict.fromkeys(CARD_FIELDS, "x")))
    kinds, code = markdown_structure(card(fill))
    assert kinds == plain
    shown = "\n".join(code)
    for name, value in fill.items():
        if name not in ("usage", "config", "order", "problem", "format", "path"):
            assert printed(" ".join(value.split())) in shown, name


def test_urls_of_other_kinds_are_refused() -> None:
    for url in ("javascript:alert(1)", "data:text/html,x", "http://x", "https://x y", "data:image/png;base64,a b", ""):
        with pytest.raises(ValueError, match="is no image and no https address"):
            templates._url(url)
    assert templates._url(templates.data_url(b"abc", "jpg")) == "data:image/jpeg;base64,YWJj"
    with pytest.raises(KeyError):
        templates.data_url(b"abc", "png,x")


def test_codecs_are_a_closed_list() -> None:
    image = {"image_name": "0.x", "width": 1, "height": 1, "sha256": "", "bytes": 1, "codec": 'png" onerror="x'}
    with pytest.raises(BadJsonError, match=r"codec 'png\" onerror=\"x' is not one of \('jpg', 'png', 'webp'\)"):
        Document.from_json("k", {"kind": "pair", "text_list": ["a"], "image_info": [image]})


def test_damaged_results_are_named_in_the_card(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoints" / "step-00000001"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(
        json.dumps({"top1": 0.25, "curves": {"x": 1}, "weights": str(weights)})
    )
    (tmp_path / "results" / "other.json").write_text('{"top1": 0.25, "weights": "elsewhere"}')
    (tmp_path / "results" / "path.json").write_text('{"top1": 0.25, "weights": "a\\u0000b"}')
    (tmp_path / "results" / "b.json").write_text('{"top1": 0.25, "top1": 1}')
    (tmp_path / "results" / "c.json").mkdir()
    (tmp_path / "report.json").write_text("[" * 100_000)
    assert results(tmp_path, weights) == [
        {"name": "report", "numbers": [], "problem": "nested too deeply"},
        {"name": "a", "numbers": [("top1", "0.25")], "problem": ""},
        {"name": "b", "numbers": [], "problem": "a key stands twice in one object"},
        {"name": "c", "numbers": [], "problem": "not a regular file"},
        {"name": "path", "numbers": [], "problem": "embedded null byte"},
    ]
