"""Adaptive arithmetic coding in exact integers: no float, no rounding, nothing that a version or machine could change.

Symbols narrow an interval of fractions by how often each was seen so far, and a fraction in it, in as few bytes as its
length asks for, is the code. Runs are coded apart, so that integers stay short; what was counted stays with them.
"""

import numpy as np

_RUN = 1024  # symbols: integers of some 10,000 bits
_LONGEST = 4 * _RUN  # bytes of a run: a symbol in 2^32 would not take more


def encode_symbols(symbols: np.ndarray, alphabet: int) -> bytes:
    """The code of symbols [N], integers in [0, alphabet)."""
    counts, code = [1] * alphabet, b""
    for start in range(0, len(symbols), _RUN):
        low, width, whole = 0, 1, 1  # the interval from low / whole, width / whole long
        for symbol in symbols[start : start + _RUN].tolist():
            total = sum(counts)
            low = low * total + width * sum(counts[:symbol])
            width *= counts[symbol]
            whole *= total
            counts[symbol] += 1
        length = max(whole.bit_length() - width.bit_length() - 1, 0) // 8
        while (number := -(-(low << 8 * length) // whole)) * whole >= (low + width) << 8 * length:
            length += 1
        code += length.to_bytes(2, "little") + number.to_bytes(length, "little")
    return code


def decode_symbols(code: bytes, count: int, alphabet: int) -> tuple[np.ndarray, int]:
    """What `encode_symbols` coded, int64 [N], and how many bytes of the code that took.

    Args:
        code: bytes, which may go on after it.
        count: N.
        alphabet: as it was coded with.

    Raises:
        ValueError: the code ends too early.
    """
    if -(-count // _RUN) * 2 > len(code):
        raise ValueError(f"{len(code)} bytes for {count} symbols")
    counts, symbols, at = [1] * alphabet, np.zeros(count, np.int64), 0
    for start in range(0, count, _RUN):
        length = int.from_bytes(code[at : at + 2], "little")
        at += 2 + length
        if at > len(code) or length > _LONGEST:
            raise ValueError(f"a run of {length} bytes in {len(code)}")
        # part / whole points to the rest.
        part, whole = int.from_bytes(code[at - length : at], "little"), 1 << 8 * length
        for place in range(start, min(start + _RUN, count)):
            total = sum(counts)
            part, below, symbol = part * total, 0, 0
            while (below + counts[symbol]) * whole <= part:
                below += counts[symbol]
                symbol += 1
            part, whole = part - below * whole, whole * counts[symbol]
            symbols[place] = symbol
            counts[symbol] += 1
    return symbols, at
