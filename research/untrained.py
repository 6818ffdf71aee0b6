"""What is a rule worth before it is meta-trained? Writes one: the placebo of meta-training.

Verdict: `directional` is bundled as it is before meta-training, and has to be beaten by what is meta-trained from it.
The bundled file is made by

    python research/untrained.py directional --out l2o_runtime/pretrained/directional.safetensors
"""

import argparse
import tomllib

import torch

from l2o_runtime import make_rule, save_rule
from l2o_runtime.config import build_union
from l2o_runtime.rules import AnyRuleConfig


def main() -> None:
    """Write the rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", help="of the rule")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of its configuration, as in TOML")
    parser.add_argument("--seed", type=int, default=0, help="of its weights")
    parser.add_argument("--out", required=True, help="file to write")
    options = parser.parse_args()
    config = build_union(AnyRuleConfig, {"kind": options.kind} | tomllib.loads("\n".join(options.set)))
    torch.manual_seed(options.seed)
    save_rule(options.out, make_rule(config), {"untrained": True, "seed": options.seed})


if __name__ == "__main__":
    main()
