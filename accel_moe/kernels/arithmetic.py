"""Whole numbers that a launch needs. Triton's own functions of these names can be traced, too, and take ten times as
long."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is n or more; 1 for n <= 1."""
    return 1 << max(0, n - 1).bit_length()
