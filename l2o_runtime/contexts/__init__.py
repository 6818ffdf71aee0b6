"""The contexts: none, placebo, flag, dmd, kae."""

from l2o_runtime.config import ContextConfig, DMDConfig, FlagConfig, KAEConfig, PlaceboConfig, TensorDMDConfig
from l2o_runtime.contexts.base import ConstantContext, Context, FlagContext, WindowContext
from l2o_runtime.contexts.dmd import DMD, TensorDMD
from l2o_runtime.contexts.kae import KAE

__all__ = ["DMD", "KAE", "ConstantContext", "Context", "FlagContext", "TensorDMD", "WindowContext", "make_context"]


def make_context(config: ContextConfig) -> Context:
    """The context that a configuration describes, freshly initialised."""
    match config:
        case TensorDMDConfig():
            return TensorDMD(config)
        case DMDConfig():
            return DMD(config)
        case KAEConfig():
            return KAE(config)
        case PlaceboConfig():
            return ConstantContext(config.width)
        case FlagConfig():
            return FlagContext(config)
        case _:
            return ConstantContext()
