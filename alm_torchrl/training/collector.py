"""The collector of a trainer that saves before anything is closed."""

from __future__ import annotations

import warnings
from typing import Any

from torchrl.collectors import Collector

__all__ = ["OpenCollector"]


class OpenCollector(Collector):
    """A collector that only its trainer closes, after all is saved."""

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing; see :meth:`close`."""

    def close(self) -> None:
        """Closes the environment; what that raises becomes a warning."""
        try:
            super().shutdown()
        except Exception as error:
            warnings.warn(
                f"closing the environment raised {type(error).__name__}: {error}",
                UserWarning,
                stacklevel=3,
            )
