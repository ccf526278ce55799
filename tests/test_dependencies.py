"""What an installation brings along is pinned, so that it can be audited."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[1]


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by package."""
    found: dict[str, list[Requirement]] = {}
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            item = Requirement(line)
            found.setdefault(canonicalize_name(item.name), []).append(item)
    return found


def declared() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    found = [Requirement(line) for line in lines]
    return [item for item in found if item.name != "segmamba"]


def collect(requirement: Requirement, seen: dict[str, bool]) -> None:
    """Collect a requirement and, below it, all that it brings along here.

    `seen` tells by name whether the one who asks for it asks for one exact version.
    """
    extras = requirement.extras or {""}
    name = canonicalize_name(requirement.name)
    exact = any(part.operator == "==" for part in requirement.specifier)
    if name in seen and not requirement.extras:
        return
    seen[name] = seen.get(name, False) or exact
    for line in metadata.requires(name) or ():
        child = Requirement(line)
        marker = child.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras):
            collect(child, seen)


def test_every_dependency_is_pinned() -> None:
    seen: dict[str, bool] = {}
    for requirement in declared():
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                collect(requirement, seen)
            except metadata.PackageNotFoundError as error:
                pytest.skip(f"not all of [dev] is installed: {error}")
    assert {name for name, exact in seen.items() if not exact} - set(pins()) == set()
    assert len(seen) > 40


def test_each_pin_is_one_exact_version_for_each_python() -> None:
    for name, lines in pins().items():
        for line in lines:
            operators = [part.operator for part in line.specifier]
            assert operators == ["=="], name
        for version in ("3.10", "3.11", "3.12", "3.13"):
            place = {"python_version": version, "sys_platform": "linux"}
            fitting = [
                line for line in lines if not line.marker or line.marker.evaluate(place)
            ]
            assert len(fitting) <= 1, (name, version)
