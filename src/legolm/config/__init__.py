"""The run's configuration: its fields (`sections`) and its files (`file`)."""

from legolm.config.aggregation import AggregateConfig, Codec, FederationConfig, OutlierConfig
from legolm.config.file import dump, load, validate
from legolm.config.sections import (
    BlockConfig,
    CalibrationConfig,
    ClientConfig,
    DataConfig,
    Device,
    EvaluateConfig,
    Fields,
    LoraConfig,
    Precision,
    Profile,
    RecoverConfig,
    RunConfig,
    Split,
    TrainConfig,
)
from legolm.config.study import Variant, load_study

__all__ = [
    "AggregateConfig",
    "BlockConfig",
    "CalibrationConfig",
    "ClientConfig",
    "Codec",
    "DataConfig",
    "Device",
    "EvaluateConfig",
    "FederationConfig",
    "Fields",
    "LoraConfig",
    "OutlierConfig",
    "Precision",
    "Profile",
    "RecoverConfig",
    "RunConfig",
    "Split",
    "TrainConfig",
    "Variant",
    "dump",
    "load",
    "load_study",
    "validate",
]
