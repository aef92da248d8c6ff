"""What a pickle says, without doing any of it: a stack machine that imports nothing and calls nothing.

A pickle is a program. `read` follows it on paper: where it would import a class there is a `Name`, where it would call
one a `Call`, with the state that it would be given. So whatever a stranger wrote, the result is made of dicts, lists,
tuples, numbers and text, and of records that say what was asked for. Free of torch.

The work is bounded by the length of the pickle and by `MOST` steps: no opcode here does more than look at what it takes
from the stack, keys of dicts are numbers and text (hashing a tuple of tuples can take for ever), and memory is never
reserved for a size that is only claimed.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from io import BytesIO
from typing import Any

MOST_KEY = 200  # characters
MOST = 1_000_000  # opcodes: a second or two; the state dict of a network of 1,000 tensors has about 30,000

_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8",
})  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_DICTS = (("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "dict"), ("__builtin__", "dict"))


class Malformed(ValueError):
    """No pickle, or one that asks for what is not followed."""


@dataclass(frozen=True, eq=False)
class Name:
    """A class or function that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def path(self) -> tuple[str, str]:
        """(module, name)."""
        return self.module, self.name


@dataclass(eq=False)
class Call:
    """A call that the pickle would make. function: mostly a `Name`; args: what it would be given; state: what the
    object would be told afterwards.
    """

    function: Any
    args: tuple[Any, ...]
    state: Any = None


@dataclass(frozen=True, eq=False)
class Stored:
    """Something outside the pickle, by what the pickle calls it."""

    what: Any


def read(stream: BytesIO) -> tuple[Any, list[Stored]]:
    """The value of the pickle at the stream's position, and everything outside of it that it names, in order.

    The stream then stands behind the pickle. Raises Malformed for anything else than a whole pickle.
    Example: `read(BytesIO(pickle.dumps({"a": 1})))[0]` is `{"a": 1}`.
    """
    machine = _Machine()
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step >= MOST:
                raise Malformed(f"a pickle of more than {MOST:,} steps")
            if opcode.name == "STOP":
                return machine.stack.pop(), machine.stored
            machine.step(opcode.name, argument)
    except Malformed:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise Malformed(f"no whole pickle ({error})") from error
    raise Malformed("a pickle without an end")


class _Machine:
    """stack, memo and marks are those of the pickle format."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.stored: list[Stored] = []

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode."""
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            return
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "POP":  # a mark counts as something to take away
            _ = self._marked() if self.marks and self.marks[-1] == len(stack) else stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "BUILD"):
            self._object(name, argument)
        elif name in ("PERSID", "BINPERSID"):
            self.stored.append(Stored(argument if name == "PERSID" else stack.pop()))
            stack.append(self.stored[-1])
        else:
            self._container(name)

    def _marked(self) -> list[Any]:
        """What lies above the last mark, taken away."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _object(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(str(module), str(attribute)))
        elif name == "INST":
            stack.append(_called(Name(*argument.split(" ", 1)), tuple(self._marked())))
        elif name == "OBJ":
            cls, *args = self._marked()
            stack.append(_called(cls, tuple(args)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Call):  # that of a dict is of no interest
                stack[-1].state = state
        else:
            if name == "NEWOBJ_EX":
                stack.pop()
            args = stack.pop()
            stack.append(_called(stack.pop(), args if isinstance(args, tuple) else (args,)))

    def _container(self, name: str) -> None:
        stack = self.stack
        if name == "EMPTY_DICT":
            stack.append({})
        elif name in ("EMPTY_LIST", "EMPTY_SET"):  # a set is kept as a list: its members may be beyond hashing
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise Malformed("no whole pickle (a tuple of nothing)")
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(self._marked())
        elif name == "DICT":
            pairs = self._marked()
            stack.append({})
            _put(stack[-1], pairs)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            _put(stack[-1], pairs)
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        else:
            raise Malformed(f"a pickle with the opcode {name}, which no weights need")


def _put(into: Any, pairs: list[Any]) -> None:
    """Keys and values, by turns, into a dict; of other objects the items are of no interest. A key may not come twice:
    who reads the file elsewhere could see the other value.
    """
    if not isinstance(into, dict):
        return
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        key = _bytes(key)
        if not isinstance(key, str | int | float | bytes | None):
            continue
        if key in into:
            raise Malformed(f"the key {str(key)[:80]!r} twice")
        into[key] = value


def _bytes(key: Any) -> Any:
    """Short bytes as Python 3 spells them in old protocols, a text to be encoded; every other key as it is. Long texts
    are left alone: one that is named again and again would be copied each time.
    """
    if not isinstance(key, Call) or str(key.function) != "_codecs.encode" or key.args[1:] != ("latin1",):
        return key
    text = key.args[0]
    return text.encode("latin1") if isinstance(text, str) and len(text) <= MOST_KEY else key


def _called(function: Any, args: tuple[Any, ...]) -> Any:
    if isinstance(function, Name) and function.path in _DICTS:
        made: dict[Any, Any] = {}
        items = args[-1] if args and isinstance(args[-1], list) else []
        _put(made, [part for item in items if isinstance(item, list | tuple) and len(item) == 2 for part in item])
        return made
    return Call(function, args)


__all__ = ["MOST", "Call", "Malformed", "Name", "Stored", "read"]
