"""The tensor types that cross module borders; not in `arrays`, so that processes without networks do not load torch."""

from jaxtyping import Float32
from torch import Tensor

Images = Float32[Tensor, "n 3 h w"]
"""A normalised batch of images."""

Targets = Float32[Tensor, "n h w"]
"""1 on target pixels, else 0."""

Valid = Float32[Tensor, "n h w"]
"""1 on pixels that count, 0 on padding."""

Logits = Float32[Tensor, "n 2 h w"]
"""Class scores before softmax: background, target."""
