"""Write what all notebooks share: the bootstrap cell, and the address and release of
pyproject.toml. `make stamp`

The repository's address is one setting, `Repository` under [project.urls]; badges and clone lines
are made from it here.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ADDRESS = re.search(r'^Repository = "(https://github\.com/[\w.-]+/[\w.-]+)"$', PROJECT, re.M)[1]
RELEASE = (
    "v" + re.search(r'^version = "(.+)"$', PROJECT, re.M)[1]
)  # the tag that a notebook without the package clones
OWN = re.compile(
    r"(kaggle\.com/kernels/welcome\?src=https://github\.com/|colab\.research\.google\.com/github/)"
    r"[\w.-]+/[\w.-]+(?=/blob/)"
)


def bootstrap() -> str:
    """The source of the bootstrap cell."""
    text = (ROOT / "tests" / "bootstrap_cell.py").read_text(encoding="utf-8").rstrip("\n")
    return text.replace("RELEASE", RELEASE).replace("ADDRESS", ADDRESS)


def badges(text: str) -> str:
    """The text with every badge pointing at the address."""
    return OWN.sub(lambda badge: badge[1] + ADDRESS.removeprefix("https://github.com/"), text)


def stamped(notebook: dict) -> dict:
    """The notebook with the bootstrap cell and the badges as they must be; outputs stay."""
    for cell in notebook["cells"]:
        if "bootstrap" in cell["metadata"].get("tags", []):
            cell["metadata"]["tags"] = [
                "bootstrap",
                "nbval-ignore-output",
            ]  # its table is of this machine
            cell["source"] = bootstrap().splitlines(keepends=True)
        elif cell["cell_type"] == "markdown":
            cell["source"] = badges("".join(cell["source"])).splitlines(keepends=True)
    return notebook


if __name__ == "__main__":
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = json.dumps(
            stamped(json.loads(path.read_text(encoding="utf-8"))), indent=1, ensure_ascii=False
        )
        path.write_text(text + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(badges(readme.read_text(encoding="utf-8")), encoding="utf-8")
