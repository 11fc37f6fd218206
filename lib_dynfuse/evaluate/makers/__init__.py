"""What makes an evaluation's pictures: diffusers in this process, or WebUIs elsewhere."""

from .maker import Job, Made, Maker, MakerGoneError

__all__ = ["Job", "Made", "Maker", "MakerGoneError"]
