"""Steering: policies over SAE features, and the adapters that apply them to running models."""

from fastsae.steering.dose import Dose
from fastsae.steering.hf import SteeringHandle, attach, steer
from fastsae.steering.policy import (
    Policy,
    ablate,
    add,
    amplify,
    calibrate,
    enforce,
    gate,
)

__all__ = [
    "Dose",
    "Policy",
    "SteeringHandle",
    "ablate",
    "add",
    "amplify",
    "attach",
    "calibrate",
    "enforce",
    "gate",
    "steer",
]
