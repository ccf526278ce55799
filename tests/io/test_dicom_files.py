from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import dicom_series as make
import numpy as np
import pytest

from segmamba.errors import FormatError
from segmamba.io import dicom_files, holds_dicom, list_series, read_dicom


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make.write(tmp_path / "study" / "a", make.datasets(number=1))
    make.write(tmp_path / "study" / "b", make.datasets(make.voxels(1), number=2))
    (tmp_path / "study" / "notes.txt").write_text("no DICOM" * 100)
    return tmp_path / "study"


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return target


def tarred(folder: Path, target: Path) -> Path:
    mode = f"w:{target.suffix[1:]}" if target.suffix != ".tar" else "w"
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, folder.name)
    return target


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_archives_are_read_as_their_folder(folder: Path, ending: str) -> None:
    pack = zipped if ending == "zip" else tarred
    source = pack(folder, folder.parent / f"s.{ending}")
    before = sorted(folder.parent.rglob("*"))
    volume = read_dicom(source, ["2", "1"])
    np.testing.assert_array_equal(volume.array[0], make.voxels(1).T)
    np.testing.assert_array_equal(volume.array[1], make.voxels(0).T)
    np.testing.assert_array_equal(volume.affine, read_dicom(folder, "2").affine)
    assert sorted(folder.parent.rglob("*")) == before  # nothing was unpacked


def test_one_look_tells_whether_there_is_dicom(folder: Path) -> None:
    assert holds_dicom(folder)
    assert holds_dicom(next((folder / "a").iterdir()))
    assert not holds_dicom(folder / "notes.txt")
    assert holds_dicom(zipped(folder, folder.parent / "s.zip"))


def with_entry(target: Path, info: tarfile.TarInfo, data: bytes = b"") -> Path:
    info.size = len(data)
    with tarfile.open(target, "w") as archive:
        archive.addfile(info, io.BytesIO(data))
    return target


@pytest.mark.parametrize("name", ["../evil.dcm", "/evil.dcm", "a/../../evil.dcm"])
@pytest.mark.parametrize("ending", ["zip", "tar"])
def test_names_that_lead_out_are_refused(
    tmp_path: Path, name: str, ending: str
) -> None:
    source = tmp_path / "deep" / f"s.{ending}"
    source.parent.mkdir()
    data = bytes(128) + b"DICM" + bytes(100)
    if ending == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr(name, data)
    else:
        with_entry(source, tarfile.TarInfo(name), data)
    with pytest.raises(FormatError, match=r"not safe.*a name that leads out.*evil"):
        list_series(source)
    assert [path.name for path in tmp_path.rglob("*.dcm")] == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x.dcm")
    info.type, info.linkname = kind, "/etc/passwd"
    source = with_entry(tmp_path / "s.tar", info)
    with pytest.raises(FormatError, match=r"not safe.*a link or device \(x.dcm\)"):
        list_series(source)


def test_links_in_zips_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("x.dcm")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(FormatError, match=r"not safe.*a link \(x.dcm\)"):
        list_series(tmp_path / "s.zip")


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("MAX_FILE_BYTES", 1 << 20),
        ("MAX_ARCHIVE_BYTES", 3 << 20),
        ("MAX_ARCHIVE_FILES", 3),
    ],
)
@pytest.mark.parametrize("ending", ["zip", "tar.xz"])
def test_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, ending: str
) -> None:
    folder = tmp_path / "bomb"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.dcm").write_bytes(bytes(128) + b"DICM" + bytes(2 << 20))
    pack = zipped if ending == "zip" else tarred
    source = pack(folder, tmp_path / f"s.{ending}")
    assert source.stat().st_size < 100_000
    monkeypatch.setattr(dicom_files, limit, value)
    with pytest.raises(FormatError, match=r"an archive is too large.*at most"):
        list(dicom_files.iterate_files(source))


def test_what_is_not_dicom_costs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom_files, "MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(1 << 20))
    assert list(dicom_files.iterate_files(tmp_path / "s.zip")) == []


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tar.xz"])
def test_broken_archives_are_named(folder: Path, ending: str) -> None:
    pack = zipped if ending == "zip" else tarred
    source = pack(folder, folder.parent / f"s.{ending}")
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match=f"archive is broken.*s.{ending}"):
        list_series(source)
    source.write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match=f"archive is broken.*s.{ending}"):
        list_series(source)


def test_links_in_folders_are_not_followed_round(folder: Path) -> None:
    try:
        (folder / "loop").symlink_to(folder)
    except OSError:
        pytest.skip("this system makes no links")
    assert len(list_series(folder)) == 2
    assert len(list_series(folder)[0].files) == 5


def test_vanished_files_are_named(folder: Path) -> None:
    series = list_series(folder)[0]
    path = series.files[2].path
    path.unlink()
    with pytest.raises(FormatError, match=f"can't read a file.*{path.name}"):
        list(dicom_files.open_files(series.files))
