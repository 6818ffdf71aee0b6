"""Rules by name: `hf://owner/name@revision`, files of a model hub that huggingface_hub speaks to.

A repository has `rule.safetensors`, and in its card, `README.md`, the SHA-256 of that file. A revision is a whole
commit hash, since branches and tags move: what was downloaded once never has to be asked for again, and what a script
names is what it gets. The digest finds a file that does not belong to its card; whom to trust is up to the reader, but
whatever a `.safetensors` rule says, it is only numbers.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from l2o_runtime.files.artifact import MAX_BYTES, ArtifactError, parse_rule, read_limited
from l2o_runtime.files.untrusted import printable

PREFIX = "hf://"
FILE, CARD = "rule.safetensors", "README.md"
DIGEST_KEY = "l2o_sha256"
"""Of the card's metadata."""

MAX_CARD = 2**20
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
REVISION = re.compile(r"[0-9a-f]{40}")


class Address(NamedTuple):
    """A rule on a hub.

    Attributes:
        repository: owner/name.
        revision: the hash of a commit, 40 hex digits.
    """

    repository: str
    revision: str


def parse_address(text: str) -> Address:
    """The address that `hf://owner/name@revision`, with or without `hf://`, stands for.

    Raises:
        ArtifactError: it is none, or its revision is not pinned.

    >>> parse_address("hf://you/rule@" + "0" * 40).repository
    'you/rule'
    """
    repository, _, revision = text.removeprefix(PREFIX).partition("@")
    if not NAME.fullmatch(repository):
        raise ArtifactError(f"{printable(text, 120)}: expected hf://owner/name@revision")
    if not REVISION.fullmatch(revision):
        found = f"{printable(revision, 60)} is none" if revision else "none is given"
        raise ArtifactError(
            f"{PREFIX}{repository}: expected a pinned revision, the 40 hex digits of a commit, after @; {found} "
            "(branches and tags move; the hub's page lists commits, and `l2o push` prints its own)"
        )
    return Address(repository, revision)


def fetch(text: str) -> Path:
    """The file of a rule on a hub, from the cache where it is there already; without network then.

    Raises:
        ArtifactError: it cannot be got, or is not what its card says, or no rule.
    """
    address = parse_address(text)
    name = f"{PREFIX}{address.repository}@{address.revision}"
    try:
        card = read_limited(_file(address, CARD, MAX_CARD)).decode(errors="replace")
        path = _file(address, FILE, MAX_BYTES)
        content = read_limited(path)
        _check(content, card)
    except ArtifactError as error:
        raise ArtifactError(f"{name}: {error}") from None
    return path


def card_digest(card: str) -> str | None:
    """The SHA-256 that a card states of its rule.

    >>> card_digest("---\\nlicense: mit\\nl2o_sha256: " + "ab" * 32 + "\\n---\\n")[:4]
    'abab'
    """
    front = re.match(r"---\n(.*?)\n---(?:\n|$)", card, flags=re.DOTALL)
    found = re.search(rf"^{DIGEST_KEY}: ([0-9a-f]{{64}})$", front[1] if front else "", flags=re.MULTILINE)
    return found[1] if found else None


def _check(content: bytes, card: str) -> None:
    """Is it the file that its card tells of, and a rule?"""
    wanted = card_digest(card)
    if wanted is None:
        raise ArtifactError(f"its card states no {DIGEST_KEY}: it was not written by `l2o push`")
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise ArtifactError(f"{FILE} has SHA-256 {found[:12]}…, its card says {wanted[:12]}…: it is not to be trusted")
    parse_rule(content)


def _file(address: Address, name: str, most: int) -> Path:
    """A file of a repository, in the hub's cache."""
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ArtifactError("rules by name need huggingface_hub: pip install huggingface_hub") from None
    repository, revision = address
    try:
        return Path(hub.hf_hub_download(repository, name, revision=revision, local_files_only=True))
    except Exception:  # not in the cache
        pass
    try:
        size = hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, revision=revision)).size
        if size is None or size > most:
            raise ArtifactError(f"{name} has {size} bytes; at most {most} are expected")
        return Path(hub.hf_hub_download(repository, name, revision=revision))
    except ArtifactError:
        raise
    except Exception as error:  # its own classes, those of its HTTP library, and OSError
        reason = printable(str(error).partition("\n")[0] or type(error).__name__)
        raise ArtifactError(f"{name} is not in the cache and cannot be downloaded ({reason})") from None
