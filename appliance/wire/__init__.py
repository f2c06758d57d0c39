"""Bytes to frozen values and back. No I/O, no clock, no randomness, no policy.

Every parser here is bounded, accepts no trailing byte and raises nothing but `Malformed`.
"""
