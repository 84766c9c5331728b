"""Gone: what is left here goes with the last imports of it."""

from loaders.base import ASSETS  # noqa: F401
from loaders.cameratraps import TOYCAM_CLIP  # noqa: F401
