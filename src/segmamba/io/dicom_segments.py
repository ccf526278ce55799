"""What the labels of a DICOM-SEG mean: names, codes, colours."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from segmamba.atomic import read_json
from segmamba.errors import ConfigError, describe
from segmamba.types import JsonDict

CodeWords = tuple[str, str, str]
"""Value, coding scheme and meaning, such as ("10200004", "SCT", "Liver")."""
Color = tuple[int, int, int]
"""Red, green, blue, 0 to 255."""

ANATOMY: CodeWords = ("123037004", "SCT", "Anatomical Structure")
ABNORMAL: CodeWords = ("49755003", "SCT", "Morphologically Abnormal Structure")
TISSUE: CodeWords = ("85756007", "SCT", "Tissue")
"""Categories of DICOM's context group 7150."""

_LESIONS = (7159,)
_ORGANS = (7152, 7153, 7154, 7155, 7156, 7160, 7140)
"""DICOM's context groups of segmentation types (PS3.16)."""
_SYNONYMS = {
    **dict.fromkeys(("tumor", "tumour", "cancer", "wholetumor"), "neoplasm"),
    **dict.fromkeys(("oedema", "peritumoraledema", "ed"), "edema"),
    **dict.fromkeys(("necroticcore", "ncr"), "necrosis"),
    **dict.fromkeys(("enhancingtumor", "enhancingtumour", "et"), "enhancinglesion"),
}
_SIDES = {"left", "right", "l", "r"}
_GOLDEN = 0.618034
_KEYS = {"category", "type", "color"}


@dataclass(frozen=True)
class Segment:
    """One label, as a DICOM-SEG describes it."""

    value: int
    """Its integer in the label map."""
    name: str
    category: CodeWords = TISSUE
    """What sort of thing it is."""
    kind: CodeWords = TISSUE
    """What it is."""
    color: Color = field(default=(255, 0, 0))


def make_segments(
    labels: Mapping[str, int], described: Mapping[str, JsonDict] | None = None
) -> list[Segment]:
    """Describe the labels of a data set.

    Names that DICOM's own lists of organs and lesions hold (liver, left kidney, tumour,
    edema ...) get these codes, all others are called tissue; colours are drawn round
    the colour circle.

    Args:
        labels: Name to integer; the background 0 is left out.
        described: Name to `category` and `type` (value, scheme, meaning) and `color`
            (red, green, blue), where the defaults won't do.

    Returns:
        The segments by ascending integer.

    Raises:
        ConfigError: A description is not of this form, or of no label.
    """
    described = described or {}
    by_value: dict[int, str] = {}
    for name, value in labels.items():
        if value != 0:
            by_value.setdefault(value, name)
    unknown = [name for name in described if name not in by_value.values()]
    if unknown:
        raise ConfigError(
            describe(
                "a described segment is no label of the model",
                expected=", ".join(by_value.values()),
                found=", ".join(unknown),
            )
        )
    return [
        _segment(value, by_value[value], index, described.get(by_value[value], {}))
        for index, value in enumerate(sorted(by_value))
    ]


def load_descriptions(path: Path | str) -> dict[str, JsonDict]:
    """Read the descriptions of segments that `make_segments` takes from JSON.

    Raises:
        FormatError: The file is unreadable.
        ConfigError: It isn't an object of objects.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not all(
        isinstance(value, dict) for value in data.values()
    ):
        raise ConfigError(
            describe(
                "bad description of segments",
                expected='{"NAME": {"category": [...], "type": [...], "color": [...]}}',
                found=type(data).__name__,
                file=path,
            )
        )
    return data


def _segment(value: int, name: str, index: int, given: JsonDict) -> Segment:
    if set(given) - _KEYS:
        raise _bad(name, ", ".join(sorted(_KEYS)), ", ".join(set(given) - _KEYS))
    category, kind = _known_codes(name)
    return Segment(
        value=value,
        name=name,
        category=_code(name, given["category"]) if "category" in given else category,
        kind=_code(name, given["type"]) if "type" in given else kind,
        color=_color(name, given["color"]) if "color" in given else _hue(index),
    )


def _known_codes(name: str) -> tuple[CodeWords, CodeWords]:
    """Look a name up in DICOM's lists; sides are in the name alone."""
    words = [word for word in re.split(r"[\W_]+", name.lower()) if word not in _SIDES]
    plain = "".join(words)
    plain = _SYNONYMS.get(plain, plain)
    for groups, category in ((_LESIONS, ABNORMAL), (_ORGANS, ANATOMY)):
        for group in groups:
            concept = _concepts(group).get(plain)
            if concept is not None:
                return category, concept
    return TISSUE, TISSUE


def _concepts(group: int) -> dict[str, CodeWords]:
    from pydicom.sr.codedict import codes

    concepts = cast("Any", getattr(codes, f"CID{group}")).concepts
    return {
        name.lower(): (code.value, code.scheme_designator, code.meaning)
        for name, code in concepts.items()
    }


def _hue(index: int) -> Color:
    red, green, blue = colorsys.hsv_to_rgb((index * _GOLDEN) % 1, 0.8, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _code(name: str, given: object) -> CodeWords:
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 3
        or not all(isinstance(word, str) and 0 < len(word) <= 64 for word in given)
        or any(len(word) > 16 for word in given[:2])
    ):
        raise _bad(name, 'three texts such as ["10200004", "SCT", "Liver"]', given)
    return given[0], given[1], given[2]


def _color(name: str, given: object) -> Color:
    if (
        not isinstance(given, (list, tuple))
        or len(given) != 3
        or not all(type(part) is int and 0 <= part <= 255 for part in given)
    ):
        raise _bad(name, "three integers from 0 to 255", given)
    return given[0], given[1], given[2]


def _bad(name: str, expected: str, found: object) -> ConfigError:
    return ConfigError(
        describe(f"bad description of segment {name}", expected=expected, found=found)
    )
