"""The random operations that views are made of, by name."""

from ssl_geometry.data.geometric import Crop, Flip, PadCrop, Rotate, Translate
from ssl_geometry.data.operation import Op
from ssl_geometry.data.photometric import Blur, Color, Gray, Solarize

OPS: dict[str, type[Op]] = {op.name: op for op in (Crop, PadCrop, Flip, Color, Gray, Blur, Solarize, Rotate, Translate)}
