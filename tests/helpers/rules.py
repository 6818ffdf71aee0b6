"""The table of rules that the invariants are checked on."""

import dataclasses

import torch

from l2o_runtime import Rule, RuleConfig, rules
from l2o_runtime.config import DMDConfig, FlagConfig, KAEConfig, NoneConfig, PlaceboConfig, TensorDMDConfig
from l2o_runtime.rules import (
    DirectionalConfig,
    HierarchicalConfig,
    LSTMConfig,
    MomentsConfig,
    NormalizedConfig,
    PlainConfig,
    RNNPropConfig,
    StepLimits,
    TieredConfig,
)
from l2o_runtime.state import zeros

CONTEXTS = {
    "none": NoneConfig(),
    "placebo": PlaceboConfig(width=3),
    "flag": FlagConfig(window=4),
    "dmd-exact": DMDConfig(window=6, rank=2),
    "dmd-raw": DMDConfig(window=5, rank=1, features="raw"),
    "dmd-sketch": DMDConfig(window=6, rank=2, sketch=64, snapshots="delta", every=3),
    "dmd-gradient": DMDConfig(window=5, rank=2, snapshots="gradient"),
    "dmd-gradient-sketch": DMDConfig(window=5, rank=1, snapshots="gradient", sketch=32),
    "dmd-loss": DMDConfig(window=4, rank=2, snapshots="loss", delay=3),
    "kae": KAEConfig(window=5, latent=4, hidden=8),
    "kae-sketch": KAEConfig(window=5, latent=4, hidden=8, sketch=32),
}
RULES = {
    f"{context}-{kind.features}": kind(context=config)
    for context, config in CONTEXTS.items()
    for kind in (LSTMConfig, NormalizedConfig)
} | {
    f"{context}-moments": MomentsConfig(context=CONTEXTS[context], layers=1, output_scale=0.01)
    for context in ("none", "dmd-sketch")
}
RULES |= {
    f"{context}-rnnprop": RNNPropConfig(context=CONTEXTS[context], hidden=8) for context in ("none", "dmd-sketch")
}
RULES |= {"plain": PlainConfig(hidden=8), "log_sign-5": LSTMConfig(hidden=8, p=5.0)}
RULES |= {f"{context}-scale": TieredConfig(context=CONTEXTS[context], hidden=8) for context in ("none", "dmd-sketch")}
RULES["limited-scale"] = dataclasses.replace(RULES["none-scale"], limits=StepLimits(known_parameters=16, largest=1.0))
RULES |= {
    f"restrained-{kind}": dataclasses.replace(RULES[name], noise_floor=0.1)
    for kind, name in (
        ("scale", "none-scale"),
        ("moments", "dmd-sketch-moments"),
        ("normalized", "dmd-sketch-normalized"),
    )
}
RULES |= {
    f"layers-{window}-scale": TieredConfig(hidden=8, context=context)
    for window, context in (
        ("exact", TensorDMDConfig(window=6, rank=2)),
        ("sketch", TensorDMDConfig(window=6, rank=2, sketch=64, snapshots="delta", every=3)),
    )
}
RULES |= {
    "directional": DirectionalConfig(hidden=8, rank=2),
    "directional-adam": DirectionalConfig(hidden=8, rank=0),
    "directional-places": DirectionalConfig(hidden=8, rank=2, places=True),
    "directional-dmd": DirectionalConfig(hidden=8, rank=2, context=CONTEXTS["dmd-sketch"]),
    "directional-layers": DirectionalConfig(
        hidden=8, rank=2, context=TensorDMDConfig(window=6, rank=2, sketch=64, snapshots="delta", every=3)
    ),
}
RULES |= {
    f"{context}-hierarchical": HierarchicalConfig(
        context=CONTEXTS[context], hidden=4, tensor_hidden=5, model_hidden=3, output_scale=0.001
    )
    for context in ("none", "dmd-sketch")
}


def first_state(rule: Rule, lead: tuple[int, ...], shapes: list[tuple[int, ...]]):
    """States and layout before the first step, as the last arguments of `Rule.forward`."""
    shapes = [torch.Size(shape) for shape in shapes]
    coordinates = zeros(rule.spec.coordinate, (*lead, sum(shape.numel() for shape in shapes)))
    optimization = zeros(rule.spec.model, lead) | zeros(rule.spec.tensor, (*lead, len(shapes)))
    return [coordinates, optimization], [rule.layout(shapes)] if rule.per_tensor else []


def make_rule(config: RuleConfig, seed: int = 0) -> Rule:
    torch.manual_seed(seed)
    rule = rules.make_rule(config).eval().requires_grad_(False)
    if isinstance(config, DirectionalConfig):
        torch.manual_seed(seed + 1)
        rule.head.weight.normal_(std=0.3)
        if rule.places is not None:
            rule.places.normal_()
    if isinstance(config, HierarchicalConfig):
        torch.manual_seed(seed + 1)
        for head in (rule.direction, rule.length, rule.decays):
            head.weight.normal_(std=0.3)
    if config.features == "moments":  # its heads are zero at first, and the networks without effect
        torch.manual_seed(seed + 1)
        rule.cell.head.weight.normal_(std=0.05)
        if isinstance(config, TieredConfig):
            rule.out.weight.normal_(std=0.05)
    return rule
