"""Lets a CPU build of torch stand beside a CUDA build of torchvision, as PyPI serves them.

torchvision describes these two operators to torch when it is imported, and fails if its compiled
library did not define them. Nothing here runs them. With this folder on PYTHONPATH, Python imports
this file in every process of the tests, vLLM's children included; torch is imported only by those
that import torchvision.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any


class _DefineOperators(MetaPathFinder):
    """Defines the operators when torchvision is looked for, and leaves finding it to others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+cpu" not in version("torchvision"):
                library: Any = torch.library
                self.library = library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    self.library.define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )


_FINDER = _DefineOperators()  # torch forgets operators whose library object has gone
sys.meta_path.insert(0, _FINDER)
