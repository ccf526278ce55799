"""Commands about the machine and the software."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from segmamba.cli.words import Output, parse_duration, require_beside
from segmamba.console import (
    ProgressDisplay,
    print_table,
    say,
    say_error,
)


@dataclass(frozen=True)
class Info:
    """Say what is installed and usable here; or what a run is."""

    run_folder: Annotated[Positional[Path | None], arg(metavar="RUN")] = None
    """Run folder; also says how to train it again."""

    def run(self) -> int:
        """Print versions, devices and back ends, or the run's parts."""
        from segmamba import workflow

        for title, rows in workflow.info(self.run_folder).items():
            print_table(title, ("what", "value"), rows)
        if self.run_folder is not None:
            for fold, line in workflow.commands_again(self.run_folder).items():
                say(f"Fold {fold} again: {line}")
        return 0


@dataclass(frozen=True)
class Demo:
    """Do the whole job on simulated brain tumours, or on data of one's own."""

    output: Output
    """Folder to write to."""
    data: Path | None = None
    """A data set of one's own instead of the simulated one."""
    max_time: str = "3m"
    """Time to train."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> int:
        """Run all steps and say where everything is."""
        from segmamba.demo import run_demo

        with ProgressDisplay() as progress:
            result = run_demo(
                self.output,
                data=self.data,
                max_time_s=parse_duration(self.max_time),
                device=self.device,
                progress=progress,
                say=say,
            )
        print_table(*result.table)
        for line in result.lines:
            say(line)
        return 0


@dataclass(frozen=True)
class Benchmark:
    """Measure speed and memory here; exit code 1 if a check fails."""

    name: Annotated[
        Positional[
            Literal[
                "layer",
                "network",
                "volume",
                "size",
                "scan",
                "predict",
                "feeding",
                "efficiency",
            ]
        ],
        arg(metavar="NAME"),
    ]
    """layer, network, volume, size, scan, predict, feeding or efficiency."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """JSON file to write, anew after every row."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision; auto: bf16 where the device computes it natively, else fp32."""
    seconds: float = 1.5
    """Time for the rounds of one measurement."""
    quick: FlagCreatePairsOff[bool] = False
    """Tiny shapes: shows that it works, measures nothing of interest."""
    backend: str = "auto"
    """Back end of the scans."""
    peers: bool = True
    """Measure other networks and kernels too, where they are installed."""
    case: Path | None = None
    """Folder with one case's four scans, for predict; default: a simulated case."""
    figure: Path | None = None
    """Also draw speed against size to this PNG file (size and scan)."""

    def run(self) -> int:
        """Measure, then print one table."""
        from segmamba.benchmark import (
            HEADER,
            BenchmarkSettings,
            describe_pace,
            run_benchmark,
            table_row,
        )
        from segmamba.report.benchmark_figure import benchmark_figure

        self._check()
        settings = BenchmarkSettings(
            device=self.device,
            dtype=self.dtype,
            seconds=self.seconds,
            quick=self.quick,
            backend=self.backend,
            peers=self.peers,
            case=self.case,
        )
        record = run_benchmark(self.name, settings, out=self.out, say=say)
        rows = map(table_row, record.data["measurements"])
        print_table(record.data["what"], HEADER, rows)
        if self.name == "efficiency":
            from segmamba.benchmark.efficiency import TABLE_HEADER, efficiency_table

            print_table("side by side", TABLE_HEADER, efficiency_table(record.data))
            say(f"Multiply-adds {record.data['multiply_adds']}.")
        for row in record.data["measurements"]:
            if "patches_per_s" in row:
                say(describe_pace(row))
        for side, ratio in record.data.get("cost_over_base", {}).items():
            base = record.data["base_side"]
            say(f"{side}^3: {ratio:.3f} times the time per voxel of {base}^3")
        for failure in record.failures:
            say_error(failure)
        if self.figure is not None and not record.failures:
            benchmark_figure(record.data, self.figure)
            say(f"Drawn to {self.figure}")
        if self.out is not None:
            say(f"Written to {self.out}")
        return 1 if record.failures else 0

    def _check(self) -> None:
        require_beside(
            "--case",
            "predict",
            is_given=self.case is not None,
            is_there=self.name == "predict",
        )
        require_beside(
            "--figure",
            "size or scan",
            is_given=self.figure is not None,
            is_there=self.name in ("size", "scan"),
        )
