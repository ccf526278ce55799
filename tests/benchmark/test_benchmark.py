"""Benchmarks on tiny shapes: figures come only after a check that can fail."""

from __future__ import annotations

import copy
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch

from segmamba import cli
from segmamba.benchmark import (
    BENCHMARKS,
    HEADER,
    BenchmarkSettings,
    Record,
    checks,
    describe_pace,
    feeding,
    layer,
    model,
    predict,
    run_benchmark,
    scan,
    simulated,
    table_row,
    timing,
)
from segmamba.benchmark.efficiency import TABLE_HEADER, efficiency_table
from segmamba.errors import (
    BackendUnavailableError,
    ConfigError,
    SegMambaError,
    TrainingError,
)
from segmamba.ops import selective_scan
from segmamba.report.benchmark_figure import benchmark_figure, scan_lines
from segmamba.training import shallow_maps

QUICK = BenchmarkSettings(device="cpu", dtype="fp32", seconds=0.001, quick=True)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny shapes gain nothing from threads, which wait for each other when busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def quick_record(name: str) -> Record:
    """One quick run, shared by the tests that look at it."""
    return run_benchmark(name, QUICK)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("layer", 8), ("volume", 1), ("size", 2), ("scan", 8), ("efficiency", 8)],
)
def test_quick_run_measures_all_rows(name: str, rows: int) -> None:
    record = quick_record(name)
    data = record.data
    assert record.failures == []
    assert data["checks"]
    assert len(data["measurements"]) == rows
    for row in data["measurements"]:
        low, high = row["quartiles_ms"]
        assert 0 < row["min_ms"] <= low <= row["median_ms"] <= high <= row["max_ms"]
        assert row["rounds"] >= 3
        assert len(table_row(row)) == len(HEADER)
    assert {"device", "versions", "commit", "dtype", "threads"} <= set(data)


def test_file_is_written_after_every_row(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    record = Record("test", QUICK, out)
    record.check("all", lambda: {"output": 1e-6}, 1e-4)
    record.add("segmamba", "a", "forward", **timing.summary([1.0, 2.0]))
    data = json.loads(out.read_text())
    assert not data["complete"]
    assert data["checks"]["all"]["passed"]
    assert data["measurements"][0]["median_ms"] == 1.5
    record.finish()
    assert json.loads(out.read_text())["complete"]


def test_network_measures_peers_beside_ours() -> None:
    pytest.importorskip("monai")
    record = run_benchmark("network", QUICK)
    assert record.failures == []
    modes = {(row["subject"], row["mode"]) for row in record.data["measurements"]}
    ours = {"training step", "inference", "training step, checkpointing"}
    assert {mode for subject, mode in modes if subject == "segmamba"} == ours
    assert ("segresnet", "training step") in modes
    assert record.data["peers"]["swinunetr"] == "left out of quick runs"
    assert set(record.data["checks"]) == {"network in fp32"}


def test_absent_peer_is_named_and_the_rest_goes_on(monkeypatch) -> None:
    def absent(name: str, **options):
        raise BackendUnavailableError(f"{name} needs a package")

    monkeypatch.setattr("segmamba.benchmark.peers.build_peer", absent)
    record = run_benchmark("network", QUICK)
    assert record.data["peers"]["resenc"] == "resenc needs a package"
    assert {row["subject"] for row in record.data["measurements"]} == {"segmamba"}
    assert record.failures == []


def test_wrong_layer_is_not_timed(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(layer.TriOrientatedMamba, "forward", wrong_in_float32())
    arguments = ["benchmark", "layer", "--quick", "--device", "cpu", "--dtype", "fp32"]
    assert cli.main([*arguments, "-o", str(tmp_path / "out.json")]) == 1
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["measurements"] == []
    assert not data["checks"]["stage 1"]["passed"]
    assert data["checks"]["stage 1"]["errors"]["output"] == pytest.approx(0.01, 1e-3)
    assert "check of stage 1" in capsys.readouterr().err


def wrong_in_float32():
    right = layer.TriOrientatedMamba.forward

    def forward(self, tokens, size):
        scale = 1.0 if tokens.dtype == torch.float64 else 1.01
        return scale * right(self, tokens, size)

    return forward


def test_wrong_scan_is_not_timed(monkeypatch) -> None:
    def broken(*inputs, backend):
        scale = 1.0 if backend == "reference" else 1.01
        output: Any = selective_scan(*inputs, backend=backend)
        return scale * output

    monkeypatch.setattr(scan, "selective_scan", broken)
    record = run_benchmark("scan", QUICK)
    assert record.data["measurements"] == []
    assert len(record.failures) == 1


def test_unfinished_output_fails_the_check() -> None:
    with checks.poisoned_memory():
        output = torch.empty(8)
        output[:7] = 1
    assert checks.relative_error(output, torch.ones(8)) == float("inf")
    assert not torch.are_deterministic_algorithms_enabled()


def test_relative_error_is_that_of_norms() -> None:
    found, expected = torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])
    assert checks.relative_error(found, expected) == pytest.approx(0.2)
    assert checks.relative_error(found[:1], expected) == float("inf")


def test_different_bits_are_counted() -> None:
    a, b, nan = torch.ones(2), torch.ones(2) + 1e-6, torch.full((2,), float("nan"))
    assert checks.different_bits([a, a, nan], [a, b, nan]) == 2


def test_networks_are_checked_on_maps_of_no_faulty_depth() -> None:
    for size, stages in ((model.CHECK_SIZE, 4), (model.QUICK_CHECK_SIZE, 2)):
        assert -(-size[0] // 2**stages) != shallow_maps._FAULTY_DEPTH


def test_summary_gives_median_and_quartiles() -> None:
    found = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found["median_ms"] == 3
    assert found["quartiles_ms"] == [2, 4]
    assert (found["min_ms"], found["max_ms"], found["rounds"]) == (1, 5, 5)


def test_rows_that_break_are_kept_and_reported() -> None:
    record = Record("test", QUICK)

    def no_memory():
        raise torch.OutOfMemoryError("too much")

    def broken():
        raise RuntimeError("bad kernel")

    record.time("segmamba", "a", "forward", no_memory)
    record.time("somebody", "a", "forward", broken)
    assert record.failures == []
    row = record.time("segmamba", "b", "forward", broken)
    assert record.failures == ["b, forward: RuntimeError: bad kernel"]
    assert "bad kernel" in table_row(row)[3]
    states = [row["status"] for row in record.data["measurements"]]
    assert states == ["out of memory", "failed", "failed"]


def test_a_cpu_that_lacks_memory_is_no_failure() -> None:
    record = Record("test", QUICK)

    def make() -> timing.Run:
        return torch.empty(10**14).sum

    row = record.time("segmamba", "a", "forward", make)
    assert row["status"] == "out of memory"
    assert "400000000000000 bytes" in row["note"]
    assert record.failures == []


def test_memory_on_a_cpu_is_what_tensors_held() -> None:
    def make() -> timing.Run:
        weight = torch.ones(2**18)  # 1 MiB

        def run() -> torch.Tensor:
            first = weight + 1
            del first
            return (weight + 1) * (weight + 2)

        return run

    figures = timing.measure(make, torch.device("cpu"), 0.01, 0)
    assert (figures["peak_mib"], figures["peak_above_mib"]) == (4, 3)


def test_extension_alone_gives_the_reference_gradients(monkeypatch) -> None:
    """mamba_ssm's extension, played by our reference, goes through our wrapper."""
    monkeypatch.setattr(scan.ExtensionScan, "extension", PlayedExtension)
    inputs = scan.Inputs.draw(QUICK, 2, 4, 9)

    def reference(*tensors) -> Any:
        u, delta, A, B, C, D, bias = tensors
        return selective_scan(u, delta, A, B, C, D, None, bias, True)

    errors = checks.relative_errors(
        inputs.backward(scan.ExtensionScan.apply), inputs.backward(reference)
    )
    assert max(errors.values()) < 1e-6


class PlayedExtension:
    """`selective_scan_cuda` as mamba_ssm 2 calls it: B and C with groups, no gate."""

    @staticmethod
    def fwd(u, delta, A, B, C, D, z, bias, softplus):
        assert B.ndim == C.ndim == 4
        assert z is None
        return selective_scan(u, delta, A, B, C, D, None, bias, softplus), torch.ones(1)

    @staticmethod
    def bwd(u, delta, A, B, C, D, z, bias, grad, states, out, dz, softplus, again):
        assert z is None
        assert grad.is_contiguous()
        assert states.numel() == 1
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, bias)]
            u, delta, A, B, C, D, bias = leaves
            out = selective_scan(u, delta, A, B, C, D, None, bias, softplus)
        return torch.autograd.grad(out, leaves, grad)


def test_efficiency_counts_and_says_what_is_global() -> None:
    data = copy.deepcopy(quick_record("efficiency").data)
    rows = data["measurements"]
    assert "for the scan" in data["multiply_adds"]
    rows[4]["status"] = "out of memory"
    del rows[4]["median_ms"]
    table = efficiency_table(data)
    assert {len(row) for row in table} == {len(TABLE_HEADER)}
    assert [row[2] for row in table] == ["343", "343", "all (global)", "all (global)"]
    assert table[2][5:7] == ("out of memory", "-")
    by_mixer = {row["mixer"]: row for row in rows}
    assert by_mixer["large-kernel"]["tokens_seen"] == 343
    assert by_mixer["window-attention"]["tokens_seen"] == 343
    for name in ("self-attention", "tom"):
        assert by_mixer[name]["global"]
        assert by_mixer[name]["tokens_seen"] == by_mixer[name]["sequence"] == 512
    assert len({row["multiply_adds"] for row in by_mixer.values()}) == 4
    assert all(row["parameters"] > 1000 for row in by_mixer.values())
    for train, infer in zip(rows[::2], rows[1::2], strict=True):
        weights = 4 * train["parameters"] / 2**20
        assert train["peak_mib"] > infer["peak_mib"] > weights


def test_predict_times_the_whole_and_its_parts() -> None:
    record = run_benchmark("predict", QUICK)
    assert record.failures == []
    rows = {row["mode"]: row for row in record.data["measurements"]}
    parts = ["read", "preprocess", "copy", "windows", "windows, network left out"]
    assert list(rows) == ["end to end", *parts, "restore", "write"]
    assert rows["windows, network left out"]["max_ms"] < rows["windows"]["min_ms"]
    assert rows["end to end"]["passes"] == 8 * rows["end to end"]["windows"]
    assert rows["end to end"]["shape"] == [4, 26, 24, 20]
    assert rows["end to end"]["windows"] >= 4
    assert rows["end to end"]["cold_ms"] > 0
    same = {"differing voxels": 0, "empty": 0}
    assert record.data["checks"]["prediction"]["errors"] == same


def test_predict_times_the_command_too(tmp_path: Path, monkeypatch) -> None:
    """In this process, since a new one would compile anew for half a minute."""
    calls = []

    def run(words: list[str], **options) -> subprocess.CompletedProcess[str]:
        assert words[:3] == [sys.executable, "-m", "segmamba"]
        calls.append(words)
        return subprocess.CompletedProcess(words, cli.main(words[3:]), "", "broken")

    monkeypatch.setattr(predict, "subprocess", SimpleNamespace(run=run))
    record, predictor = Record("test", QUICK), predict._predictor(QUICK)
    files = simulated.simulate_scans(tmp_path / "case", (20, 16, 16))
    predict._end_to_end(predictor, files, tmp_path)
    predict._keep_command(record, "case", predictor, files, tmp_path)
    assert record.failures == []
    assert len(calls) == predict.ROUNDS
    (row,) = record.data["measurements"]
    assert row["mode"] == "whole command"
    assert row["rounds"] == 3
    errors = record.data["checks"]["whole command"]["errors"]
    assert errors == {"differing voxels": 0, "empty": 0}
    missing = [file.with_name("gone.nii.gz") for file in files]
    predict._keep_command(record, "case", predictor, tuple(missing), tmp_path)
    assert "broken" in record.failures[0]


def test_predict_takes_a_case_of_ones_own(tmp_path: Path) -> None:
    files = simulated.simulate_scans(tmp_path / "a-case", (20, 22, 18))
    settings = replace(QUICK, case=tmp_path / "a-case")
    rows = run_benchmark("predict", settings).data["measurements"]
    assert rows[0]["shape"] == [4, 20, 22, 18]
    files[0].unlink()
    with pytest.raises(SegMambaError, match="four scans"):
        run_benchmark("predict", settings)


def test_feeding_trains_in_three_ways() -> None:
    record = quick_record("feeding")
    assert record.failures == []
    errors = record.data["checks"]["batches"]["errors"]
    assert errors == {"image": 0, "differing labels": 0}  # a CPU is its own truth
    rows = {row["mode"]: row for row in record.data["measurements"]}
    modes = ["batch that stays on the device", "without augmentation"]
    assert list(rows) == [*modes, "with augmentation"]
    for row in rows.values():
        assert row["shape"] == [2, 4, 16, 16, 16]
        assert row["rounds"] >= 2
        assert row["steps"] % feeding.QUICK_EPOCH == 0
        assert 0 <= row["waiting_share"] <= 1
        assert row["workers"] == 1
        assert row["gpu_busy_share"] is None  # there is none
        assert math.isfinite(row["loss"])
        seconds = 2e-3 * row["median_ms"]
        assert 0.05 < row["patches_per_s"] * seconds / 4 < 4
        assert len(table_row(row)) == len(HEADER)
    assert rows[modes[0]]["share_of_staying_batch"] == 1
    assert "patches/s" in describe_pace(row)


def test_wrong_batches_are_not_trained_on(monkeypatch) -> None:
    real = feeding.batch_maker

    def swapped(sampler, augmentation, *, seed, device):
        """On the device one batch too far; the CPU's own are asked for by name."""
        make = real(sampler, augmentation, seed=seed, device=device)
        calls.append(make)
        return (lambda step: make(step + 1)) if len(calls) == 2 else make

    calls: list[Any] = []
    monkeypatch.setattr(feeding, "batch_maker", swapped)
    record = run_benchmark("feeding", QUICK)
    assert record.data["measurements"] == []
    assert "check of batches" in record.failures[0]


def test_training_that_breaks_is_a_row_without_figures(monkeypatch) -> None:
    def broken(trainer: Any) -> None:
        raise TrainingError("no more memory")

    monkeypatch.setattr(feeding.Trainer, "fit", broken)
    record = run_benchmark("feeding", QUICK)
    assert [row["status"] for row in record.data["measurements"]] == ["failed"] * 3
    assert len(record.failures) == 3


@pytest.mark.parametrize(
    ("intervals", "share"),
    [
        ([], None),
        ([(5, 6)], 1),
        ([(0, 2), (8, 10)], 0.4),
        ([(8, 10), (0, 4), (1, 2), (3, 5), (8, 9)], 0.7),
        ([(0, 10), (2, 3)], 1),
    ],
)
def test_busy_is_what_any_kernel_covers(intervals, share) -> None:
    assert feeding.busy_share(intervals) == share


class PlayedProfiler:
    """Sees two kernels of a third of its time each, and notes its calls."""

    calls: list[str]

    def __enter__(self) -> None:
        self.calls.append("warmed up")

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        self.calls.append("started")

    def stop(self) -> None:
        self.calls.append("stopped")

    def events(self) -> list[SimpleNamespace]:
        times = [SimpleNamespace(start=t, end=t + 1) for t in (0, 2)]
        cuda = SimpleNamespace(name="CUDA")
        return [
            SimpleNamespace(name="k", device_type=cuda, time_range=time)
            for time in times
        ]


def test_a_gpu_is_watched_after_what_was_prepared_ahead(monkeypatch, tmp_path) -> None:
    PlayedProfiler.calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 300 * 2**20)
    monkeypatch.setattr(feeding, "_profiler", PlayedProfiler)
    watch = feeding._Watch(3.0, torch.device("cuda"), 2**20, epoch=6)
    log, seen = tmp_path / "log.jsonl", []
    line = {"seconds": 2.0, "patches_per_s": 30.0, "waited_s": 0.1, "loss": 1.0}

    def train(epoch: int) -> None:
        for step in range(6):
            watch.note_step(None)
            seen.append((epoch, step, len(PlayedProfiler.calls)))
        peak = {"peak_memory_mib": 200.0 if epoch == 1 else 100.0}
        new = {**line, **peak, "epoch": epoch, "step": 6 * epoch}
        with log.open("a") as file:
            file.write(json.dumps(new) + "\n")
        watch.note_epoch(log)

    for epoch in (1, 2, 3):  # one to warm up, two that last the time
        train(epoch)
    with pytest.raises(feeding._EnoughError):
        train(4)
    assert PlayedProfiler.calls == ["warmed up", "started", "stopped"]
    assert next((e, s) for e, s, calls in seen if calls == 2) == (4, 2)
    figures = watch.figures()
    assert figures["gpu_busy_share"] == pytest.approx(2 / 3)
    assert figures["patches_per_s"] == 30
    assert figures["waiting_share"] == pytest.approx(0.05)
    assert figures["peak_mib"] == 199
    assert figures["peak_reserved_mib"] == 300
    assert figures["rounds"] == 10  # five between the steps of each of two epochs


def test_kernels_are_told_from_copies_and_the_cpu() -> None:
    def event(name: str, kind: str, start: float) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=start + 1)
        device = SimpleNamespace(name=kind)
        return SimpleNamespace(name=name, device_type=device, time_range=time_range)

    events = [
        event("scan_kernel", "CUDA", 3),
        event("aten::add", "CPU", 0),
        event("Memcpy HtoD (Pinned -> Device)", "CUDA", 1),
        event("conv", "CUDA", 2),
    ]
    profiled: Any = SimpleNamespace(events=lambda: events)
    assert feeding.kernel_intervals(profiled) == [(3, 4), (2, 3)]


def test_pace_is_said_in_a_line() -> None:
    row = {"mode": "with augmentation", "patches_per_s": 17.345, "waiting_share": 0.012}
    text = "with augmentation: 17.34 patches/s, 1.2 % of the time waiting for batches"
    assert describe_pace(row) in (text, text.replace("17.34", "17.35"))
    assert describe_pace({**row, "gpu_busy_share": 0.971}).endswith("GPU busy 97.1 %")


def test_figure_is_drawn_from_the_record(tmp_path: Path) -> None:
    for name in ("size", "scan"):
        data = quick_record(name).data
        benchmark_figure(data, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    lines = scan_lines(data["measurements"], "forward")
    assert [x for x, _ in lines["segmamba", 8]] == [16, 16, 65, 65]
    with pytest.raises(ConfigError, match="nothing to draw"):
        benchmark_figure({"measurements": []}, tmp_path / "none.png")


def test_gpu_machine_needs_no_file_formats_and_no_command_line() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys("
        "('nibabel', 'isal', 'tyro', 'rich', 'matplotlib', 'monai'))); "
        "import segmamba.benchmark"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_names_are_those_of_the_command_line() -> None:
    hints = get_type_hints(cli.Benchmark)
    assert set(get_args(hints["name"])) == set(BENCHMARKS)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="seconds"):
        BenchmarkSettings(seconds=0)
    with pytest.raises(ConfigError, match="expected layer"):
        run_benchmark("nonsense", QUICK)
