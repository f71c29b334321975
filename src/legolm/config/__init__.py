"""The run's configuration: its fields (`sections`, `run`) and its files (`file`)."""

from legolm.config.aggregation import (
    AggregateConfig,
    Codec,
    FederationConfig,
    OutlierConfig,
    ServerConfig,
    SuperLinkConfig,
)
from legolm.config.blocks import CLIENTS, BlockConfig, CalibrationConfig, RecoverConfig, TextConfig
from legolm.config.dp import DpConfig
from legolm.config.file import dump, load, read, validate
from legolm.config.privacy import PrivacyConfig, SecureConfig
from legolm.config.registry import (
    CRITERIA,
    EXPORTERS,
    SCHEMES,
    TRAINERS,
    Choice,
    Entry,
    Registry,
    foreign,
    guarded,
    load_plugins,
)
from legolm.config.run import RunConfig, SiteConfig
from legolm.config.section import LAYOUT_FIELDS, Fields, Layout, Name, RowsConfig, parse_quantity
from legolm.config.sections import (
    AUTO,
    ClientConfig,
    DataConfig,
    Device,
    EvaluateConfig,
    LoraConfig,
    Precision,
    Profile,
    ReportConfig,
    Split,
    TrainConfig,
)
from legolm.config.study import Variant, load_study

__all__ = [
    "AUTO",
    "CLIENTS",
    "CRITERIA",
    "EXPORTERS",
    "LAYOUT_FIELDS",
    "SCHEMES",
    "TRAINERS",
    "AggregateConfig",
    "BlockConfig",
    "CalibrationConfig",
    "Choice",
    "ClientConfig",
    "Codec",
    "DataConfig",
    "Device",
    "DpConfig",
    "Entry",
    "EvaluateConfig",
    "FederationConfig",
    "Fields",
    "Layout",
    "LoraConfig",
    "Name",
    "OutlierConfig",
    "Precision",
    "PrivacyConfig",
    "Profile",
    "RecoverConfig",
    "Registry",
    "ReportConfig",
    "RowsConfig",
    "RunConfig",
    "SecureConfig",
    "ServerConfig",
    "SiteConfig",
    "Split",
    "SuperLinkConfig",
    "TextConfig",
    "TrainConfig",
    "Variant",
    "dump",
    "foreign",
    "guarded",
    "load",
    "load_plugins",
    "load_study",
    "parse_quantity",
    "read",
    "validate",
]
