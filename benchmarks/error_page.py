"""Write docs/reference/errors.md from the tests' bad inputs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "io"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

from corpus import make_texts, page

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "errors.md"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(make_texts(Path(folder).resolve())), encoding="utf-8")


if __name__ == "__main__":
    main()
