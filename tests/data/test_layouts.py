"""Every layout gives the same kind of data set; broken ones say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from segmamba.data.dataset import dataset_from_dict, dataset_to_dict
from segmamba.data.layouts import load_dataset, load_label_scheme
from segmamba.errors import FormatError
from segmamba.io import Volume, write_label_map, write_volume


def scan(path: Path, channels: int = 1, seed: int = 0) -> Path:
    array = np.random.default_rng(seed).integers(0, 99, (channels, 4, 4, 4))
    write_volume(path, Volume(array.astype(np.int16), np.eye(4)))
    return path


def labels(path: Path, *values: int) -> Path:
    label_map = np.zeros((4, 4, 4), np.uint8)
    label_map.flat[: len(values)] = values
    write_label_map(path, label_map, np.eye(4))
    return path


def write(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def decathlon(root: Path, **changes: object) -> Path:
    for name in ("b_2", "a_1"):
        scan(root / f"imagesTr/{name}.nii.gz")
        labels(root / f"labelsTr/{name}.nii.gz", 1, 2)
    scan(root / "imagesTs/t_1.nii.gz")
    (root / "imagesTr/._a_1.nii.gz").write_bytes(b"macOS")
    listed = [
        {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"}
        for n in ("b_2", "a_1")
    ]
    data = {
        "name": "Toy",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "head", "2": "tail"},
        "training": listed,
        "test": ["./imagesTs/t_1.nii.gz"],
        **changes,
    }
    write(root / "dataset.json", data)
    return root


def nnunet(root: Path, **changes: object) -> Path:
    for name in ("b_2", "a_1"):
        for index in range(2):
            scan(root / f"imagesTr/{name}_{index:04d}.nrrd")
        labels(root / f"labelsTr/{name}.nrrd", 1, 2)
    for index in range(2):
        scan(root / f"imagesTs/t_1_{index:04d}.nrrd")
    data = {
        "channel_names": {"1": "FLAIR", "0": "T1"},
        "labels": {"background": 0, "edema": 2, "core": 1},
        "numTraining": 2,
        "file_ending": ".nrrd",
        **changes,
    }
    write(root / "dataset.json", data)
    return root


def brats(root: Path, cases: dict, *, new: bool) -> Path:
    kinds = ("t1n", "t1c", "t2w", "t2f") if new else ("t1", "t1ce", "t2", "flair")
    sign = "-" if new else "_"
    for index, (name, values) in enumerate(cases.items()):
        stem = Path(name).name
        for place, kind in enumerate(kinds):
            scan(root / f"{name}/{stem}{sign}{kind}.nii.gz", seed=10 * index + place)
        if values is not None:
            labels(root / f"{name}/{stem}{sign}seg.nii.gz", *values)
    return root


def test_decathlon(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    dataset = load_dataset(root)
    assert (dataset.name, dataset.layout, dataset.channels) == ("Toy", "msd", ("MRI",))
    assert dataset.labels.labels == {"background": 0, "head": 1, "tail": 2}
    assert [case.id for case in dataset.cases] == ["a_1", "b_2"]
    assert dataset.cases[0].images == (root / "imagesTr/a_1.nii.gz",)
    assert dataset.cases[0].label == root / "labelsTr/a_1.nii.gz"
    assert [case.id for case in dataset.unlabelled] == ["t_1"]
    assert load_dataset(root / "dataset.json") == dataset


def test_decathlon_keeps_missing_files(tmp_path: Path) -> None:
    root = decathlon(tmp_path)
    (root / "imagesTr/a_1.nii.gz").unlink()
    assert load_dataset(root).cases[0].images == (root / "imagesTr/a_1.nii.gz",)


def test_nnunet_1_files_under_decathlon_names(tmp_path: Path) -> None:
    root = decathlon(tmp_path, modality={"0": "T1", "1": "T2"})
    for name in ("a_1", "b_2", "t_1"):
        folder = root / ("imagesTs" if name == "t_1" else "imagesTr")
        (folder / f"{name}.nii.gz").rename(folder / f"{name}_0000.nii.gz")
    case = load_dataset(root).cases[0]
    assert [path.name for path in case.images] == ["a_1_0000.nii.gz", "a_1_0001.nii.gz"]


def test_nnunet(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    dataset = load_dataset(root)
    assert dataset.layout == "nnunet"
    assert dataset.channels == ("T1", "FLAIR")
    assert dataset.labels.class_values == (0, 1, 2)
    assert [case.id for case in dataset.cases] == ["a_1", "b_2"]
    names = [path.name for path in dataset.cases[0].images]
    assert names == ["a_1_0000.nrrd", "a_1_0001.nrrd"]
    assert [case.id for case in dataset.unlabelled] == ["t_1"]


def test_nnunet_keeps_incomplete_cases(tmp_path: Path) -> None:
    root = nnunet(tmp_path)
    (root / "labelsTr/a_1.nrrd").unlink()
    scan(root / "imagesTr/c_3_0001.nrrd")
    labels(root / "labelsTr/d_4.nrrd", 1)
    assert [case.id for case in load_dataset(root).cases] == [
        "a_1",
        "b_2",
        "c_3",
        "d_4",
    ]


def test_nnunet_regions_and_ignore_label(tmp_path: Path) -> None:
    root = nnunet(
        tmp_path,
        labels={
            "background": 0,
            "whole": [1, 2, 3],
            "core": [2, 3],
            "enhancing": 3,
            "ignore": 4,
        },
        regions_class_order=[1, 2, 3],
    )
    scheme = load_dataset(root).labels
    assert scheme.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert scheme.regions_order == (1, 2, 3)
    assert scheme.ignore_label == 4
    assert scheme.labels == {
        "background": 0,
        "label 1": 1,
        "label 2": 2,
        "enhancing": 3,
    }
    assert scheme.known_values == (0, 1, 2, 3, 4)


def test_nnunet_dataset_key(tmp_path: Path) -> None:
    listed = {
        "x": {"images": ["imagesTr/b_2_0000.nrrd", "../far/m.nii"], "label": "l/m.mha"}
    }
    root = nnunet(tmp_path, dataset=listed)
    (case,) = load_dataset(root).cases
    assert case.id == "x"
    assert case.images == (root / "imagesTr/b_2_0000.nrrd", root / "../far/m.nii")
    assert case.label == root / "l/m.mha"


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("enhancing", [3, 4])
def test_brats_names_and_enhancing_value(tmp_path, new, enhancing) -> None:
    cases: dict = {f"c{i}": (1, 2) for i in range(6)}
    cases["c9"] = (1, 2, enhancing)  # most cases have none
    dataset = load_dataset(brats(tmp_path, cases, new=new))
    assert dataset.layout == "brats"
    assert dataset.channels == ("t1n", "t1c", "t2w", "t2f")
    assert dataset.labels.regions["ET"] == (enhancing,)
    assert dataset.labels.regions["WT"] == (1, 2, enhancing)
    assert dataset.labels.regions_order == (2, 1, enhancing)
    ends = [path.name.removesuffix(".nii.gz") for path in dataset.cases[0].images]
    sign = "-" if new else "_"
    old = ["t1", "t1ce", "t2", "flair"]
    expected = list(dataset.channels) if new else old
    assert ends == [f"c0{sign}{kind}" for kind in expected]


@pytest.mark.parametrize(("new", "enhancing"), [(True, 3), (False, 4)])
def test_brats_without_enhancing_tumour_goes_by_name(tmp_path, new, enhancing) -> None:
    dataset = load_dataset(brats(tmp_path, {"a": (1, 2), "b": (2,)}, new=new))
    assert dataset.labels.labels["ET"] == enhancing


def test_brats_2024_resection_cavity(tmp_path: Path) -> None:
    cases = {"a": (1, 2, 3), "b": (1, 2, 4)}  # not even in one case together
    dataset = load_dataset(brats(tmp_path, cases, new=True))
    assert dataset.labels.labels["ET"] == 3
    assert dataset.labels.regions["RC"] == (4,)
    assert dataset.labels.regions["WT"] == (1, 2, 3)


def test_brats_broken_label_is_no_obstacle(tmp_path: Path) -> None:
    root = brats(tmp_path, {"a": (1, 2), "b": (1, 4)}, new=False)
    (root / "a/a_seg.nii.gz").write_bytes(b"/annex/objects/x")
    dataset = load_dataset(root)
    assert len(dataset.cases) == 2
    assert dataset.labels.labels["ET"] == 4


def test_brats_grades_and_unlabelled_cases(tmp_path: Path) -> None:
    cases = {"HGG/p1": (1, 2, 4), "LGG/p2": (1, 2), "Validation/p3": None}
    dataset = load_dataset(brats(tmp_path, cases, new=False))
    assert [case.id for case in dataset.cases] == ["p1", "p2"]
    assert [case.id for case in dataset.unlabelled] == ["p3"]


def test_brats_missing_contrast_keeps_its_path(tmp_path: Path) -> None:
    root = brats(tmp_path, {"a": (1,), "b": (1,)}, new=True)
    (root / "b/b-t2w.nii.gz").unlink()
    assert load_dataset(root).cases[1].images[2] == root / "b/b-t2w.nii.gz"


def test_one_brats_case(tmp_path: Path) -> None:
    brats(tmp_path, {"a": (1,)}, new=True)
    assert [case.id for case in load_dataset(tmp_path / "a").cases] == ["a"]


def test_brats_predictions_beside_the_cases_are_no_cases(tmp_path: Path) -> None:
    root = brats(tmp_path, {"a": (1,), "b": (1,)}, new=True)
    for name in "ab":
        labels(root / f"predictions/{name}-seg.nii.gz", 1)
    assert [case.id for case in load_dataset(root).cases] == ["a", "b"]


def test_brats_cases_together_in_one_folder(tmp_path: Path) -> None:
    brats(tmp_path, {"case_1": (1, 2, 4), "case_2": None}, new=False)
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in tmp_path.glob("case_*/*"):
        file.rename(flat / file.name)
    scan(flat / "typo_t1.nii.gz")
    dataset = load_dataset(flat)
    assert [case.id for case in dataset.cases] == ["case_1"]
    assert [case.id for case in dataset.unlabelled] == ["case_2"]
    assert dataset.cases[0].images[3] == flat / "case_1_flair.nii.gz"


def test_csv(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        scan(tmp_path / f"scans/{name}_a.nii.gz")
        scan(tmp_path / f"scans/{name}_b.mha")
    labels(tmp_path / "l1.nii.gz", 1, 5)
    labels(tmp_path / "l2.nii.gz", 2)
    table = write(
        tmp_path / "cases.csv",
        "\ufeffid,image_t1,image_t2,label,age\n"
        "p2,scans/two_a.nii.gz,scans/two_b.mha,l2.nii.gz,60\n"
        "p1,scans/one_a.nii.gz,scans/one_b.mha,l1.nii.gz,50\n"
        "\n"
        "p3,scans/three_a.nii.gz,scans/three_b.mha,,\n",
    )
    dataset = load_dataset(table)
    assert (dataset.name, dataset.layout) == ("cases", "csv")
    assert dataset.channels == ("t1", "t2")
    assert [case.id for case in dataset.cases] == ["p1", "p2"]
    assert [case.id for case in dataset.unlabelled] == ["p3"]
    assert dataset.cases[0].images[1] == tmp_path / "scans/one_b.mha"
    assert dataset.labels.class_values == (0, 1, 2, 5)
    assert load_dataset(tmp_path) == dataset


def test_csv_with_one_image_column_and_semicolons(tmp_path: Path) -> None:
    for name in ("a", "b"):
        scan(tmp_path / f"{name}/scan.nii.gz", channels=2)
        labels(tmp_path / f"{name}/label.nii.gz", 1)
    table = write(
        tmp_path / "cases.csv",
        "image;label\nb/scan.nii.gz;b/label.nii.gz\na/scan.nii.gz;a/label.nii.gz\n",
    )
    dataset = load_dataset(table)
    assert [case.id for case in dataset.cases] == ["a_scan", "b_scan"]
    assert dataset.channels == ("0", "1")


def test_csv_labels_from_a_description_beside_it(tmp_path: Path) -> None:
    scan(tmp_path / "a.nii.gz")
    write(tmp_path / "cases.csv", "image,label\na.nii.gz,missing.nii.gz\n")
    write(
        tmp_path / "dataset.json",
        {"labels": {"background": 0, "lesion": 1}},
    )
    dataset = load_dataset(tmp_path)
    assert dataset.labels.labels == {"background": 0, "lesion": 1}
    assert dataset.channels == ("image",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a column image.*found no column at all, in"),
        ("a,b\n1,2\n", "found a, b"),
        ("image,label\n", "no rows"),
        ("image,label,image\na.nii,l.nii,b.nii\n", "column once, found image again"),
        ("image,label\n,x.nii\n", "an image in every row"),
        ("image,label\na.nii,b.nii,c.nii\n", "3 in row 2"),
        ("id,image\n../x,a.nii\n", "file's name"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        load_dataset(write(tmp_path / "cases.csv", text))


def test_image_in_the_label_column_is_noticed(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.int16).reshape(1, 10, 10, 10)
    write_volume(tmp_path / "a.nii", Volume(array, np.eye(4)))
    table = write(tmp_path / "cases.csv", "image,label\na.nii,a.nii\n")
    with pytest.raises(FormatError, match="999 values"):
        load_dataset(table)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": {"zero": "background"}}, "labels are malformed"),
        ({"labels": None}, "labels are malformed"),
        ({"training": {}}, "training is malformed"),
        ({"training": ["a.nii.gz"]}, "entry is malformed"),
        ({"training": [], "test": []}, "no cases"),
        ({"modality": {}}, "channel names"),
        ({"test": [5]}, "test entry"),
    ],
)
def test_bad_decathlon(tmp_path: Path, change, says: str) -> None:
    with pytest.raises(FormatError, match=says) as caught:
        load_dataset(decathlon(tmp_path, **change))
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": {"background": 0, "all": [1, 2]}}, "regions have no order"),
        ({"labels": {"background": 0, "a": "x"}}, "labels are malformed"),
        ({"labels": {"a": 1}}, "no background"),
        ({"labels": {"background": 0, "a": []}}, "labels are malformed"),
        ({"regions_class_order": [1]}, "differ in number"),
        ({"file_ending": ".png"}, "file_ending"),
        ({"file_ending": ".mha"}, "no cases"),
        ({"channel_names": {}}, "channel names"),
        ({"dataset": {"x": {"images": ["a"]}}}, "dataset key"),
        ({"dataset": {"x": {"images": "a.nii", "label": "b.nii"}}}, "dataset key"),
        ({"dataset": {"x": {"images": [], "label": "b.nii"}}}, "dataset key"),
        ({"dataset": {"../x": {"images": ["a"], "label": "b"}}}, "file's name"),
    ],
)
def test_bad_nnunet(tmp_path: Path, change, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        load_dataset(nnunet(tmp_path, **change))


def test_unrecognised_places_say_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="an empty folder") as caught:
        load_dataset(tmp_path)
    for word in ("Decathlon", "nnU-Net", "BraTS", "CSV"):
        assert word in str(caught.value)
    scan(tmp_path / "some_scan.nii.gz")
    with pytest.raises(FormatError, match=r"some_scan\.nii\.gz"):
        load_dataset(tmp_path)
    with pytest.raises(FormatError, match="nothing"):
        load_dataset(tmp_path / "none")
    with pytest.raises(FormatError, match=r"a \.gz file"):
        load_dataset(tmp_path / "some_scan.nii.gz")
    with pytest.raises(FormatError, match="can't read a JSON file"):
        load_dataset(write(tmp_path / "dataset.json", "{broken"))
    with pytest.raises(FormatError, match="not a mapping"):
        load_dataset(write(tmp_path / "dataset.json", "[1]"))
    with pytest.raises(FormatError, match="a JSON file with colour"):
        load_dataset(write(tmp_path / "dataset.json", {"colour": 1}))


def test_label_schemes_of_any_description(tmp_path: Path) -> None:
    first, second = decathlon(tmp_path / "msd"), nnunet(tmp_path / "nnunet")
    third = brats(tmp_path / "brats", {"a": (1, 4)}, new=False)
    ours = dataset_to_dict(load_dataset(third))
    written = write(tmp_path / "run/dataset.json", ours)
    for path, root in (
        (first / "dataset.json", first),
        (second / "dataset.json", second),
        (written, third),
        (third, third),
    ):
        assert load_label_scheme(path) == load_dataset(root).labels
    alone = write(tmp_path / "x.json", {"labels": {"background": 0, "a": 1}})
    assert load_label_scheme(alone).class_values == (0, 1)
    with pytest.raises(FormatError, match="labels are malformed"):
        load_label_scheme(write(tmp_path / "y.json", {}))


@pytest.mark.parametrize("make", [decathlon, nnunet])
def test_description_comes_back(tmp_path: Path, make) -> None:
    dataset = load_dataset(make(tmp_path))
    data = json.loads(json.dumps(dataset_to_dict(dataset)))
    assert not any(str(tmp_path) in image for image in data["cases"][0]["images"])
    assert dataset_from_dict(data) == dataset
    written = write(tmp_path / "run/dataset.json", data)
    assert load_dataset(written) == dataset
    assert load_dataset(written.parent) == dataset


@pytest.mark.parametrize(
    "damage", [{"cases": 5}, {"labels": {}}, {"root": None}, {"cases": [{"id": "a"}]}]
)
def test_damaged_description(tmp_path: Path, damage) -> None:
    data = {**dataset_to_dict(load_dataset(decathlon(tmp_path))), **damage}
    with pytest.raises(FormatError, match="damaged"):
        dataset_from_dict(data)


def test_real_data_sets(shared_data: Path) -> None:
    hippocampus = load_dataset(shared_data / "Task04_Hippocampus")
    assert len(hippocampus.cases) == 208
    assert hippocampus.labels.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    tumours = load_dataset(shared_data / "BraTS")
    assert len(tumours.cases) == 5
    assert tumours.labels.regions["ET"] == (4,)
    for case in (*hippocampus.cases, *tumours.cases):
        assert case.label is not None
        assert all(path.is_file() for path in (*case.images, case.label))
