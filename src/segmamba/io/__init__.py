"""Files to volumes and back; the only room that knows file formats."""

from segmamba.io.dicom import (
    DicomSeries,
    choose_series,
    list_series,
    read_dicom,
    read_series,
)
from segmamba.io.dicom_files import holds_dicom, is_archive
from segmamba.io.dicom_rtstruct import write_dicom_rtstruct
from segmamba.io.dicom_seg import write_dicom_seg
from segmamba.io.dicom_segments import Segment, make_segments
from segmamba.io.formats import SCAN_SUFFIXES, is_scan, strip_suffix
from segmamba.io.geometry import describe_grid_difference, grid_distance_mm
from segmamba.io.output import write_label_map, write_volume
from segmamba.io.scan import (
    VolumeHeader,
    check_same_grid,
    read_case,
    read_header,
    read_volume,
    scan_files,
)
from segmamba.io.volume import Volume
from segmamba.io.whole import is_whole

__all__ = [
    "SCAN_SUFFIXES",
    "DicomSeries",
    "Segment",
    "Volume",
    "VolumeHeader",
    "check_same_grid",
    "choose_series",
    "describe_grid_difference",
    "grid_distance_mm",
    "holds_dicom",
    "is_archive",
    "is_scan",
    "is_whole",
    "list_series",
    "make_segments",
    "read_case",
    "read_dicom",
    "read_header",
    "read_series",
    "read_volume",
    "scan_files",
    "strip_suffix",
    "write_dicom_rtstruct",
    "write_dicom_seg",
    "write_label_map",
    "write_volume",
]
