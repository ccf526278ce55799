"""Files to volumes and back; the only room that knows file formats."""

from segmamba.io.formats import SCAN_SUFFIXES, is_scan, strip_suffix
from segmamba.io.geometry import describe_grid_difference, grid_distance_mm
from segmamba.io.output import write_label_map, write_volume
from segmamba.io.scan import (
    VolumeHeader,
    check_same_grid,
    read_case,
    read_header,
    read_volume,
)
from segmamba.io.volume import Volume

__all__ = [
    "SCAN_SUFFIXES",
    "Volume",
    "VolumeHeader",
    "check_same_grid",
    "describe_grid_difference",
    "grid_distance_mm",
    "is_scan",
    "read_case",
    "read_header",
    "read_volume",
    "strip_suffix",
    "write_label_map",
    "write_volume",
]
