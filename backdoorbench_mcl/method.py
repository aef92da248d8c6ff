"""`Method`: the root of every plugin class. Its keyword-only constructor is its option schema.

Annotations carry the bounds (`temperature: Annotated[float, Gt(0)] = 0.5`), pydantic checks them at
construction, and `params` gives back every resolved value. Free of torch.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from abc import ABC
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from .errors import PluginError, UserError

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Rate = Annotated[float, Interval(ge=0, le=1)]
Count = Annotated[int, Ge(1)]
Label = Annotated[int, Ge(0)]
Knowledge = Literal["target", "location", "trigger", "suspect"]


def _as_typed(value: object) -> object:
    """On a command line `true` is a value like 1; where a method's name is expected it is a name."""
    return str(value).lower() if isinstance(value, bool) else value


Selector = Annotated[str, BeforeValidator(_as_typed)]  # the selection of another method: `nc-box(lr=0.01)`, `true`


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _none_may_be_a_word(cls, given: Any) -> Any:
        """On a command line `none` is no value; where it is one of the words that may be given, it is that word."""
        words = {
            name for name, field in cls.model_fields.items()
            if typing.get_origin(field.annotation) is Literal and "none" in typing.get_args(field.annotation)
        }  # fmt: skip
        if not isinstance(given, Mapping):
            return given
        return {name: "none" if value is None and name in words else value for name, value in given.items()}


@functools.cache
def schema(cls: type[Method]) -> type[BaseModel]:
    """The pydantic model of a class's constructor; field names, annotations, bounds and defaults are its own.

    Raises PluginError where the constructor has positional, variadic or unannotated parameters.
    """
    init = inspect.unwrap(cls.__init__)
    if init is object.__init__:
        return create_model(cls.__name__, __base__=_Strict)
    try:
        hints = typing.get_type_hints(init, include_extras=True)
    except NameError as error:
        raise PluginError(f"{_where(cls)}: an annotation of the constructor cannot be resolved: {error}") from error
    columns: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(init).parameters.items())[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise PluginError(
                f"{_where(cls)}: parameter {name!r} must be keyword-only: def __init__(self, *, {name}: ...)"
            )
        if name not in hints:
            raise PluginError(
                f"{_where(cls)}: parameter {name!r} needs a type annotation, its bounds included, "
                f"as in `{name}: Rate = 0.3`; Rate, Positive, Count and others are in backdoorbench_mcl.api"
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        columns[name] = (hints[name], default)
    made = create_model(cls.__name__, __base__=_Strict, **columns)
    _check_defaults(cls, made, {name: value for name, (_, value) in columns.items()})
    return made


def _check_defaults(cls: type, model: type[BaseModel], defaults: Mapping[str, Any]) -> None:
    """Raises PluginError for a default that could not be typed. None, whatever the annotation, stands for nothing."""
    given = {name: value for name, value in defaults.items() if value is not None and value is not ...}
    try:
        model(**{name: value for name, value in given.items() if not isinstance(value, FieldInfo)})
    except ValidationError as error:
        wrong = [item for item in error.errors() if item["type"] != "missing"]
        if wrong:
            name, message = ".".join(map(str, wrong[0]["loc"])), wrong[0]["msg"]
            raise PluginError(
                f"{_where(cls)}: the default {name}={wrong[0]['input']!r} is not what its annotation allows: {message}"
            ) from error


def _where(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def explain(label: str, error: ValidationError, known: Collection[str] = ()) -> str:
    """One line for a pydantic error: what was given, what was expected. known: the parameters that there are.

    Example: `mcldef: temperature=-1: Input should be greater than 0`
    """
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(known) or 'none'}"
            parts.append(f"no parameter {name!r}; {hint}")
        elif item["type"] == "missing":
            parts.append(f"needs a value for {name!r}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            parts.append(f"{name}={item['input']!r}: {message}")
    return f"{label}: " + "; ".join(parts)


def _validated(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Method, **given: Any) -> None:
        if "_params" not in self.__dict__:  # the outermost constructor of a class hierarchy speaks for the object
            cls = type(self)
            try:
                checked = schema(cls)(**given)
            except ValidationError as error:
                known = list(schema(cls).model_fields)
                raise UserError(explain(getattr(cls, "name", cls.__name__), error, known)) from None
            given = {name: getattr(checked, name) for name in type(checked).model_fields}
            self.__dict__["_params"] = dict(given)
        init(self, **given)

    return wrapper


class Method(ABC):
    """Anything that a plugin offers: a data set, attack, model, inverter, defense or training recipe.

    Config goes into the keyword-only, annotated constructor, which stores and validates and does no work;
    data comes in the call. The constructor raises UserError for a value that its annotation forbids.

    Attributes:
        name: the registered (family) name.
        version: raise it whenever results change, and say by how much.
        paper: citation.
        added: parameters that came later, with the value that reproduces the old behaviour; at that value they stay
            out of the identity, so that stored results remain valid.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    added: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _validated(cls.__init__)  # type: ignore[method-assign]

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter of the constructor with its resolved value."""
        return dict(self.__dict__.get("_params", {}))

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}={value!r}" for name, value in self.params.items())
        return f"{type(self).__name__}({inner})"

    @classmethod
    def parse(cls, text: str) -> dict[str, Any]:
        """Constructor parameters behind a family's suffix: `"-16-1"` of `wrn-16-1`, `":PATH"` of `parquet:PATH`.

        Raises UserError by default: a method that is no family takes no suffix.
        """
        raise UserError(f"{cls.name!r} takes no suffix, but {cls.name + text!r} was given; write {cls.name!r}")


__all__ = [
    "Count", "Ge", "Gt", "Interval", "Knowledge", "Label", "Le", "Lt", "Method", "NonNegative", "Positive", "Rate",
    "Selector", "explain", "schema",
]  # fmt: skip
