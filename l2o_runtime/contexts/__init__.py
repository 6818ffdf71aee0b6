"""The contexts: none, placebo, dmd, kae."""

from l2o_runtime.config import ContextConfig, DMDConfig, KAEConfig, PlaceboConfig
from l2o_runtime.contexts.base import ConstantContext, Context, WindowContext
from l2o_runtime.contexts.dmd import DMD
from l2o_runtime.contexts.kae import KAE

__all__ = ["DMD", "KAE", "ConstantContext", "Context", "WindowContext", "make_context"]


def make_context(config: ContextConfig) -> Context:
    """The context that a configuration describes, freshly initialised."""
    match config:
        case DMDConfig():
            return DMD(config)
        case KAEConfig():
            return KAE(config)
        case PlaceboConfig():
            return ConstantContext(config.width)
        case _:
            return ConstantContext()
