"""Which cases an input names, on empty files: nothing is read here."""

from __future__ import annotations

from pathlib import Path

import pytest

from segmamba.errors import ConfigError, FormatError
from segmamba.inference.find import InputCase, find_cases

BRATS = ("t1n", "t1c", "t2w", "t2f")


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def names(cases) -> dict[str, list[str]]:
    return {case.id: [path.name for path in case.images] for case in cases}


def test_a_single_scan(tmp_path):
    touch(tmp_path, "brain.nii.gz", "other.nii.gz")
    cases = find_cases(tmp_path / "brain.nii.gz", ["CT"])
    assert names(cases) == {"brain": ["brain.nii.gz"]}
    assert names(find_cases(str(tmp_path / "brain.nii.gz"), BRATS)) == {
        "brain": ["brain.nii.gz"]  # a 4D file, perhaps: reading it will tell
    }


@pytest.mark.parametrize("channels", [["CT"], BRATS])
def test_no_scan_at_all(channels):
    with pytest.raises(FormatError, match="no scan is given"):
        find_cases((), channels)


def test_channels_of_one_scan(tmp_path):
    touch(tmp_path, "a_t1.nii", "a_t1ce.nii", "a_t2.nii", "a_flair.nii", "a_seg.nii")
    files = [tmp_path / f"a_{kind}.nii" for kind in ("t1", "t1ce", "t2", "flair")]
    cases = find_cases(files, BRATS)
    assert [case.id for case in cases] == ["a"]
    assert cases[0].images == tuple(files)
    assert find_cases(files[2], BRATS) == cases  # its neighbours are found
    with pytest.raises(
        ConfigError, match=r"t1n, t1c, t2w, t2f, in this order.*2 files"
    ):
        find_cases(files[:2], BRATS)
    with pytest.raises(FormatError, match="gone"):
        find_cases([*files[:3], tmp_path / "gone.nii"], BRATS)


def test_several_scans_of_one_channel(tmp_path):
    touch(tmp_path, "b.nii", "a.mha")
    cases = find_cases([tmp_path / "b.nii", tmp_path / "a.mha"], ["CT"])
    assert names(cases) == {"a": ["a.mha"], "b": ["b.nii"]}


def test_nnunet_names(tmp_path):
    touch(tmp_path, *(f"la_{i:03d}_000{c}.nii.gz" for i in (7, 3) for c in (1, 0)))
    expected = {
        "la_003": ["la_003_0000.nii.gz", "la_003_0001.nii.gz"],
        "la_007": ["la_007_0000.nii.gz", "la_007_0001.nii.gz"],
    }
    assert names(find_cases(tmp_path, ["CT", "PET"])) == expected
    one = find_cases(tmp_path / "la_007_0001.nii.gz", ["CT", "PET"])
    assert names(one) == {"la_007": expected["la_007"]}


def test_nnunet_names_with_one_channel(tmp_path):
    touch(tmp_path, "hip_001_0000.nii.gz", "hip_002_0000.nii.gz", "notes.txt")
    assert list(names(find_cases(tmp_path, ["MRI"]))) == ["hip_001", "hip_002"]
    single = find_cases(tmp_path / "hip_001_0000.nii.gz", ["MRI"])
    assert [case.id for case in single] == ["hip_001"]


def test_four_digits_can_be_case_numbers(tmp_path):
    touch(tmp_path, "scan_0000.nii.gz", "scan_0001.nii.gz", "._scan_0002.nii.gz")
    assert list(names(find_cases(tmp_path, ["MRI"]))) == ["scan_0000", "scan_0001"]


def test_a_missing_channel_is_that_cases_problem(tmp_path):
    touch(tmp_path, "a_0000.nii", "a_0001.nii", "b_0001.nii", "c_0002.nii")
    whole, lacks, surplus = find_cases(tmp_path, ["CT", "PET"])
    assert whole.problem is None
    assert lacks.problem is not None
    assert "case b lacks a channel: expected CT, PET, found no CT" in lacks.problem
    assert surplus.problem is not None
    with pytest.raises(FormatError, match="case b lacks"):
        find_cases(tmp_path / "b_0001.nii", ["CT", "PET"])


@pytest.mark.parametrize(
    "kinds",
    [("_t1", "_t1ce", "_t2", "_flair"), ("-t1n", "-t1c", "-t2w", "-t2f")],
)
def test_brats_case_folders(tmp_path, kinds):
    for case in ("BraTS-00002-000", "BraTS-00001-000"):
        touch(tmp_path, *(f"{case}/{case}{kind}.nii.gz" for kind in kinds))
    touch(tmp_path, "BraTS-00001-000/BraTS-00001-000_seg.nii.gz", "readme.md")
    found = names(find_cases(tmp_path, BRATS))
    assert list(found) == ["BraTS-00001-000", "BraTS-00002-000"]
    case = "BraTS-00001-000"
    assert found[case] == [f"{case}{kind}.nii.gz" for kind in kinds]
    assert names(find_cases(tmp_path / case, BRATS)) == {case: found[case]}
    two = names(find_cases(tmp_path, ["FLAIR", "T1"]))  # other contrasts don't disturb
    assert two[case] == [f"{case}{kinds[3]}.nii.gz", f"{case}{kinds[0]}.nii.gz"]


def test_case_folders_with_equal_file_names(tmp_path):
    touch(
        tmp_path, *(f"p{i}/x_{kind}.nii" for i in (1, 2) for kind in ("T1", "DWI_b0"))
    )
    found = names(find_cases(tmp_path, ["T1", "DWI_b0"]))
    assert found == {f"p{i}": ["x_T1.nii", "x_DWI_b0.nii"] for i in (1, 2)}


def test_case_folders_with_unknown_names(tmp_path):
    touch(tmp_path, "p1/a.nii", "p1/b.nii", "p2/only.nii")
    several, one = find_cases(tmp_path, ["CT"])
    assert one == InputCase("p2", (tmp_path / "p2" / "only.nii",))
    assert several.problem is not None
    assert "p1 holds several scans of unknown channels" in several.problem
    assert list(names(find_cases(tmp_path / "p1", ["CT"]))) == ["a", "b"]


def test_plain_folder(tmp_path):
    touch(tmp_path, "b.nrrd", "a.nii.gz", ".hidden.nii", "c.mha", "text.csv.bak")
    assert list(names(find_cases(tmp_path, ["CT"]))) == ["a", "b", "c"]


def test_a_file_without_a_channels_name_is_a_problem(tmp_path):
    touch(tmp_path, "a_CT.nii", "a_PET.nii", "stray.nii")
    good, stray = find_cases(tmp_path, ["CT", "PET"])
    assert good.problem is None
    assert stray.problem is not None
    assert "none of the model's channels" in stray.problem


def test_a_case_whose_name_begins_like_another_is_not_dropped(tmp_path):
    touch(tmp_path, "c_1_CT.nii", "c_1_PET.nii", "c_1_T1.nii", "c_1.nii", "c_10.nii")
    good, stray = find_cases(tmp_path, ["CT", "PET"])
    assert (good.id, good.problem) == ("c_1", None)
    assert stray.id == "c_10"
    assert "none of the model's channels" in (stray.problem or "")


def test_nothing_there(tmp_path):
    with pytest.raises(FormatError, match="no such"):
        find_cases(tmp_path / "gone", ["CT"])
    with pytest.raises(FormatError, match="no scan found"):
        find_cases(tmp_path, ["CT"])
    touch(tmp_path, "a.txt")
    with pytest.raises(FormatError, match="not a scan"):
        find_cases(tmp_path / "a.txt", ["CT"])


def test_a_dataset(shared_data):
    root = shared_data / "Task04_Hippocampus"
    cases = find_cases(root, ["MRI"])
    assert len(cases) >= 200
    assert cases == find_cases(root / "dataset.json", ["MRI"])
    assert len(find_cases(root, ["MRI"], which="labelled")) == 208
    with pytest.raises(ConfigError, match="channels don't fit"):
        find_cases(root, ["CT", "PET"])


def test_real_brats_folders(shared_data):
    cases = find_cases(shared_data / "BraTS", BRATS)
    assert [case.id for case in cases] == [f"BraTS2021_0{n}" for n in range(1476, 1481)]
    assert cases == find_cases(shared_data / "BraTS", BRATS, which="labelled")
    assert all(case.problem is None for case in cases)
