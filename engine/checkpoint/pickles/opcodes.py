"""The opcodes of pickles, protocols 0 to 5: what each does to a machine.

Names by https://docs.python.org/3/library/pickletools.html. What only Python's own unpickler can do, a registry of its
process or buffers beside the pickle, is refused.
"""

import struct
from collections.abc import Callable

from mergemill.engine.checkpoint.pickles.machine import MOST_DIGITS, MOST_VALUES, Machine, Rules
from mergemill.engine.checkpoint.pickles.reader import Reader
from mergemill.engine.checkpoint.pickles.values import Left, PickledName, Value, describe

MOST_OPCODES = 10_000_000


def unpickle(reader: Reader, rules: Rules) -> Value:
    """Return the value of the pickle that is next; the reader then stands behind it."""
    machine = Machine(reader, rules)
    for _ in range(MOST_OPCODES):
        opcode = reader.take(1)[0]
        if opcode == _STOP:
            return machine.pop()
        handle = _HANDLERS.get(opcode)
        if handle is None:
            raise machine.refuse(_FORBIDDEN.get(opcode, f"has the unknown opcode {opcode:#04x}"))
        handle(machine)
    raise machine.refuse(f"has more than {MOST_OPCODES} opcodes")


def _take_text(machine: Machine, size: int) -> None:
    try:
        machine.make(machine.reader.take(size).decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise machine.refuse("has a text that is no UTF-8") from None


def _take_old_text(machine: Machine, size: int) -> None:
    """Of Python 2: a text that is mostly one."""
    machine.make(machine.reader.take(size).decode("latin-1"))


def _take_long(machine: Machine, size: int) -> None:
    if size > MOST_DIGITS:
        raise machine.refuse(f"has a number of {size} bytes")
    machine.push(int.from_bytes(machine.reader.take(size), "little", signed=True))


def _take_int_line(machine: Machine) -> None:
    line = machine.reader.take_line()
    machine.push(line == b"01" if line in (b"00", b"01") else machine.parse_number(line))


def _take_float_line(machine: Machine) -> None:
    line = machine.reader.take_line()
    try:
        machine.push(float(line[: MOST_DIGITS + 1]))
    except ValueError:
        raise machine.refuse(f"has {line!r} for a number") from None


def _take_string_line(machine: Machine) -> None:
    line = machine.reader.take_line()
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"') or b"\\" in line:
        raise machine.refuse(f"has {line[:40]!r} for a text")
    machine.make(line[1:-1].decode("latin-1"))


def _take_unicode_line(machine: Machine) -> None:
    try:
        machine.make(machine.reader.take_line().decode("raw_unicode_escape"))
    except UnicodeDecodeError:
        raise machine.refuse("has a text that is none") from None


def _find(machine: Machine, module: Value, name: Value) -> Value:
    if not isinstance(module, str) or not isinstance(name, str):
        raise machine.refuse("computes the name of what it asks for")
    return machine.rules.find(module, name)


def _take_global(machine: Machine) -> Value:
    module, name = (machine.reader.take_line().decode("utf-8", "replace") for _ in range(2))
    return _find(machine, module, name)


def _find_on_stack(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(_find(machine, module, name))


def _call(machine: Machine, callee: Value, arguments: Value) -> None:
    if not isinstance(callee, PickledName):
        raise machine.refuse(f"calls {describe(callee)}")
    if not isinstance(arguments, tuple):
        raise machine.refuse(f"calls {callee.name} with {describe(arguments)} for arguments")
    machine.make(machine.rules.call(callee, arguments))


def _reduce(machine: Machine) -> None:
    arguments, callee = machine.pop(), machine.pop()
    _call(machine, callee, arguments)


def _new_with_keywords(machine: Machine) -> None:
    keywords, arguments, callee = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(keywords, dict) or not isinstance(arguments, tuple):
        raise machine.refuse("makes an object with odd arguments")
    _call(machine, callee, (*arguments, keywords) if keywords else arguments)


def _instantiate(machine: Machine) -> None:
    callee = _take_global(machine)
    _call(machine, callee, tuple(machine.pop_mark()))


def _make_object(machine: Machine) -> None:
    found = machine.pop_mark()
    if not found:
        raise machine.refuse("makes an object of nothing")
    _call(machine, found[0], tuple(found[1:]))


def _build(machine: Machine) -> None:
    """Give a value its state: attributes of a dictionary, and what was left out, which stays so."""
    machine.pop()
    found = machine.top()
    if not isinstance(found, dict | Left):
        raise machine.refuse(f"sets the state of {describe(found)}")


def _set_items(machine: Machine, items: list[Value]) -> None:
    found = machine.top()
    if isinstance(found, Left):
        return
    if not isinstance(found, dict) or len(items) % 2:
        raise machine.refuse(f"sets items of {describe(found)}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, str | int):  # what has another key has no name as a tensor has one
            found[key] = value


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    _set_items(machine, [key, value])


def _append(machine: Machine, items: list[Value]) -> None:
    found = machine.top()
    if isinstance(found, Left):
        return
    if not isinstance(found, list):
        raise machine.refuse(f"appends to {describe(found)}")
    found += items


def _make_dict(machine: Machine) -> None:
    items = machine.pop_mark()
    machine.make({})
    _set_items(machine, items)


def _make_frozen_set(machine: Machine) -> None:
    machine.pop_mark()
    machine.make(Left("a set"))


def _make_tuple(machine: Machine, count: int) -> None:
    items = [machine.pop() for _ in range(count)]
    machine.make(tuple(reversed(items)))


def _mark(machine: Machine) -> None:
    machine.count()
    machine.below.append(machine.stack)
    machine.stack = []


def _pop_any(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.pop_mark()


def _get(machine: Machine, key: int) -> None:
    if key not in machine.memo:
        raise machine.refuse(f"takes {key} from its memo, which does not have it")
    machine.push(machine.memo[key])


def _put(machine: Machine, key: int) -> None:
    machine.memo[key] = machine.top()
    if len(machine.memo) > MOST_VALUES:
        raise machine.refuse(f"has more than {MOST_VALUES} places in its memo")


def _check_protocol(machine: Machine) -> None:
    if (protocol := machine.take_number(1)) > 5:
        raise machine.refuse(f"is of protocol {protocol}; known are 0 to 5")


_STOP = ord(".")
_HANDLERS: dict[int, Callable[[Machine], None]] = {
    0x80: _check_protocol,
    0x95: lambda m: void(m.reader.take(8)),  # FRAME: how much could be read ahead
    # values
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): _take_int_line,
    ord("L"): lambda m: m.push(m.take_word()),
    ord("J"): lambda m: m.push(int.from_bytes(m.reader.take(4), "little", signed=True)),
    ord("K"): lambda m: m.push(m.take_number(1)),
    ord("M"): lambda m: m.push(m.take_number(2)),
    0x8A: lambda m: _take_long(m, m.take_number(1)),
    0x8B: lambda m: _take_long(m, m.take_number(4)),
    ord("F"): _take_float_line,
    ord("G"): lambda m: m.push(struct.unpack(">d", m.reader.take(8))[0]),
    ord("S"): _take_string_line,
    ord("T"): lambda m: _take_old_text(m, m.take_number(4)),
    ord("U"): lambda m: _take_old_text(m, m.take_number(1)),
    ord("V"): _take_unicode_line,
    ord("X"): lambda m: _take_text(m, m.take_number(4)),
    0x8C: lambda m: _take_text(m, m.take_number(1)),
    0x8D: lambda m: _take_text(m, m.take_number(8)),
    ord("B"): lambda m: m.make(m.reader.take(m.take_number(4))),
    ord("C"): lambda m: m.make(m.reader.take(m.take_number(1))),
    0x8E: lambda m: m.make(m.reader.take(m.take_number(8))),
    0x96: lambda m: m.make(m.reader.take(m.take_number(8))),  # BYTEARRAY8, which nothing here changes
    # containers
    ord("}"): lambda m: m.make({}),
    ord("]"): lambda m: m.make([]),
    ord(")"): lambda m: m.push(()),
    0x8F: lambda m: m.make(Left("a set")),
    ord("d"): _make_dict,
    ord("l"): lambda m: m.make(m.pop_mark()),
    ord("t"): lambda m: m.make(tuple(m.pop_mark())),
    0x85: lambda m: _make_tuple(m, 1),
    0x86: lambda m: _make_tuple(m, 2),
    0x87: lambda m: _make_tuple(m, 3),
    0x91: _make_frozen_set,
    0x90: lambda m: _append(m, m.pop_mark()),
    ord("a"): lambda m: _append(m, [m.pop()]),
    ord("e"): lambda m: _append(m, m.pop_mark()),
    ord("s"): _set_item,
    ord("u"): lambda m: _set_items(m, m.pop_mark()),
    # stack and memo
    ord("("): _mark,
    ord("0"): _pop_any,
    ord("1"): lambda m: void(m.pop_mark()),
    ord("2"): lambda m: m.push(m.top()),
    ord("g"): lambda m: _get(m, m.take_word()),
    ord("h"): lambda m: _get(m, m.take_number(1)),
    ord("j"): lambda m: _get(m, m.take_number(4)),
    ord("p"): lambda m: _put(m, m.take_word()),
    ord("q"): lambda m: _put(m, m.take_number(1)),
    ord("r"): lambda m: _put(m, m.take_number(4)),
    0x94: lambda m: _put(m, len(m.memo)),
    # names and calls
    ord("c"): lambda m: m.push(_take_global(m)),
    0x93: _find_on_stack,
    ord("R"): _reduce,
    0x81: _reduce,  # NEWOBJ
    0x92: _new_with_keywords,
    ord("i"): _instantiate,
    ord("o"): _make_object,
    ord("b"): _build,
    ord("Q"): lambda m: m.make(m.rules.load(m.pop())),
}
_FORBIDDEN = {
    0x82: "asks for an extension of copyreg, by a number that means what the reader's process says",
    0x83: "asks for an extension of copyreg, by a number that means what the reader's process says",
    0x84: "asks for an extension of copyreg, by a number that means what the reader's process says",
    0x97: "asks for a buffer from outside of it",
    0x98: "asks for a buffer from outside of it",
    ord("P"): "has a persistent id that is a line of text; storages have tuples",
}


def void(*_: object) -> None:
    """Leave what was given."""
