"""The table of rules that the invariants are checked on."""

import torch

from l2o_runtime import Rule, RuleConfig
from l2o_runtime.config import DMDConfig, FlagConfig, KAEConfig, NoneConfig, PlaceboConfig

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
    f"{context}-{features}": RuleConfig(context=config, features=features)
    for context, config in CONTEXTS.items()
    for features in ("log_sign", "normalized")
} | {
    f"{context}-moments": RuleConfig(
        context=CONTEXTS[context], features="moments", output="adam", layers=1, output_scale=0.01
    )
    for context in ("none", "dmd-sketch")
}


def make_rule(config: RuleConfig, seed: int = 0) -> Rule:
    torch.manual_seed(seed)
    rule = Rule(config).eval().requires_grad_(False)
    if config.features == "moments":  # its head is zero at first, and the network without effect
        torch.manual_seed(seed + 1)
        rule.cell.head.weight.normal_(std=0.05)
    return rule
