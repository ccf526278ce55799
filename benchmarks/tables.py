"""Put measured figures into README.md and the docs: python benchmarks/tables.py.

Each JSON file in benchmarks/results was written by a command of this repository. Text
between `<!-- figures: NAME -->` and `<!-- end -->` is replaced by the table of NAME.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PAGES = (
    "README.md",
    "docs/reference/results.md",
    "docs/concepts/uncertainty.md",
    "docs/concepts/sliding-window.md",
    "docs/concepts/faults.md",
    "docs/how-to/reproduce.md",
)
MARK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def score_rows(title: str, command: str, metrics: dict[str, Any]) -> list[str]:
    """One row of a table: mean Dice and HD95 of each label on held-out cases."""
    summary = metrics["summary"]
    dice = [row["dice"]["mean"] for row in summary.values()]
    cells = [f"{name} {row['dice']['mean']:.3f}" for name, row in summary.items()]
    hd95 = [f"{row['hd95_mm']['mean']:.1f}" for row in summary.values()]
    return [
        f"| {title} | {len(metrics['cases'])} | {sum(dice) / len(dice):.3f} | "
        f"{', '.join(cells)} | {' / '.join(hd95)} | `{command}` |"
    ]


SCORED = {
    "demo": ("simulated tumours, 3 minutes", "make demo"),
    "hippocampus-cpu": (
        "Decathlon hippocampus, 20 minutes",
        "segmamba train Task04_Hippocampus -o run --max-time 20m",
    ),
}


BRIEF = {
    "brats2021-brief": (
        "BraTS 2021, 4 cases, 8 minutes",
        "segmamba train BraTS -o run --fold 2 --max-time 8m",
    )
}


def scores(runs: dict[str, tuple[str, str]]) -> str:
    """Whole-volume scores of the runs that the docs describe."""
    lines = [
        "| data and training, CPU only | held-out cases | mean Dice | Dice | "
        "HD95 mm | command |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, (title, command) in runs.items():
        if (RESULTS / f"{name}.json").exists():
            lines += score_rows(title, command, load(name))
    return "\n".join(lines) + "\n"


def tuning(name: str) -> str:
    """Every training setting that was tried for segmamba-light, losers too."""
    lines = ["| run | data | steps | mean Dice |", "| --- | --- | --- | --- |"]
    results = load(name)
    data = {item["name"]: item["data"] for item in results["experiments"]}
    lines += [
        f"| {row['name']} | {data[row['name']]} | {row['steps']} | {row['mean']:.3f} |"
        for row in sorted(results["rows"], key=lambda row: -row["mean"])
    ]
    return "\n".join(lines) + "\n"


CPU_RATIOS = (
    ("forward_to_conv_x4_ncdhw", "forward", "four 3x3x3 convolutions", "cpu_scan"),
    (
        "forward_to_conv_x4_channels_last",
        "forward",
        "the same, channels-last",
        "cpu_scan",
    ),
    ("backward_to_forward", "backward", "its own forward", "cpu_scan"),
    (
        "whole_to_no_scan",
        "network at 128^3, forward",
        "the same without its scans",
        "cpu_network",
    ),
    (
        "whole_to_no_layer",
        "network at 128^3, forward",
        "the same without its Mamba layers",
        "cpu_network",
    ),
)


def cpu_ratios() -> str:
    """Times of the scan on a CPU, each over something measured in the same run."""
    lines = ["| time of | over that of | ratio |", "| --- | --- | --- |"]
    for key, what, other, name in CPU_RATIOS:
        lines.append(f"| {what} | {other} | {load(name)['ratio_medians'][key]:.2f} |")
    return "\n".join(lines) + "\n"


def measured(name: str) -> str:
    """What a `segmamba benchmark` measured."""
    data = load(name)
    versions = data["versions"]
    lines = [
        f"{data['device']}, {data['dtype']}, PyTorch {versions['torch']}, "
        f"commit {data['commit'] or 'not recorded'}: {data['what']}.\n",
        "| what | size | step | median ms | quartiles | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in data["measurements"]:
        head = f"| {row['subject']} | {row['case']} | {row['mode']} |"
        if "median_ms" not in row:
            lines.append(f"{head} {row['status']} | | |")
            continue
        low, high = row["quartiles_ms"]
        figures = f"{row['median_ms']:.2f} | {low:.2f} to {high:.2f} | {peak_mib(row)}"
        lines.append(f"{head} {figures} |")
    paces = [paced(row) for row in data["measurements"] if "patches_per_s" in row]
    return "\n".join([*lines, *(["", "; ".join(paces) + "."] if paces else [])]) + "\n"


def peak_mib(row: dict[str, Any]) -> str:
    """Memory of a row; a graph took its own before it was measured."""
    if row.get("peak_mib") is None or "CUDA graph" in row["mode"]:
        return ""
    return f"{row['peak_mib']:.0f}"


def paced(row: dict[str, Any]) -> str:
    """How fast a training was fed."""
    return (
        f"{row['mode']}: {row['patches_per_s']:.1f} patches/s, "
        f"GPU busy {row['gpu_busy_share']:.1%} of the time"
    )


STEP, ONCE = ("2x4x128^3", "training step"), ("1x4x128^3", "inference")
BRIEFLY = (
    ("network", "segmamba", *STEP, "training step, two patches of 4 x 128³"),
    ("network", "resenc", *STEP, "the same, nnU-Net's ResEnc-L"),
    ("network", "swinunetr", *STEP, "the same, SwinUNETR"),
    ("network", "segresnet", *STEP, "the same, SegResNet"),
    (
        "network",
        "segmamba",
        STEP[0],
        "training step, checkpointing",
        "training step with activation checkpointing",
    ),
    ("network", "segmamba", *ONCE, "inference, one patch of 4 x 128³"),
    (
        "network",
        "segmamba",
        ONCE[0],
        "inference, CUDA graph",
        "the same replayed as a CUDA graph, as predictions are",
    ),
    ("network", "resenc", *ONCE, "inference, nnU-Net's ResEnc-L"),
    ("network", "swinunetr", *ONCE, "inference, SwinUNETR"),
    (
        "volume",
        "segmamba",
        "160x240x240",
        "inference",
        "one 4 x 240x240x160 volume in a single pass",
    ),
    (
        "predict",
        "segmamba",
        "240x240x155",
        "end to end",
        "a BraTS case, four files to a label map, 64 passes",
    ),
)
"""Benchmark, subject, case and step of the rows that README shows, and their names."""


def gpu_brief() -> str:
    """A few rows of what was measured on a GPU."""
    lines = [
        "| on one H100, bf16 | ms | peak MiB | command |",
        "| --- | --- | --- | --- |",
    ]
    for name, *place, title in BRIEFLY:
        rows = load(f"gpu_{name}")["measurements"]
        row = next(r for r in rows if [r["subject"], r["case"], r["mode"]] == place)
        figures = f"{row['median_ms']:.1f} | {peak_mib(row)}"
        lines.append(f"| {title} | {figures} | `segmamba benchmark {name}` |")
    return "\n".join(lines) + "\n"


def efficiency() -> str:
    """The paper's efficiency table, a row for each mixer, and how it was counted."""
    from segmamba.benchmark.efficiency import TABLE_HEADER, efficiency_table

    data = load("gpu_efficiency")
    head = (
        f"{data['device']}, {data['dtype']}, PyTorch {data['versions']['torch']}, "
        f"commit {data['commit'] or 'not recorded'}; one volume of 4 x "
        f"{data['measurements'][0]['shape'][-1]}³.\n"
    )
    lines = markdown(TABLE_HEADER, efficiency_table(data))
    return "\n".join([head, *lines, "", f"Multiply-adds {data['multiply_adds']}.", ""])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    every = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(row)} |" for row in every]


def equal_minutes() -> str:
    """What was tried in 240 s on a GPU, the best first; and nnU-Net beside it."""
    data = load("hippocampus-gpu")
    header = (
        "training",
        "on",
        "steps",
        "ms a step",
        "Anterior",
        "Posterior",
        "mean Dice",
    )
    rows = [
        (
            row["name"],
            row["machine"],
            str(row["steps"]),
            f"{row['ms_per_step']:.1f}",
            *(f"{row['dice'][name]:.4f}" for name in ("Anterior", "Posterior")),
            f"{row['mean_dice']:.4f}",
        )
        for row in data["rows"]
    ]
    pairs = [
        (
            f"{pair['label']}: {pair['b']} minus {pair['a']}",
            f"{-pair['mean_difference']:+.4f}",
            "{1:+.4f} to {0:+.4f}".format(*(-x for x in pair["ci95"])),
            f"{pair['p_wilcoxon']:.2f}",
        )
        for pair in data["pairs"]
    ]
    differences = "Dice, pairs by case", "mean", "95 %", "Wilcoxon's p"
    lines = [*markdown(header, rows), "", *markdown(differences, pairs)]
    return "\n".join(lines) + "\n"


def half_precision() -> str:
    """Whether trainings in half types stayed finite."""
    header = (
        "type",
        "data",
        "preset",
        "steps",
        "skipped",
        "not finite",
        "last mean loss",
    )
    rows = [
        (
            *(str(row[key]) for key in ("precision", "data", "preset", "steps")),
            str(row["skipped_steps"]),
            "none" if row["all_finite"] else "some",
            f"{row['last_loss']:.3f}",
        )
        for row in load("half_precision")["rows"]
    ]
    return "\n".join(markdown(header, rows)) + "\n"


def agreement() -> str:
    """Share of voxels that a CPU and a GPU label differently."""
    data = load("cpu_gpu_agreement")
    shares = data["cpu_gpu"]["differing_voxels"]["cases"].values()
    twice = max(data["gpu_twice"]["differing_voxels"]["cases"].values())
    return (
        f"{data['what']}: CPU and GPU differ in {sum(shares) / len(shares):.1e} of a "
        f"case's voxels in the mean, {max(shares):.1e} at most; two runs on the GPU "
        f"in {twice:g}.\n"
    )


NETWORKS = "hippocampus-networks"
"""What `segmamba compare` wrote of the networks that trained for equal minutes."""


def networks(name: str = NETWORKS) -> str:
    """Networks that trained for equal minutes, the best mean rank first."""
    data = load(name)
    cost = {row["model"]: row for row in data["cost"]}
    order = [row["model"] for row in data["ranking"]["overall"]["models"]]
    ranks = {row["model"]: row for row in data["ranking"]["overall"]["models"]}
    scores = {(r["model"], r["label"], r["metric"]): r for r in data["summary"]}
    columns = [(label, "dice") for label in data["labels"]]
    columns += [(label, "hd95_mm") for label in data["labels"]]
    header = ["network", "mean rank [95 % of positions]"]
    header += [
        f"{label}, {'Dice' if metric == 'dice' else 'HD95 mm'} [95 %]"
        for label, metric in columns
    ]
    header += ["steps", "ms a step", "peak MiB", "parameters"]
    rows = [
        [
            name,
            f"{ranks[name]['mean']:.2f} {ranks[name]['position_ci95']}",
            *(interval(scores[(name, *column)]) for column in columns),
            *expense(cost[name]),
        ]
        for name in order
    ]
    devices = sorted({row.get("device") or "not recorded" for row in data["cost"]})
    head = f"{len(data['cases'])} held-out cases; trained on {', '.join(devices)}.\n"
    return "\n".join([head, *markdown(header, rows), ""])


def interval(row: dict[str, Any]) -> str:
    digits = 3 if row["metric"] == "dice" else 2
    low, high = row["ci95"]
    return f"{row['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def expense(row: dict[str, Any]) -> list[str]:
    known = [row["steps"], row["ms_per_step"], row["peak_memory_mib"]]
    cells = ["-" if value is None else f"{value:.0f}" for value in known]
    return [*cells, f"{row['parameters'] / 1e6:.2f} M"]


def networks_differences() -> str:
    """How each network's mean Dice differs from the first SegMamba preset's."""
    pairs = load(NETWORKS)["pairs"]
    header = ["a - b", "label", "n", "difference of Dice [95 %]", "p Holm"]
    header += ["win/tie/loss"]
    rows = [
        [
            f"{pair['a']} - {pair['b']}",
            pair["label"],
            str(pair["n"]),
            "{:+.4f} [{:+.4f}, {:+.4f}]".format(pair["mean_difference"], *pair["ci95"]),
            "< 0.001" if pair["p_holm"] < 0.001 else f"{pair['p_holm']:.3f}",
            f"{pair['wins']}/{pair['ties']}/{pair['losses']}",
        ]
        for pair in pairs
        if pair["metric"] == "dice" and "segmamba" in (pair["a"], pair["b"])
    ]
    return "\n".join([*markdown(header, rows), ""])


RECIPES = {
    "`brats2023-code.yaml`, `task01-brain-tumour.yaml`": (250_000, 128**3),
    "`task02-heart.yaml`": (62_500, 96 * 128 * 128),
    "`task09-spleen.yaml`": (62_500, 64 * 160 * 160),
}
"""Recipes of preset segmamba with batches of two: steps, and voxels of a patch."""


def recipe_costs() -> str:
    """Hours of the recipes on a GPU, from steps of the trainer that were timed."""
    rows = load("gpu_feeding")["measurements"]
    whole = next(row for row in rows if row["mode"] == "with augmentation")
    table = []
    for name, (steps, voxels) in RECIPES.items():
        milliseconds = whole["median_ms"] * voxels / 128**3
        hours = steps * milliseconds / 3.6e6
        cells = [f"{steps:,}".replace(",", " "), f"{milliseconds:.0f}", f"{hours:.1f}"]
        table.append([name, *cells, f"{5 * hours:.0f}"])
    header = ["recipe", "steps", "ms a step", "hours", "hours of five folds"]
    return "\n".join([*markdown(header, table), ""])


MEASURED = (
    *("layer", "network", "volume", "size", "scan", "predict", "feeding"),
    "efficiency",
)


DOUBT = {
    "hippocampus-uncertainty": "8 mirrorings",
    "hippocampus-snapshots": "4 snapshots and the fold, no mirroring",
}


def rank(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['spearman']:.2f} ({low:.2f} to {high:.2f})"


def mean_dice(metrics: dict[str, Any]) -> str:
    return f"{metrics['mean']['dice']:.3f}"


def uncertainty() -> str:
    """How well uncertainty told of errors, by the samples that it was made of."""
    lines = [
        "| samples | mean Dice | ECE, labelled voxels | ECE, all voxels | "
        "Spearman of expected Dice | Spearman of entropy | error of expected Dice |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, title in DOUBT.items():
        metrics = load(name)
        found, scores = (metrics["calibration"][k] for k in ("reliability", "scores"))
        lines.append(
            f"| {title} | {mean_dice(metrics)} | {found['labelled']['ece']:.3f} | "
            f"{found['all']['ece']:.3f} | {rank(scores['expected_dice'])} | "
            f"{rank(scores['mean_entropy'])} | {scores['dice_error']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def whole_volume() -> str:
    """Windows against whole volumes, by references and by each other."""
    windows, whole = load("hippocampus-snapshots"), load("hippocampus-whole-volume")
    between = load("hippocampus-whole-agreement")
    shares = between["differing_voxels"]["cases"].values()
    return "\n".join(
        [
            "| what | value |",
            "| --- | --- |",
            f"| mean Dice, windows of 32³ | {mean_dice(windows)} |",
            f"| mean Dice, whole volumes | {mean_dice(whole)} |",
            f"| mean Dice of one with the other | {mean_dice(between)} |",
            f"| share of voxels that differ | mean {sum(shares) / len(shares):.4f}, "
            f"largest {max(shares):.4f} |",
            *whole_cost(),
            "",
        ]
    )


def whole_cost() -> list[str]:
    """What windows and whole volumes took, by `benchmarks/whole_volume.py`."""
    cost = load("whole_cost")
    where = f"{cost['environment']['threads']} core, no mirroring"
    return [
        f"| {name}: seconds a scan (median), peak of the process ({where}) | "
        f"{cost[key]['median_s']:.2f}, {cost[key]['peak_mib']:.0f} MiB |"
        for name, key in (("windows", "windows"), ("whole volumes", "whole"))
    ]


def fuzz() -> str:
    """Damaged inputs, reader by reader, from `benchmarks/fuzz.py`."""
    data = load("fuzz")
    guided = data.get("guided", {})
    lines = [
        f"{data['inputs']} inputs, {data['failures']} failures; at commit "
        f"{data['environment']['commit']}, by `{data['command']}`"
        + (f"; led by {data['led_by']}.\n" if guided else ".\n"),
        "| reader | inputs | accepted | slowest s | memory grew by MiB | "
        "led by coverage: inputs | edges, first to last |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in data["blind"].items():
        led, found = guided.get(name), "- | -"
        if led is not None:
            found = f"{led['inputs']} | {led['edges_first']} to {led['edges_last']}"
        cells = (row["inputs"], row["accepted"], f"{row['slowest_s']:.3f}")
        grown = f"{row['memory_growth_mib']:.1f}"
        lines.append("| " + " | ".join(map(str, (name, *cells, grown, found))) + " |")
    return "\n".join(lines) + "\n"


def kills() -> str:
    """Kills at random moments, from `benchmarks/kills.py`."""
    data = load("kills")
    lines = [
        "| job | kills | how far each had come | ends | other ends | files left over |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    units = {"preprocessing": "cases", "training": "steps", "prediction": "cases"}
    for job, unit in units.items():
        row = data[job]
        reached = f"{min(row['reached'])} to {max(row['reached'])}"
        lines.append(
            f"| {job} | {row['kills']} | {reached} of {row['whole']} {unit} | "
            f"{row['ends']} | {row['different_ends']} | {row['left_over']} |"
        )
    return "\n".join(lines) + "\n"


def large_ct() -> str:
    """Peak memory of a large CT with many classes, from `benchmarks/large_ct.py`."""
    data = load("large_ct")
    size = " x ".join(map(str, data["size"]))
    mm = data["network_spacing_mm"][0]
    return (
        f"A CT of {size} voxels with {data['classes']} classes, which the network sees "
        f"at {mm:g} mm (windows of {data['patch']}³, a network of one convolution): "
        f"the process held {data['peak_mib']:.0f} MiB at most, "
        f"{data['before_mib']:.0f} of them before; whole sums alone would be "
        f"{data['whole_sums_mib']:.0f} MiB. "
        f"`python benchmarks/large_ct.py` measures it, and fails beyond what its parts "
        f"add up to ({data['peak_allowed_mib']:.0f} MiB) or 6 GiB.\n"
    )


TABLES: dict[str, Callable[[], str]] = {
    "scores": lambda: scores(SCORED),
    "brief": lambda: scores(BRIEF),
    "cpu-ratios": cpu_ratios,
    "large-ct": large_ct,
    "fuzz": fuzz,
    "kills": kills,
    "uncertainty": uncertainty,
    "whole-volume": whole_volume,
    "gpu-brief": gpu_brief,
    "hippocampus-gpu": equal_minutes,
    "cpu-gpu-agreement": agreement,
    "half-precision": half_precision,
    "light-tuning-first": lambda: tuning("light-tuning-first"),
    "light-tuning": lambda: tuning("light-tuning"),
    **{f"gpu-{name}": partial(measured, f"gpu_{name}") for name in MEASURED},
    "gpu-efficiency": efficiency,
    "recipe-costs": recipe_costs,
    NETWORKS: networks,
    f"{NETWORKS}-differences": networks_differences,
    "hippocampus-seeds": partial(networks, "hippocampus-seeds"),
}


def render(text: str) -> str:
    """Give a page with its tables made anew."""
    return MARK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    for name in PAGES:
        page = REPOSITORY / name
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
