"""RFC 9334 as pure functions: evidence to claims (`schemes`), claims to a verdict (`policy`).

No I/O, clock, randomness or pinned root is reached from here: all of them are arguments.
"""
