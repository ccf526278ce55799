"""Fuzz one reader, led by coverage; `fuzz.py --guided` starts it.

python benchmarks/fuzz_guided.py NAME CORPUS BROKEN SECONDS
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "io"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

with atheris.instrument_imports(include=["segmamba", "nibabel", "pydicom", "yaml"]):
    from engine import Outcome, feed, lay_out
    from mutate import mutate, mutate_json
    from targets import make_targets


def main() -> None:
    name, corpus, broken, seconds = sys.argv[1:]
    folder = Path(corpus)
    for part in ("seeds", "inputs", "work"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    target = make_targets(folder / "seeds")[name]
    path, pack = lay_out(target, folder / "work"), target.seeds[0].pack
    for index, seed in enumerate(target.seeds):
        (folder / "inputs" / str(index)).write_bytes(seed.data)

    def one_input(data: bytes) -> None:
        outcome = Outcome()
        feed(target, path, data if pack is None else pack(data), outcome)
        for failure in outcome.failures:
            Path(broken).mkdir(parents=True, exist_ok=True)
            file = Path(broken) / f"guided-{name}-{hash(failure) & 0xFFFFFF:x}"
            file.write_bytes(outcome.broken[0])
            file.with_suffix(".txt").write_text(failure)

    def damage(data: bytes, most: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < 0.3:
            return atheris.Mutate(data, most)
        try:
            if target.seeds[0].is_json:
                return mutate_json(data.decode(), source).encode()[:most]
        except (ValueError, RecursionError):
            pass
        return mutate(data, source)[:most]

    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=20"]
    options += ["-rss_limit_mb=3000", "-max_len=20000", f"-artifact_prefix={broken}-"]
    atheris.Setup(
        [sys.argv[0], *options, str(folder / "inputs")],
        one_input,
        custom_mutator=damage,
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
