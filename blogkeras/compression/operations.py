"""Counts the floating-point operations of a program of XLA.

The program is read from its text, before XLA optimizes it: one computation is
a list of instructions, each with a type, operands and attributes.
"""

import dataclasses
import math
import operator
import re

# A loop that is longer than this is taken to be of unknown length.
MAX_ITERATIONS = 100_000

_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADING = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|called_computations)=\{?%?([\w.\-]+)")
_OPAQUE = re.compile(r"matmul|gemm|conv|attention|fmha|dot", re.IGNORECASE)
_COMPARISONS = {
    "EQ": operator.eq,
    "NE": operator.ne,
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
}
_ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_PASSED_ON = ("copy", "reshape", "convert", "bitcast", "broadcast", "transpose")


@dataclasses.dataclass(frozen=True)
class Operations:
    """A number of floating-point operations.

    Attributes:
        count: Number.
        exact: Boolean. False where it is a lower bound, because a loop of
            unknown length was counted once.
    """

    count: float
    exact: bool = True

    def __add__(self, other):
        return Operations(self.count + other.count, self.exact and other.exact)


def count_operations(text):
    """Operations of the matrix products and convolutions in a program of XLA.

    Two for each multiplication. Instructions that the result does not depend on
    are not counted. Of branches, the one with most operations counts. A loop
    counts as often as it runs, which is found by following its counter; a loop
    whose length depends on the data counts once, and then the number is a lower
    bound.

    Args:
        text: The program as `backend.hlo_text` gives it.

    Returns:
        `Operations`.
    """
    return _Program(text).total()


@dataclasses.dataclass(eq=False)
class _Instruction:
    name: str
    shape: tuple | None  # of an array; None of a tuple
    dtype: str
    operation: str
    operands: list
    literal: str
    attributes: str


class _Program:
    def __init__(self, text):
        self.computations, self.roots, self.entry = {}, {}, None
        current = None
        for line in map(str.strip, text.splitlines()):
            found = _INSTRUCTION.match(line)
            if found and current is not None:
                instruction = _parsed(found[2], found[3])
                self.computations[current][found[2]] = instruction
                if found[1]:
                    self.roots[current] = instruction
                continue
            heading = _HEADING.match(line)
            if heading and not line.startswith("HloModule"):
                current = heading[2]
                self.computations[current] = {}
                self.entry = current if heading[1] else self.entry
        self.counted = {}

    def total(self):
        return self.count(self.entry, ())

    def count(self, name, arguments):
        """Operations of one computation whose parameters may be known."""
        key = name, arguments
        if key not in self.counted:
            frame = _Frame(self, name, arguments)
            parts = map(frame.operations, frame.needed())
            self.counted[key] = sum(parts, Operations(0))
        return self.counted[key]


class _Frame:
    """One application of a computation.

    Its arguments are what is known of the parameters: an integer, a tuple of
    what is known of its elements, or None for what is not known.
    """

    def __init__(self, program, name, arguments):
        self.program, self.arguments = program, arguments
        self.instructions = program.computations[name]
        self.root = program.roots[name]
        self.values = {}

    def needed(self):
        """The instructions that the result depends on."""
        found, waiting = {}, [self.root]
        while waiting:
            instruction = waiting.pop()
            if instruction.name not in found:
                found[instruction.name] = instruction
                waiting += map(self.instructions.get, instruction.operands)
        return found.values()

    def operations(self, instruction):
        """Operations of one instruction, with all that it calls."""
        kind, attributes = instruction.operation, instruction.attributes
        known = tuple(map(self.value, instruction.operands))
        if kind == "dot":
            return Operations(self._dot(instruction))
        if kind == "convolution":
            return Operations(self._convolution(instruction))
        if kind == "ragged-dot":
            return Operations(0, exact=False)
        if kind == "while":
            return self._loop(
                _attribute(attributes, "condition"),
                _attribute(attributes, "body"),
                known[0],
            )
        if kind == "conditional":
            return self._branches(attributes, known)
        total = Operations(0)
        for name in _CALLED.findall(attributes):
            arguments = known if kind in ("call", "fusion") else ()
            total += self.program.count(name, arguments)
        if kind == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', attributes)
            total += Operations(0, not _OPAQUE.search(target[1]))
        return total

    def value(self, name):
        """What is known of an instruction's value."""
        if name not in self.values:
            self.values[name] = self._value(self.instructions[name])
        return self.values[name]

    def _value(self, x):
        kind, operands = x.operation, x.operands
        if kind == "parameter":
            number = int(x.literal)
            known = number < len(self.arguments)
            return self.arguments[number] if known else None
        if kind == "tuple":
            return tuple(map(self.value, operands))
        if kind == "get-tuple-element":
            whole = self.value(operands[0])
            number = int(_attribute(x.attributes, "index"))
            return whole[number] if isinstance(whole, tuple) else None
        if kind == "call":
            name = _attribute(x.attributes, "to_apply")
            arguments = tuple(map(self.value, operands))
            frame = _Frame(self.program, name, arguments)
            return frame.value(frame.root.name)
        if kind in ("copy", "opt-barrier") and x.shape is None:
            return self.value(operands[0])
        # Only single integers and booleans are followed.
        if x.shape != () or x.dtype[0] not in "sup":
            return None
        if kind == "constant":
            return (
                {"true": 1, "false": 0}.get(x.literal)
                if (x.dtype == "pred")
                else int(x.literal)
            )
        if kind in _PASSED_ON:
            return self.value(operands[0])
        if kind == "not":
            given = self.value(operands[0])
            return None if given is None else int(not given)
        if kind in _ARITHMETIC or kind == "compare":
            return self._computed(x)
        if kind == "select":
            chosen = self.value(operands[0])
            return (
                None
                if chosen is None
                else self.value(operands[1 if chosen else 2])
            )
        return None

    def _computed(self, x):
        left, right = map(self.value, x.operands)
        # False and anything is false, true or anything is true.
        if x.dtype == "pred" and x.operation in ("and", "or"):
            decisive = int(x.operation == "or")
            if decisive in (left, right):
                return decisive
        if left is None or right is None:
            return None
        if x.operation == "compare":
            direction = _attribute(x.attributes, "direction")
            return int(_COMPARISONS[direction](left, right))
        return _ARITHMETIC[x.operation](left, right)

    def _loop(self, condition, body, state):
        """A loop's operations, by running its counter."""
        once = self.program.count(body, ())
        test = self.program.count(condition, ())
        start, total = state, Operations(0)
        for iterations in range(MAX_ITERATIONS):
            frame = _Frame(self.program, condition, (state,))
            goes_on = frame.value(frame.root.name)
            if goes_on is None:
                break
            if not goes_on:
                tests = Operations((iterations + 1) * test.count, test.exact)
                if once.exact:
                    total = Operations(iterations * once.count)
                return total + tests
            if not once.exact:
                # A loop in it whose length may depend on this one's counter.
                total += self.program.count(body, (state,))
            frame = _Frame(self.program, body, (state,))
            state = frame.value(frame.root.name)
        once = self.program.count(body, (start,))
        return Operations(once.count + test.count, exact=False)

    def _branches(self, attributes, known):
        names = re.search(r"branch_computations=\{([^}]*)\}", attributes)
        if names:
            branches = [n.strip().lstrip("%") for n in names[1].split(",")]
        else:
            branches = [
                _attribute(attributes, f"{which}_computation")
                for which in ("true", "false")
            ]
        counts = [
            self.program.count(name, (argument,))
            for name, argument in zip(branches, known[1:], strict=True)
        ]
        exact = all(part.exact for part in counts)
        return Operations(max(part.count for part in counts), exact)

    def _dot(self, x):
        left = self.instructions[x.operands[0]].shape
        axes = _attribute(x.attributes, "lhs_contracting_dims")
        summed = math.prod(left[int(i)] for i in axes.split(",") if i)
        return 2 * math.prod(x.shape) * summed

    def _convolution(self, x):
        kernel = self.instructions[x.operands[1]].shape
        labels = re.search(r"dim_labels=\w+_(\w+)->", x.attributes)[1]
        summed = math.prod(kernel) // kernel[labels.index("o")]
        # A transposed convolution has zeros between the numbers of its input.
        if dilation := re.search(r"lhs_dilate=([\dx]+)", x.attributes):
            summed /= math.prod(map(int, dilation[1].split("x")))
        return 2 * math.prod(x.shape) * summed


def _parsed(name, text):
    """One instruction: `type operation(operands), attributes`."""
    if text.startswith("("):
        end = _closing(text, 0) + 1
    else:
        end = text.index(" ")
    array = re.match(r"(\w+)\[([\d,<=]*)\]", text)
    shape = None
    if array:
        sizes = [n.lstrip("<=") for n in array[2].split(",") if n]
        shape = tuple(map(int, sizes))
    rest = text[end:].strip()
    start = rest.index("(")
    end = _closing(rest, start)
    inside = rest[start + 1 : end]
    operands = re.findall(r"%([\w.\-]+)", inside)
    operation = rest[:start]
    if not operands and operation not in ("constant", "parameter"):
        operands = [part.strip() for part in inside.split(",") if part.strip()]
    return _Instruction(
        name,
        shape,
        array[1] if array else "",
        operation,
        operands,
        inside,
        rest[end + 1 :],
    )


def _closing(text, start):
    """Where the bracket that opens at `start` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(
        f"Expected an instruction of XLA on one line. Received: {text!r}"
    )


def _attribute(attributes, name):
    """An attribute's value: a word, or what is in its braces."""
    found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", attributes)
    return (found[1] if found[1] is not None else found[2]) if found else ""
