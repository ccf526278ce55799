"""Figures hold what they should; pixels are read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segmamba.data.labels import LabelScheme
from segmamba.errors import FormatError, GeometryError
from segmamba.evaluation import evaluate_folder
from segmamba.io import Volume, write_label_map
from segmamba.report.canvas import COLOURS
from segmamba.report.figures import (
    Picture,
    case_figure,
    draw_cases,
    training_curve,
    worst_case_ids,
)
from segmamba.report.worst import worst_cases

SCHEME = LabelScheme({"background": 0, "inner": 1, "outer": 2})


def read_png(path: Path):
    image = pytest.importorskip("matplotlib.image")
    return image.imread(path)[..., :3]


def share_of(pixels, colour):
    """Share of the pixels within a hair of a colour like '#2ca7c9'."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return float((np.abs(pixels - wanted) < 0.02).all(axis=-1).mean())


def case():
    image = np.zeros((20, 24, 16), np.float32)
    image[2:18, 2:22, 2:14] = 1.0
    reference = np.zeros(image.shape, np.uint8)
    reference[4:10, 4:12, 4:10] = 2
    reference[6:8, 6:9, 6:8] = 1
    return image, reference


def test_case_figure_paints_both_label_maps(tmp_path):
    image, reference = case()
    output = tmp_path / "case.png"
    volume = Volume(image[None], np.diag([-1.0, -1.0, 2.0, 1.0]))
    case_figure(volume, reference, reference, output, labels=SCHEME, title="one")
    pixels = read_png(output)
    assert share_of(pixels, COLOURS[0]) > 0.002
    assert share_of(pixels, COLOURS[1]) > 0.002
    third = pixels.shape[1] // 3
    columns = [pixels[:, i * third : (i + 1) * third] for i in range(3)]
    shares = [share_of(column[:-120], COLOURS[1]) for column in columns]
    assert shares[0] == 0  # the image alone
    assert shares[1] == pytest.approx(shares[2], rel=0.1)
    case_figure(volume, reference, np.zeros_like(reference), output, labels=SCHEME)
    empty = read_png(output)
    assert share_of(empty[:-120, 2 * third :], COLOURS[1]) == 0


def test_nothing_half_written_and_no_pyplot(tmp_path):
    import subprocess
    import sys

    program = (
        "import sys, numpy as np, segmamba.report.figures as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        "a = np.zeros((4, 5, 6), np.uint8)\n"
        f"f.case_figure(a, a, a, r'{tmp_path / 'a.png'}')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_shapes_must_agree(tmp_path):
    image, reference = case()
    with pytest.raises(GeometryError, match="shapes differ"):
        case_figure(image, reference[:-1], reference, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def write_log(path: Path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_training_curve_shows_loss_and_validation(tmp_path):
    lines = [
        {"epoch": e, "loss": 1 / e, "learning_rate": 0.01, "elapsed_s": 2.0 * e}
        for e in range(1, 31)
    ]
    log, output = tmp_path / "log.jsonl", tmp_path / "curve.png"
    training_curve(write_log(log, lines), output)
    assert share_of(read_png(output), COLOURS[2]) == 0
    lines[9]["validation"] = {"score": 0.5}
    lines[19]["validation"] = {"score": 0.9}
    training_curve(write_log(log, lines), output)
    assert share_of(read_png(output), COLOURS[2]) > 5e-4


def test_a_hundred_labels_leave_room_for_the_picture(tmp_path):
    """A warning that nothing fits would fail this test, as every warning does."""
    image, reference = case()
    names = {f"some organ number {n}": (n,) for n in range(1, 118)}
    scores = dict.fromkeys(names, 0.5)
    output = tmp_path / "case.png"
    picture = Picture("one", image, reference, reference, np.eye(4), scores)
    draw_cases([picture], output, labels=names)
    few = tmp_path / "few.png"
    draw_cases([picture], few, labels={"inner": (1,), "outer": (2,)})
    for colour in COLOURS[:2]:
        shares = share_of(read_png(output), colour), share_of(read_png(few), colour)
        assert shares[0] > 0.6 * shares[1]
    lines = [{"epoch": e, "loss": 1 / e, "validation": scores} for e in (1, 2)]
    training_curve(write_log(tmp_path / "log.jsonl", lines), output)


def test_dollars_in_names_are_no_maths(tmp_path):
    image, reference = case()
    name = r"x$\foo$y"
    picture = Picture(name, image, reference, reference, np.eye(4), {name: 0.5})
    draw_cases([picture] * 2, tmp_path / "case.png", labels={name: (1,)})
    lines = [{"epoch": 1, "loss": 1.0, "validation": {name: 0.5}}]
    training_curve(write_log(tmp_path / "log.jsonl", lines), tmp_path / "curve.png")


@pytest.mark.parametrize("odd", ["null loss", "cut line", "one epoch", "no time"])
def test_training_curve_bears_odd_logs(tmp_path, odd):
    lines = [{"epoch": e, "loss": 1.0, "elapsed_s": e} for e in (1, 2, 3)]
    log = tmp_path / "log.jsonl"
    if odd == "null loss":
        lines[1]["loss"] = None
    if odd == "one epoch":
        lines = lines[:1]
    if odd == "no time":
        lines = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5}]
    write_log(log, lines)
    if odd == "cut line":
        log.write_text(log.read_text() + '{"epoch": 4, "lo')
    training_curve(log, tmp_path / "curve.png")
    assert read_png(tmp_path / "curve.png").std() > 0


def test_a_missing_or_empty_log_is_an_error(tmp_path):
    with pytest.raises(FormatError, match="can't read a training log"):
        training_curve(tmp_path / "none.jsonl", tmp_path / "curve.png")
    with pytest.raises(FormatError, match="empty"):
        training_curve(write_log(tmp_path / "log.jsonl", []), tmp_path / "curve.png")


def test_worst_cases_come_first_and_are_drawn(tmp_path):
    _, reference = case()
    for name, shift in (("good", 0), ("bad", 4), ("middling", 1)):
        affine = np.eye(4)
        write_label_map(tmp_path / "r" / f"{name}.nii.gz", reference, affine)
        moved = np.roll(reference, shift, 0)
        write_label_map(tmp_path / "p" / f"{name}.nii.gz", moved, affine)
    metrics = evaluate_folder(tmp_path / "p", tmp_path / "r")
    assert worst_case_ids(metrics, 2) == ["bad", "middling"]
    output = tmp_path / "worst.png"
    drawn = worst_cases(metrics, tmp_path / "p", tmp_path / "r", output, count=2)
    assert drawn == ["bad", "middling"]
    assert share_of(read_png(output), COLOURS[1]) > 0.002
