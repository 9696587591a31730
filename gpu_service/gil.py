"""Giving way to another thread. Not compiled, or it would not do so."""


def give_way() -> None:
    """Let another thread have the GIL if it has waited for as long as the switch interval.

    The interpreter looks at each call of a function of Python; what is compiled never looks, and
    the device would wait until all of a batch are answered.
    """
