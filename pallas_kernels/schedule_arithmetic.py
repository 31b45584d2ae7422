"""The scalar core's arithmetic, in Python; None stands for a value that depends on data."""


def _signed(value: int) -> int:
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _narrow(function):
    """32-bit arithmetic where the operands are numbers, plain where one is an address."""

    def call(a, b):
        if a is None or b is None:
            return None
        value = function(a, b)
        if -(1 << 32) < a < 1 << 32 and -(1 << 32) < b < 1 << 32:
            return _signed(value)
        return value

    return call


def _known(function):
    return lambda a, b: None if a is None or b is None else function(a, b)


def _nand(a, b):
    if a is False or b is False:
        return True
    return None if a is None or b is None else False


def _disj(a, b):
    if a is True or b is True:
        return True
    return None if a is None or b is None else False


def _not(a):
    return None if a is None else not a


def _select(predicate, on_true, on_false):
    if predicate is None:
        return on_true if on_true == on_false else None
    return on_true if predicate else on_false


def _unsigned(a: int) -> int:
    return a % (1 << 32) if -(1 << 32) < a < 1 << 32 else a


FUNCTIONS = {
    'same': lambda a: a,
    'add': _narrow(lambda a, b: a + b),
    'sub': _narrow(lambda a, b: a - b),
    'mul': _narrow(lambda a, b: a * b),
    'mulhi': _known(lambda a, b: _unsigned(a) * _unsigned(b) >> 32),
    'band': _narrow(lambda a, b: a & b),
    'bor': _narrow(lambda a, b: a | b),
    'bxor': _narrow(lambda a, b: a ^ b),
    'shl': _narrow(lambda a, b: a << b),
    'shr': _narrow(lambda a, b: _unsigned(a) >> b),
    'sar': _narrow(lambda a, b: a >> b),
    'larger': _known(max),
    'smaller': _known(min),
    'select': _select,
    'nand': _nand,
    'conj': lambda a, b: _not(_nand(a, b)),
    'disj': _disj,
    'nor': lambda a, b: _not(_disj(a, b)),
    'differ': _known(lambda a, b: a != b),
    'neg': _not,
    'eq': _known(lambda a, b: a == b),
    'ne': _known(lambda a, b: a != b),
    'lt': _known(lambda a, b: a < b),
    'le': _known(lambda a, b: a <= b),
    'gt': _known(lambda a, b: a > b),
    'ge': _known(lambda a, b: a >= b),
    'ltu': _known(lambda a, b: _unsigned(a) < _unsigned(b)),
    'geu': _known(lambda a, b: _unsigned(a) >= _unsigned(b)),
}
