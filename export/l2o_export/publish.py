"""Put a rule on a model hub, with a card; `l2o_runtime.files.hub` gets it from there by name."""

import hashlib
from pathlib import Path
from typing import Any

from l2o_export.card import describe_context, describe_licence, describe_state, describe_steps, describe_tasks
from l2o_runtime.config import require
from l2o_runtime.files.artifact import ArtifactError, parse_rule, read_limited
from l2o_runtime.files.hub import CARD, DIGEST_KEY, FILE, NAME, PREFIX
from l2o_runtime.files.untrusted import printable
from l2o_runtime.rules import Rule

TEMPLATE = """\
---
license: {licence}
library_name: l2o
tags:
- learned-optimizer
- pytorch
{digest_key}: {digest}
---

# {repository}

A learned optimizer: a frozen rule that takes the place of Adam's formula.

    from l2o_runtime import LearnedOptimizer
    optimizer = LearnedOptimizer(model.parameters(), rule="{prefix}{repository}@REVISION")

REVISION is the hash of a commit, 40 hex digits: see the list of commits. `pip install huggingface_hub` has what
downloads it; the file is checked against the digest above.

| | |
|---|---|
{rows}
"""


def hub_card(rule: Rule, provenance: dict[str, Any], digest: str, repository: str, licence: str) -> str:
    """The card of a rule on a hub: metadata, how to use it, what it is."""
    config = rule.config
    facts = {
        "kind": f"`{config.kind}`: {config.network}",
        "context": describe_context(rule),
        "weights": f"{sum(p.numel() for p in rule.parameters()):,}",
        "licence of the weights": licence,
        "state": describe_state(rule),
        "steps": describe_steps(rule),
        "horizon": f"{config.horizon:,} steps",
        "loss": "needed at every step" if config.needs_loss else "optional",
        "tasks of its meta-training": describe_tasks(provenance),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return TEMPLATE.format(
        licence=licence.lower(),
        digest_key=DIGEST_KEY,
        digest=digest,
        repository=repository,
        prefix=PREFIX,
        rows=rows,
    )


def push_rule(path: Path, repository: str, licence: str | None = None) -> str:
    """Put a `.safetensors` rule on the hub, in one commit with its card; the repository is made if needed.

    Args:
        path: the rule.
        repository: owner/name.
        licence: of the weights, an identifier such as mit or cc-by-4.0; that of a bundled rule is known.

    Returns:
        The pinned name, hf://owner/name@revision.

    Raises:
        ConfigError: the repository's name is none, or nobody says what the licence is.
        ArtifactError: the rule cannot be read, or the hub did not take it.
    """
    require(NAME.fullmatch(repository) is not None, f"{printable(repository, 120)}: expected owner/name")
    content = read_limited(path)
    rule, provenance = parse_rule(content)
    if not isinstance(rule, Rule):
        raise ArtifactError(f"{path}: a learned solver, not a rule that an optimizer follows")
    licence = licence or describe_licence(path, provenance)
    require(licence is not None, "the licence of the weights is not known: say it, such as --license mit")
    assert licence is not None
    card = hub_card(rule, provenance, hashlib.sha256(content).hexdigest(), repository, licence)
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ArtifactError("l2o push needs huggingface_hub: pip install huggingface_hub") from None
    files = {FILE: content, CARD: card.encode()}
    operations = [hub.CommitOperationAdd(name, data) for name, data in files.items()]
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Add a learned optimizer and its card")
    except Exception as error:  # its own classes, those of its HTTP library, and OSError
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise ArtifactError(f"the hub did not take {repository}: {reason}") from None
    return f"{PREFIX}{repository}@{commit.oid}"
