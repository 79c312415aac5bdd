"""The settings: one tree, from YAML and KEY=VALUE overrides."""

from icce_ray.config.loading import as_overrides, golden_configs, load, merge, to_yaml, validate
from icce_ray.config.schema import Config, describe, settings

__all__ = [
    "Config",
    "as_overrides",
    "describe",
    "golden_configs",
    "load",
    "merge",
    "settings",
    "to_yaml",
    "validate",
]
