"""What simulated hardware can be told to do wrong: `[attestation] simulated_fault`.

One table for the tests, the documentation and the check of the configuration.
"""

from __future__ import annotations

from enum import StrEnum

from appliance.errors import ConfigError


class Fault(StrEnum):
    """A fault, by the name that the configuration gives it."""

    NONE = "none"
    GPU_ABSENT = "gpu_absent"
    GPU_HANG = "gpu_hang"
    GPU_CRASH = "gpu_crash"
    GPU_ERROR = "gpu_error"
    GPU_ERROR_ONCE = "gpu_error_once"
    GPU_VANISHES = "gpu_vanishes"
    GPU_GARBAGE = "gpu_garbage"
    GPU_SHORT_REPORT = "gpu_short_report"
    GPU_WRONG_NONCE = "gpu_wrong_nonce"
    GPU_BAD_SIGNATURE = "gpu_bad_signature"
    GPU_MEASUREMENT_MISMATCH = "gpu_measurement_mismatch"
    GPU_EXPIRED_CHAIN = "gpu_expired_chain"
    GPU_CC_OFF = "gpu_cc_off"
    GPU_DEV_TOOLS = "gpu_dev_tools"
    CPU_ABSENT = "cpu_absent"
    CPU_HANG = "cpu_hang"
    CPU_ERROR = "cpu_error"
    CPU_WRONG_REPORT_DATA = "cpu_wrong_report_data"
    CPU_BAD_SIGNATURE = "cpu_bad_signature"
    CPU_DEBUG = "cpu_debug"


MEANING: dict[Fault, str] = {
    Fault.NONE: "nothing",
    Fault.GPU_ABSENT: "there is no GPU: inventory and evidence say so",
    Fault.GPU_HANG: "a report is asked for and never comes",
    Fault.GPU_CRASH: "asked for a report, the driver takes the collector's process with it",
    Fault.GPU_ERROR: "every report ends in a device error",
    Fault.GPU_ERROR_ONCE: "the first report ends in a device error, the next ones do not",
    Fault.GPU_VANISHES: "from the second report on the last GPU is gone",
    Fault.GPU_GARBAGE: "the report is random bytes",
    Fault.GPU_SHORT_REPORT: "the report lacks its last byte",
    Fault.GPU_WRONG_NONCE: "the report is about another nonce, and authentic",
    Fault.GPU_BAD_SIGNATURE: "one bit of the report's signature is flipped",
    Fault.GPU_MEASUREMENT_MISMATCH: "one measurement differs from the reference value, and is signed",
    Fault.GPU_EXPIRED_CHAIN: "the device's certificates ran out in 2021",
    Fault.GPU_CC_OFF: "the driver says that confidential computing is off",
    Fault.GPU_DEV_TOOLS: "the driver says that developer tools mode is on",
    Fault.CPU_ABSENT: "there is no TEE: evidence ends with that",
    Fault.CPU_HANG: "a report is asked for and never comes",
    Fault.CPU_ERROR: "every report ends in a device error",
    Fault.CPU_WRONG_REPORT_DATA: "the report is about other data, and authentic",
    Fault.CPU_BAD_SIGNATURE: "one bit of the report's signature is flipped",
    Fault.CPU_DEBUG: "the guest's policy allows debugging, and is signed",
}


def parse_fault(name: str) -> Fault:
    """The fault of this name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return Fault(name)
    except ValueError:
        known = ", ".join(Fault)
        raise ConfigError(
            f"[attestation] simulated_fault: unknown `{name}`, expected one of {known}"
        ) from None
