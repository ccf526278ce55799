"""3D medical image segmentation with SegMamba."""

__version__ = "0.1.0"
