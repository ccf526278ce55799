"""Files that are no scan, or a broken one."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from bad_input import BadInput, write

from segmamba.io import Volume, read_case, read_volume, write_volume

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
ANNEX = "/annex/objects/SHA256E-s147440--200ddf44.nii.gz\n"
HTML = "<!DOCTYPE html><html><body>404 Not Found</body></html>"

NRRD = """NRRD0004
type: uint8
dimension: 3
space: left-posterior-superior
sizes: 2 3 4
space directions: (2,0,0) (0,3,0) (0,0,4)
endian: little
encoding: raw
space origin: (10,20,30)

"""
MHA = """ObjectType = Image
NDims = 3
BinaryData = True
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 0 0 0
ElementSpacing = 2 3 4
DimSize = 2 3 4
ElementType = MET_UCHAR
ElementDataFile = LOCAL
"""
VOXELS = bytes(range(24))

Make = Callable[[Path], Path]


def cube(*patches: tuple[int, str, tuple[float, ...]], keep: int | None = None) -> Make:
    """Write a sound .nii of 3 x 4 x 5 voxels of int16, then header numbers over it."""

    def make(folder: Path) -> Path:
        path = folder / "scan.nii"
        voxels = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
        nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 3.0, 4.0, 1.0])), path)
        data = bytearray(path.read_bytes())
        for offset, kind, values in patches:
            struct.pack_into(kind, data, offset, *values)
        path.write_bytes(data[:keep])
        return path

    return make


def packed(make: Make, change: Callable[[bytes], bytes] = bytes) -> Make:
    """The same as .nii.gz, changed after it was packed."""

    def make_packed(folder: Path) -> Path:
        data = make(folder).read_bytes()
        path = folder / "scan.nii.gz"
        path.write_bytes(change(gzip.compress(data, 0, mtime=0)))
        return path

    return make_packed


def nifti(voxels: np.ndarray) -> Make:
    def make(folder: Path) -> Path:
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / "scan.nii")
        return folder / "scan.nii"

    return make


def nrrd(old: str, new: str, voxels: bytes = VOXELS) -> Make:
    assert old in NRRD
    return write("scan.nrrd", NRRD.replace(old, new).encode() + voxels)


def mha(old: str, new: str, name: str = "scan.mha") -> Make:
    assert old in MHA
    return write(name, MHA.replace(old, new).encode() + VOXELS)


def flip(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[-20] ^= 1
    return bytes(changed)


def annex_link(folder: Path) -> Path:
    (folder / "scan.nii.gz").symlink_to(".git/annex/objects/x/scan.nii.gz")
    return folder / "scan.nii.gz"


def two_grids(folder: Path) -> Path:
    for name, shift in (("t1.nii", 0.0), ("t2.nii", 2.5)):
        affine = np.eye(4)
        affine[0, 3] = shift
        write_volume(folder / name, Volume(np.zeros((1, 3, 3, 3), np.int16), affine))
    return folder


NO_FORM = ((254, "<h", (0,)), (252, "<h", (0,)))
"""sform_code and qform_code."""
QFORM = ((254, "<h", (0,)), (252, "<h", (1,)))
FOREIGN = (
    "a folder where a file should be",
    "a .nii.gz with a flipped bit",
    "a quaternion that is none",
)

SCANS = (
    *(
        BadInput(what, make, read_volume, what in FOREIGN)
        for what, make in (
            ("no such file", lambda folder: folder / "scan.nii.gz"),
            ("a folder where a file should be", lambda folder: folder),
            ("an empty file", write("scan.nii.gz", b"")),
            ("a git-LFS pointer", write("scan.nii.gz", LFS)),
            ("a git-annex pointer", write("scan.nii.gz", ANNEX)),
            ("a git-annex link without its content", annex_link),
            ("an HTML error page", write("scan.nii.gz", HTML)),
            (
                "an HTML error page, compressed",
                write("scan.nii.gz", gzip.compress(HTML.encode())),
            ),
            ("a table", write("scan.nii.gz", "subject,image\n1,a.nii.gz\n")),
            ("a zip archive", write("scan.nii.gz", b"PK\x03\x04" + bytes(400))),
            ("a DICOM file", write("scan.nii", bytes(128) + b"DICM" + bytes(400))),
            (
                "an Analyze 7.5 header",
                write("scan.nii", struct.pack("<i", 348) + bytes(344)),
            ),
            ("random bytes", write("scan.nii", bytes(range(200, 256)) * 20)),
            (
                "gzip that ends after its first bytes",
                write("scan.nii.gz", b"\x1f\x8b\x08"),
            ),
            ("a NIfTI header that is cut off", cube(keep=347)),
            ("NIfTI voxels that are cut off", cube(keep=400)),
            ("a .nii.gz that is cut off", packed(cube(), lambda data: data[:430])),
            ("a .nii.gz with a flipped bit", packed(cube(), flip)),
            (
                "a header that claims terabytes",
                cube((40, "<4h", (3, 32767, 32767, 32767))),
            ),
            (
                "a compressed header that claims terabytes",
                packed(cube((40, "<4h", (3, 32767, 32767, 32767)))),
            ),
            ("no voxel along an axis", cube((42, "<h", (0,)))),
            ("a negative number of voxels", cube((42, "<h", (-3,)))),
            ("an unknown number type", cube((70, "<h", (9999,)))),
            ("complex voxels", nifti(np.zeros((3, 3, 3), np.complex64))),
            ("colours", nifti(np.zeros((3, 3, 3), [(name, "u1") for name in "RGB"]))),
            ("time and vectors together", nifti(np.zeros((3, 3, 3, 2, 2), np.float32))),
            ("the header of an .hdr/.img pair", cube((344, "<4s", (b"ni1\x00",)))),
            ("voxels that begin nowhere", cube((108, "<f", (float("nan"),)))),
            ("voxels that begin behind the end", cube((108, "<f", (1000000000.0,)))),
            ("a scale that is no number", cube((112, "<ff", (2.0, float("nan"))))),
            ("an affine of zeros", cube((280, "<4f", (0, 0, 0, 0)))),
            ("an affine with NaN", cube((280, "<4f", (float("nan"), 0, 0, 0)))),
            ("an affine with infinity", cube((292, "<f", (float("inf"),)))),
            ("two parallel axes", cube((280, "<8f", (1, 2, 3, 0, 2, 4, 6, 0)))),
            ("voxels of a nanometre", cube((280, "<f", (1e-09,)))),
            ("a voxel size of zero", cube(*NO_FORM, (80, "<f", (0,)))),
            ("a negative voxel size", cube(*QFORM, (80, "<f", (-2,)))),
            ("a quaternion that is none", cube(*QFORM, (256, "<3f", (3, 3, 3)))),
            ("NRRD: an unknown encoding", nrrd("encoding: raw", "encoding: hex")),
            ("NRRD: an unknown number type", nrrd("type: uint8", "type: block")),
            ("NRRD: too few sizes", nrrd("sizes: 2 3 4", "sizes: 2 3")),
            ("NRRD: two axes", nrrd("dimension: 3", "dimension: 2")),
            ("NRRD: a size that is no number", nrrd("sizes: 2 3 4", "sizes: 2 3 x")),
            (
                "NRRD: voxels in another file",
                nrrd("encoding", "data file: x.raw\nencoding"),
            ),
            ("NRRD: an axis without a direction", nrrd("(2,0,0)", "none")),
            (
                "NRRD: a negative spacing",
                nrrd("space directions: (2,0,0) (0,3,0) (0,0,4)", "spacings: 2 -3 4"),
            ),
            (
                "NRRD: a header that claims terabytes",
                nrrd("2 3 4\n", "90000 90000 90000\n"),
            ),
            (
                "NRRD: voxels that are cut off",
                nrrd("type: uint8", "type: uint8", VOXELS[:7]),
            ),
            ("NRRD: a header without an end", write("scan.nrrd", NRRD.strip())),
            (
                "NRRD: packed by gzip as a whole",
                write("scan.nrrd", gzip.compress(NRRD.encode())),
            ),
            ("MHA: two axes", mha("NDims = 3", "NDims = 2")),
            ("MHA: voxels as text", mha("BinaryData = True", "BinaryData = False")),
            ("MHA: a spacing of zero", mha("2 3 4\nDim", "2 0 4\nDim")),
            ("MHA: numbers that are missing", mha("Offset = 0 0 0", "Offset = 0 0")),
            ("MHA: an unknown number type", mha("MET_UCHAR", "MET_STRING")),
            (
                "MHA: a header that claims terabytes",
                mha("2 3 4\nElementT", "90000 90000 90000\nElementT"),
            ),
            ("MHD: its voxels are missing", mha("LOCAL", "scan.raw", "scan.mhd")),
            ("MHD: its voxels are elsewhere", mha("LOCAL", "../../secret", "scan.mhd")),
            (
                "MHD: its voxels are many files",
                mha("LOCAL", "scan%03d.raw 1 4 1", "scan.mhd"),
            ),
        )
    ),
    BadInput(
        "fractions where labels are wanted",
        nifti(np.full((3, 3, 3), 0.5)),
        lambda path: read_volume(path, dtype=np.int32),
    ),
    BadInput(
        "labels beyond the number type",
        nifti(np.full((3, 3, 3), 300, np.int16)),
        lambda path: read_volume(path, dtype=np.uint8),
    ),
    BadInput(
        "a frame that is not there",
        nifti(np.zeros((3, 3, 3, 4), np.int16)),
        lambda path: read_volume(path, frame=4),
    ),
    BadInput(
        "channels on different grids",
        two_grids,
        lambda folder: read_case([folder / "t1.nii", folder / "t2.nii"]),
    ),
    BadInput("no channel at all", lambda folder: folder, lambda folder: read_case([])),
    BadInput(
        "a name with an ending of no scan",
        lambda folder: folder / "label.png",
        lambda path: write_volume(path, Volume(np.zeros((1, 2, 2, 2)), np.eye(4))),
    ),
)
