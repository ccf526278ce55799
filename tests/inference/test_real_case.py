"""A real BraTS case through a run's folder, with a tiny untrained network."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from segmamba import cli
from segmamba.inference import find_cases, load_model, predict_cases

CASE = "BraTS2021_01480"


@pytest.mark.slow
def test_brats_case_keeps_its_place(brats_run, tmp_path, shared_data):
    predictor = load_model(
        brats_run, "cpu", mirror=False, overlap=0.25, precision="fp32"
    )
    folder = shared_data / "BraTS" / CASE
    cases = find_cases(folder, predictor.channels)
    out = tmp_path / "out"
    summary = predict_cases(predictor, cases, out)
    assert summary.done == (CASE,), summary.failed
    label, scan = nib.load(out / f"{CASE}.nii.gz"), nib.load(cases[0].images[0])
    assert label.shape == scan.shape == (240, 240, 155)
    np.testing.assert_array_equal(label.affine, scan.affine)
    assert label.header["qform_code"] == scan.header["qform_code"]
    values = np.asarray(label.dataobj)
    assert values.dtype == np.uint8
    assert set(np.unique(values)) <= {0, 1, 2, 4}
    assert len(np.unique(values)) > 1  # untrained, but not empty: geometry shows

    # The same patient, stored with other axes, gets the same label map.
    order = np.array([[2, -1], [0, 1], [1, -1]], float)
    turned = tmp_path / "turned"
    turned.mkdir()
    for path in cases[0].images:
        nib.save(nib.load(path).as_reoriented(order), turned / path.name)
    predict_cases(predictor, turned, out / "turned")
    again = nib.load(out / "turned" / f"{CASE}.nii.gz")
    expected = label.as_reoriented(order)
    np.testing.assert_allclose(again.affine, expected.affine)
    np.testing.assert_array_equal(
        np.asarray(again.dataobj), np.asarray(expected.dataobj)
    )


def predict(run: Path, folder: Path, out: Path) -> None:
    words = [str(run), str(folder), "-o", str(out), "--device", "cpu", "--no-mirror"]
    assert cli.main(["predict", *words, "--overlap", "0.25"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", ["BraTS2021_01476", "BraTS2021_01477"])
def test_a_label_map_lies_right_in_a_viewer(brats_run, tmp_path, shared_data, case):
    """As ITK-SNAP, 3D Slicer (ITK) and FSLeyes (nibabel's reading) would place it."""
    folder = shared_data / "BraTS" / case
    predict(brats_run, folder, tmp_path)
    written = tmp_path / f"{case}.nii.gz"
    names = [f"{case}_{channel}.nii.gz" for channel in ("t1", "t1ce", "t2", "flair")]
    for name in [*names, f"{case}_seg.nii.gz"]:
        require_same_grid_in_nibabel(written, folder / name)
        require_same_grid_in_itk(written, folder / name)
    values = np.asarray(nib.load(written).dataobj)
    assert set(np.unique(values)) == {0, 1, 2, 4}  # the data set's own, no 3
    np.testing.assert_array_equal(
        sitk.GetArrayFromImage(sitk.ReadImage(written)).transpose(2, 1, 0), values
    )
    brain = box(np.asarray(nib.load(folder / names[0]).dataobj) != 0)
    found = box(values != 0)  # nothing is predicted outside of what was cropped
    np.testing.assert_allclose(found, brain, atol=8)


def require_same_grid_in_nibabel(written: Path, scan: Path) -> None:
    label, image = nib.load(written), nib.load(scan)
    assert label.shape == image.shape
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-4)
    assert nib.aff2axcodes(label.affine) == nib.aff2axcodes(image.affine)
    point = image.affine @ [81, 140, 77, 1]
    index = np.linalg.solve(label.affine, point)[:3]
    np.testing.assert_allclose(index, [81, 140, 77], atol=1e-4)


def require_same_grid_in_itk(written: Path, scan: Path) -> None:
    label, image = sitk.ReadImage(written), sitk.ReadImage(scan)
    assert label.GetSize() == image.GetSize()
    for grid in ("GetOrigin", "GetSpacing", "GetDirection"):
        found, expected = getattr(label, grid)(), getattr(image, grid)()
        np.testing.assert_allclose(found, expected, atol=1e-4)
    point = image.TransformIndexToPhysicalPoint((81, 140, 77))
    assert label.TransformPhysicalPointToIndex(point) == (81, 140, 77)


def box(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and last voxel of a mask along each axis."""
    places = np.nonzero(mask)
    return [(int(axis.min()), int(axis.max())) for axis in places]
