"""Data sets where they lie: folder layouts of the field, read without a change."""

from segmamba.data.layouts.detection import load_dataset, load_label_scheme

__all__ = ["load_dataset", "load_label_scheme"]
