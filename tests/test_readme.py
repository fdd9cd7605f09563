"""The front page: short, its links lead somewhere, its numbers are of committed records."""

import re
from pathlib import Path

from vipr_utils import __main__ as command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_prose_is_at_most_900_words():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(lines).split()) <= 900


def test_links_and_pictures_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_picture_has_an_alternative_text_and_stands_on_the_first_screen():
    first = README.split("\n## ")[0]
    (alternative,) = re.findall(r"!\[([^\]]+)\]\(docs/answers\.png\)", first)
    assert len(alternative) > 40


def test_its_number_stands_in_the_results():
    (number,) = re.findall(r"\*\*mAP@5 ([\d.]+) \[", README)
    assert number in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_commands_are_those_there_are():
    used = re.findall(r"(?:^|/|`|&& )vipr (\w+)", README, re.M)
    assert used and set(used) <= set(command.COMMANDS)
