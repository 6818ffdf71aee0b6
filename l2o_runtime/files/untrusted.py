"""Text out of files that may be damaged or hostile: strict JSON, and what of it is fit for a message."""

import json
import math
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 64
"""Nesting of JSON; far below what makes a recursive reader or writer fail."""


def parse_json(text: str) -> Any:
    """Read strict JSON: no key twice in an object, no NaN, no infinity, at most `MAX_DEPTH` levels.

    Raises:
        ValueError: it is not that.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def canonical(value: Any) -> str:
    """The one way to write `value` as JSON: keys sorted, no spaces, ASCII.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def printable(text: object, limit: int = 300) -> str:
    """Anything out of a file, fit for a message: control characters and surrogates escaped, cut.

    >>> printable("l2o-rule/9" + chr(27))
    'l2o-rule/9\\\\x1b'
    >>> printable("abc", limit=2)
    'ab…'
    """
    escaped = repr(str(text))[1:-1]
    return escaped if len(escaped) <= limit else escaped[:limit] + "…"


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return result


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{printable(text, 80)} is not a finite number")
    return number
