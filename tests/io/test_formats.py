"""Files that are no scans are refused by what they hold, with the remedy."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segmamba.errors import ConfigError, FormatError
from segmamba.io import is_scan, read_header, read_volume, strip_suffix
from segmamba.io.formats import scan_suffix

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
ANNEX_POINTER = b"/annex/objects/SHA256E-s147440--200ddf44.nii.gz\n"
FAKES = {
    "lfs": (LFS_POINTER, "git lfs pull"),
    "annex": (ANNEX_POINTER, "git annex get"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "html-later": (b"\n  <html lang='en'>gone</html>", "HTML page"),
    "text": (b"subject,image\n1,a.nii.gz\n", "text ('subject,image')"),
    "zip": (b"PK\x03\x04" + bytes(400), "zip archive"),
    "dicom": (bytes(128) + b"DICM" + bytes(400), "dcm2niix"),
    "analyze": ((348).to_bytes(4, "little") + bytes(344), "Analyze 7.5"),
    "noise": (bytes(range(200, 256)) * 20, "unknown bytes (c8 c9"),
    "gzip-html": (gzip.compress(b"<html>no</html>"), "HTML page"),
    "empty": (b"", "0 bytes"),
    "gzip-only-magic": (b"\x1f\x8b", "in "),
    "header-cut-off": ((348).to_bytes(4, "little") + bytes(340) + b"n+1\0", "348"),
}


@pytest.mark.parametrize("reader", [read_header, read_volume])
@pytest.mark.parametrize("name", FAKES)
def test_fake_file_is_refused_with_file_and_cause(tmp_path, name, reader) -> None:
    content, says = FAKES[name]
    if name == "header-cut-off":
        content = content[:347]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        reader(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_format_errors(tmp_path) -> None:
    for path in (tmp_path / "none.nii.gz", tmp_path):
        with pytest.raises(FormatError, match="can't open"):
            read_volume(path)


def test_dangling_annex_link_names_the_remedy(tmp_path: Path) -> None:
    link = tmp_path / "scan.nii.gz"
    try:
        link.symlink_to(tmp_path / ".git/annex/objects/x/y/scan.nii.gz")
    except OSError:
        pytest.skip("needs the right to make links")
    with pytest.raises(FormatError, match="git annex get"):
        read_header(link)


def test_content_decides_and_not_the_name(tmp_path: Path) -> None:
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nib.Nifti1Image(voxels, np.eye(4))
    nib.save(image, tmp_path / "plain.nii")
    nib.save(image, tmp_path / "packed.nii.gz")
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "plain.nii").read_bytes())
    (tmp_path / "b.nrrd").write_bytes((tmp_path / "packed.nii.gz").read_bytes())
    for name in ("a.nii.gz", "b.nrrd"):
        assert np.array_equal(read_volume(tmp_path / name).array[0], voxels)


@pytest.mark.parametrize(
    ("name", "scan", "stem"),
    [
        ("a/b.c.nii.gz", True, "b.c"),
        ("x.NII", True, "x"),
        ("x.nrrd", True, "x"),
        ("x.mha", True, "x"),
        ("._x.nii.gz", False, "._x"),
        ("x.gz", False, "x"),
        ("x.txt", False, "x"),
        (".nii", False, ""),
    ],
)
def test_names(name: str, scan: bool, stem: str) -> None:
    assert is_scan(name) is scan
    assert strip_suffix(name) == stem


def test_unknown_ending_names_those_known() -> None:
    assert scan_suffix("a.NII.GZ") == ".nii.gz"
    with pytest.raises(ConfigError, match="nrrd"):
        scan_suffix("a.tiff")
