"""Meta-training and evaluation of learned optimizers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l2o_training.specialising import specialise

__all__ = ["specialise"]


def __getattr__(name: str) -> Any:
    """`specialise`, imported when it is asked for: it needs all of the package."""
    if name in __all__:
        from l2o_training import specialising

        return getattr(specialising, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
