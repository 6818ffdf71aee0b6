"""Frozen, keyword-only configuration, and how it is read from JSON or TOML.

Every configuration of the project is a dataclass that checks itself in `__post_init__`. `build` turns a
plain mapping (parsed JSON, TOML, `--set key=value`) into one and refuses anything it does not know.
"""

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union

T = TypeVar("T")

MAX_NUMBERS = 2**22
"""Bound on what grows with a product of sizes: weights of a network, numbers in a window. 16 MiB of float32."""

LATER = {"later": True}
"""Metadata of a field that is younger than the format of the files."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


class ConfigError(ValueError):
    """A configuration value is unknown, of the wrong type or out of range."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def nearest(word: str, known: list[str]) -> str:
    """Name the known words closest to `word`, for the end of an error message.

    >>> nearest("epoch", ["epochs", "seed"])
    'did you mean epochs?'
    >>> nearest("zzz", ["epochs", "seed"])
    'known: epochs, seed'
    """
    close = difflib.get_close_matches(word[:80], known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


def build(kind: type[T], data: Any, path: str = "") -> T:
    """Build the dataclass `kind` from the mapping `data`, strictly.

    Args:
        kind: a dataclass; its fields may be scalars, literals, tuples, mappings, other dataclasses, and
            unions of dataclasses told apart by the key `kind`.
        data: what JSON or TOML gave.
        path: where `data` stands in the whole, for messages ("rule.context.").

    Raises:
        ConfigError: an unknown key (with the nearest known ones), a missing key, a wrong type, or a value
            that the dataclass itself refuses.
    """
    require(isinstance(data, Mapping), f"{path or 'configuration'}: expected a table of keys, got {_repr.repr(data)}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == "kind" and "kind" not in fields:
            continue
        require(key in fields, f"unknown key {path}{key}: {nearest(str(key), sorted(fields))}")
        values[key] = _convert(hints[key], value, f"{path}{key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(name in values or not required, f"missing key {path}{name}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def build_union(union: Any, data: Any, path: str = "") -> Any:
    """`build` of the member of a union that `data` names by its `kind`.

    Raises:
        ConfigError: as `build` does, or there is no such kind.
    """
    return _convert_union(typing.get_args(union), data, path)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Check `value` against one type hint; the few shapes that configurations use."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        require(value in allowed, f"{path}: {_repr.repr(value)} is not one of {', '.join(map(str, allowed))}")
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{path}: expected a list, got {_repr.repr(value)}")
        inner = typing.get_args(hint)[0]
        return tuple(_convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type[Any], hint), value, f"{path}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 2**53, f"{path}: {_repr.repr(value)} is too large for a number")
        return float(value)
    exact = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
    require(exact, f"{path}: expected {hint.__name__}, got {_repr.repr(value)}")
    require(hint is not float or math.isfinite(value), f"{path}: expected a finite number, got {value}")
    return value


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    """A union is either `X | None` or several dataclasses, each with a class attribute `kind`."""
    if type(None) in options:
        if value is None:
            return None
        (only,) = [option for option in options if option is not type(None)]
        return _convert(only, value, path)
    place = path or "configuration"
    require(isinstance(value, Mapping), f"{place}: expected a table with a key `kind`, got {_repr.repr(value)}")
    kinds = {option.kind: option for option in options}
    chosen, inside = value.get("kind"), f"{path}." if path else ""
    require("kind" in value, f"missing key {inside}kind: one of {', '.join(sorted(kinds))}")
    require(
        isinstance(chosen, str) and chosen in kinds,
        f"{inside}kind: {_repr.repr(chosen)} is not one of {', '.join(sorted(kinds))}",
    )
    return build(kinds[chosen], value, inside)


def to_dict(config: Any) -> dict[str, Any]:
    """The mapping from which `build` makes `config` again (union members carry their `kind`).

    A field marked `LATER` is left out at its default: what an older version wrote is written again as it was, and an
    older version reads what does without the field.
    """
    result: dict[str, Any] = {}
    if isinstance(getattr(config, "kind", None), str):
        result["kind"] = config.kind
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not (LATER.items() <= field.metadata.items() and value == field.default):
            result[field.name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """The window of snapshots that DMD and KAE look at.

    Attributes:
        window: m ≥ 2; the window holds m + 1 snapshots, that is m transitions.
        sketch: None keeps every coordinate of every snapshot (exact); an integer d keeps a CountSketch of d
            numbers for each snapshot instead, so that memory does not depend on the number of coordinates.
    """

    window: int = 20
    sketch: int | None = None

    def __post_init__(self) -> None:
        require(2 <= self.window <= 1024, f"window: must be in 2..1024, got {self.window}")
        if self.sketch is not None:
            require(8 <= self.sketch <= 65536, f"sketch: must be in 8..65536 or absent, got {self.sketch}")
            numbers = (self.window + 1) * self.sketch
            require(numbers <= MAX_NUMBERS, f"sketch: (window + 1) · sketch is {numbers}, more than {MAX_NUMBERS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoneConfig:
    """No context: every coordinate sees only its own gradient."""

    kind: ClassVar[str] = "none"
    width: ClassVar[int] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceboConfig:
    """Zeros of a given width: the control against which a context has to prove itself."""

    kind: ClassVar[str] = "placebo"
    width: int = 2

    def __post_init__(self) -> None:
        require(1 <= self.width <= 1024, f"width: must be in 1..1024, got {self.width}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlagConfig:
    """1 once a window would be full, else 0: the control for what a context gives away about the time alone.

    Attributes:
        window: m of the window in question; it is full when m + 1 snapshots were seen.
    """

    kind: ClassVar[str] = "flag"
    width: ClassVar[int] = 1
    window: int = 20

    def __post_init__(self) -> None:
        require(2 <= self.window <= 1024, f"window: must be in 2..1024, got {self.window}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMDConfig(WindowConfig):
    """Eigenvalues of Dynamic Mode Decomposition.

    Attributes:
        rank: R, the number of modes kept; at most `window` (`window` − 1 for differences) and, for losses, `delay`.
        snapshots: "theta" takes s = [θ; L] as in the paper, "delta" its successive differences, "gradient" s = [g; L],
            "loss" the last losses alone, s_k = [L_{k−q+1} … L_k], which costs nothing per coordinate.
        features: "raw" gives Re λ and Im λ; "scaled" gives m·log|λ| and m·arg λ (they spread out what
            clusters at 1), the relative residual of the fit and a ready flag.
        every: recompute the eigenvalues every so many steps and hold them in between.
        delay: q, the number of losses in a snapshot; only with "loss".
    """

    kind: ClassVar[str] = "dmd"
    rank: int = 1
    snapshots: Literal["theta", "delta", "gradient", "loss"] = "theta"
    features: Literal["raw", "scaled"] = "scaled"
    every: int = 1
    delay: int = dataclasses.field(default=10, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.snapshots == "loss":
            require(1 <= self.delay <= 1024, f"delay: must be in 1..1024, got {self.delay}")
            require(self.rank <= self.delay, f"rank: {self.rank} is larger than the delay {self.delay}")
            require(self.sketch is None, f"sketch: a snapshot of losses has no coordinates, leave out {self.sketch}")
        else:
            unused = self.delay == type(self).delay
            require(
                unused, f'delay: only snapshots "loss" have one, these are "{self.snapshots}"; leave out {self.delay}'
            )
        require(1 <= self.rank <= 16, f"rank: must be in 1..16, got {self.rank}")
        transitions = self.window - (self.snapshots == "delta")
        require(self.rank <= transitions, f"rank: {self.rank} is larger than the window's {transitions} columns")
        require(1 <= self.every <= 10**6, f"every: must be in 1..{10**6}, got {self.every}")

    @property
    def width(self) -> int:
        """Number of features: Re λ and Im λ, or log-modulus and angle with residual and ready flag."""
        return 2 * self.rank + 2 * (self.features == "scaled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDMDConfig(DMDConfig):
    """A DMD for every tensor, each with a window of its own, seen by its tensor's network alone."""

    kind: ClassVar[str] = "tensor_dmd"
    snapshots: Literal["theta", "delta", "gradient"] = "theta"


@dataclasses.dataclass(frozen=True, kw_only=True)
class KAEConfig(WindowConfig):
    """Latent state of a Koopman autoencoder.

    Attributes:
        latent: size of ψ; even, because K is made of 2×2 blocks.
        hidden: width of the two hidden layers of encoder and decoder.
        radius: bound on |λ| of K, greater than 0.
        predict: number of linear prediction steps in the Koopman loss.
    """

    kind: ClassVar[str] = "kae"
    latent: int = 8
    hidden: int = 16
    radius: float = 1.05
    predict: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        even = 2 <= self.latent <= 256 and self.latent % 2 == 0
        require(even, f"latent: must be an even number in 2..256, got {self.latent}")
        require(1 <= self.hidden <= 1024, f"hidden: must be in 1..1024, got {self.hidden}")
        require(0 < self.radius <= 2, f"radius: must be in (0, 2], got {self.radius}")
        require(1 <= self.predict <= 100, f"predict: must be in 1..100, got {self.predict}")
        weights = 2 * self.hidden * (3 * self.window + self.hidden + self.latent)
        require(weights <= MAX_NUMBERS, f"hidden: the autoencoder has about {weights} weights, more than {MAX_NUMBERS}")

    @property
    def width(self) -> int:
        """Number of features: the latent state ψ."""
        return self.latent


ContextConfig = NoneConfig | PlaceboConfig | FlagConfig | DMDConfig | KAEConfig
"""What rules see of the whole optimization."""
