"""The models and the feedback that runs are broken with."""

from tests.integration.conftest import root, train

__all__ = ["root", "train"]
