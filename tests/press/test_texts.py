"""What a reader or a model may say is text wherever it is shown: no markup, no code, no order to a terminal."""

import dataclasses
import re
from collections.abc import Iterator

import pytest
import yaml
from typer.testing import CliRunner

from lib import edits, models
from lib.__main__ import app
from lib.facts import Fact
from lib.files import ROOT
from lib.press import boxes, export
from lib.press.texts import fill, rendered
from tests.test_edits import an_edit

EVIL = "<script>x</script> {{ 7*7 }} {doc}`index` **b** | ../.."


@pytest.fixture
def evil(tiny_gpt2_model):
    """An edit and a model whose every text is hostile; a template that holds it, and a hole."""
    model = dataclasses.replace(tiny_gpt2_model, name=f"/x/{EVIL.replace('/', '')}")
    facts = (Fact("France", EVIL, "fit"), Fact(EVIL, "Berlin", "fit"))
    about = {"facts": facts, "template": EVIL + " `{}`", "recipe": {"rate": EVIL}, "model_name": EVIL}
    return model, dataclasses.replace(an_edit(tiny_gpt2_model), **about)


def shown(markdown: str) -> str:
    """What Markdown reads outside code: in code it reads nothing."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.S)


def test_cards_hold_texts_as_text(evil):
    model, edit = evil
    cards = [export.card(model, edit, "0" * 64), fill("adapter_card.md", model=model, edit=edit)]
    cards.append(fill("edit_card.md", edit=edit, sha256="0" * 64))
    for card in cards:
        body = shown(card.split("---\n", 2)[-1])
        assert not re.search(r"(?<!\\)<script|(?<!\\)\*\*b|(?<!\\)\{\{", body), body
    assert "49" not in shown(cards[0]) and "\\<script\\>" in cards[0]
    assert shown("a `<script>` b") == "a  b" and "<script" in shown("<script>")


def test_a_box_holds_what_a_model_says_as_text():
    """Its texts are MyST, which runs `{{ }}` and passes HTML on."""
    run = boxes.inert({"a": {"told": [EVIL, 2, 0.5]}, "b": "L10 H8, \x1b[2J"})
    text = rendered("{{ v.a.told[0] }} {{ v.a.told[1] }} {{ v.b }}", v=run)
    assert text.startswith("&lt;script>x&lt;/script> &#123;&#123; 7*7 }} &#123;doc}`index`")
    assert text.endswith(" 2 L10 H8, ␛[2J")
    assert boxes.by_number({"02_x": {"values": {"k": "<b>"}}}) == {"c2": {"k": "&lt;b>"}}


def test_a_terminal_is_sent_no_order_of_an_edit(tmp_path):
    """An edit whose template clears the screen, and names a link and a colour."""
    organism = models.load("organism")
    edit = dataclasses.replace(an_edit(organism), template="\x1b[2J\x1b]0;x\x07[red]The capital of {} is")
    path = edits.save(edit, tmp_path / "e.safetensors")
    done = CliRunner().invoke(app, ["verify", str(path), "--model", "organism"])
    assert "\x1b" not in done.output and "\x07" not in done.output and "[red]The capital" in done.output


def _twice(node: yaml.Node) -> Iterator[str]:
    """Keys that a mapping holds more than once, of which YAML keeps the last and says nothing."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        yield from (key for key in dict.fromkeys(keys) if keys.count(key) > 1)
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        for child in part if isinstance(part, tuple) else (part,):
            yield from _twice(child)


@pytest.mark.parametrize("path", [p for room in ("lib", "data") for p in (ROOT / room).rglob("*.yaml")])
def test_no_entry_hides_another_of_its_name(path):
    assert not list(_twice(yaml.compose(path.read_text(encoding="utf-8"))))


def test_an_entry_that_hides_another_is_found():
    assert list(_twice(yaml.compose("a: {b: 1, c: [{d: 1, d: 2}]}\ne: 1\na: 2"))) == ["a", "d"]
