"""The settings: one tree, from YAML and KEY=VALUE overrides."""

from icce_ray.config.loading import (
    Range,
    as_overrides,
    golden_configs,
    load,
    merge,
    parse_range,
    to_yaml,
    validate,
)
from icce_ray.config.schema import Config, describe, settings

__all__ = [
    "Config",
    "Range",
    "as_overrides",
    "describe",
    "golden_configs",
    "load",
    "merge",
    "parse_range",
    "settings",
    "to_yaml",
    "validate",
]
