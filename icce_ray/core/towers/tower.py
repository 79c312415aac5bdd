"""A model of another library, with the part of timm's interface that Backbone uses.

Shapes: B images, S side of the input, D features, T tokens, C channels.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class Tower(nn.Module):
    """An image tower. Subclasses define `pooled` and `forward_features`.

    Attributes:
        pretrained_cfg: as of a timm model.
        num_features: width of the tokens; 0 where it is not known before the model runs.
        head_hidden_size: width of what `pooled` returns, likewise.
        num_prefix_tokens: tokens before those of the patches.
        cls_token: not None where the first token stands for the image.
    """

    num_prefix_tokens = 0
    cls_token: Any = None

    def __init__(self, pretrained_cfg: Mapping[str, Any], features: int, pooled: int) -> None:
        super().__init__()
        self.pretrained_cfg = dict(pretrained_cfg)
        self.num_features, self.head_hidden_size = features, pooled

    def pooled(self, x: Tensor) -> Tensor:
        """Normalized pixels [B, 3, S, S] -> the library's own features of an image [B, D]."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalized pixels -> tokens [B, T, C] or a map [B, C, h, w], where there are any."""
        raise NotImplementedError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings, which tell of random weights and the like.

    Some go to the root logger, which gets a handler by the first of them: hence one that is empty.
    """
    root, nothing, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(nothing)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        root.removeHandler(nothing)
