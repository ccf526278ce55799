"""What a power cut left of an output is no output."""

from __future__ import annotations

from pathlib import Path

import dicom_series as make
import numpy as np
import pytest

from segmamba.io import (
    is_whole,
    list_series,
    make_segments,
    write_dicom_rtstruct,
    write_dicom_seg,
    write_label_map,
)


@pytest.fixture
def outputs(tmp_path: Path) -> list[Path]:
    """A label map, and the same as DICOM of each kind."""
    label_map = np.zeros(make.SHAPE[::-1], np.uint8)
    label_map[1:4, 1:3, 1:3] = 1
    series = list_series(make.write(tmp_path / "scan", make.datasets()))[0]
    segments = make_segments({"ball": 1})
    paths = [tmp_path / name for name in ("a.nii.gz", "b.dcm", "l.dcm", "r.dcm")]
    write_label_map(paths[0], label_map, series.affine)
    write_dicom_seg(paths[1], label_map, series, segments)
    write_dicom_seg(paths[2], label_map, series, segments, kind="LABELMAP")
    write_dicom_rtstruct(paths[3], label_map, series, segments)
    return paths


def test_no_part_of_a_file_counts_as_whole(outputs: list[Path]) -> None:
    for path in outputs:
        whole = path.read_bytes()
        assert is_whole(path), path
        for length in {*range(0, len(whole), 97), *range(len(whole) - 9, len(whole))}:
            path.write_bytes(whole[:length])
            assert not is_whole(path), (path, length)
        path.unlink()
        assert not is_whole(path)


def test_a_damaged_label_map_is_not_whole(outputs: list[Path]) -> None:
    damaged = bytearray(outputs[0].read_bytes())
    damaged[-6] ^= 1  # of the checksum
    outputs[0].write_bytes(damaged)
    assert not is_whole(outputs[0])
