"""Files to volumes and back; the only room that knows file formats."""

from segmamba.io.volume import Volume

__all__ = ["Volume"]
