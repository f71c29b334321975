"""The run's configuration: its fields (`sections`) and its files (`file`)."""

from legolm.config.file import dump, load, validate
from legolm.config.sections import (
    AggregateConfig,
    BlockConfig,
    CalibrationConfig,
    ClientConfig,
    DataConfig,
    EvaluateConfig,
    FederationConfig,
    Fields,
    LoraConfig,
    Precision,
    Profile,
    RecoverConfig,
    RunConfig,
    Split,
    TrainConfig,
)

__all__ = [
    "AggregateConfig",
    "BlockConfig",
    "CalibrationConfig",
    "ClientConfig",
    "DataConfig",
    "EvaluateConfig",
    "FederationConfig",
    "Fields",
    "LoraConfig",
    "Precision",
    "Profile",
    "RecoverConfig",
    "RunConfig",
    "Split",
    "TrainConfig",
    "dump",
    "load",
    "validate",
]
