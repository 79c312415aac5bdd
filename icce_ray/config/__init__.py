"""The settings: one tree, from YAML and KEY=VALUE overrides."""

from icce_ray.config.loading import golden_configs, load, merge, to_yaml, validate
from icce_ray.config.schema import Config, describe, settings

__all__ = [
    "Config",
    "describe",
    "golden_configs",
    "load",
    "merge",
    "settings",
    "to_yaml",
    "validate",
]
