"""Whether a model's weights can be downloaded, and what there is without a network."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from icce_ray.config.backbones import OFFLINE
from icce_ray.errors import ConfigError, one_line

PREFIX = "hf-hub:"  # of a model that is described on the hub, not by timm
TIMEOUT = 5.0  # seconds for the hub to answer
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
FOLDER = "models--"  # of a cached repository, then its name with -- for each slash
MOST = 5  # cached models that a message names


def check(name: str, repository: str) -> None:
    """See, within seconds, that the weights are cached or can be downloaded.

    repository: on the Hugging Face hub, as OWNER/NAME or OWNER/NAME@REVISION.

    Raises ConfigError: neither; with the hub's reason, and what works without it.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    where, _, revision = repository.partition("@")
    if where in cached():
        return
    try:
        url = hf_hub_url(where, "config.json", revision=revision or None)
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except EntryNotFoundError:  # an answer as well: the repository is there, and may be read
        return
    except Exception as error:  # the hub's client raises errors of many libraries
        raise unreachable(name, error) from None


@lru_cache(maxsize=16)
def pretrained_cfg(name: str) -> Any:
    """What the hub says of a timm model there, as timm's PretrainedCfg.

    Raises ConfigError: no such model, no network, or none of timm's kind.
    """
    from timm.models import PretrainedCfg, load_model_config_from_hf

    try:
        found, *_ = load_model_config_from_hf(name.removeprefix(PREFIX))
        return PretrainedCfg(**found)
    except Exception as error:
        raise unreachable(name, error) from None


def unreachable(name: str, error: Exception) -> ConfigError:
    """The error for weights, or files beside them, that did not come from the hub."""
    reason = f"{type(error).__name__}: {one_line(error, 150)}"
    return ConfigError(f"the weights of {name} cannot be downloaded ({reason}). {remedies()}")


def cached() -> list[str]:
    """Repositories whose weights lie in the hub's cache on this machine, as OWNER/NAME."""
    from huggingface_hub.constants import HF_HUB_CACHE

    files = Path(HF_HUB_CACHE).glob(f"{FOLDER}*/snapshots/*/*")
    found = {file.parents[2].name for file in files if file.suffix in WEIGHTS and file.exists()}
    return sorted(name.removeprefix(FOLDER).replace("--", "/") for name in found)


def remedies() -> str:
    """What to use where nothing can be downloaded."""
    names = [name.removeprefix("timm/") for name in cached() if name.startswith("timm/")]
    text = (
        f"Without a network, there are: backbone={OFFLINE}, whose weights are installed; "
        "backbone.weights=FILE (safetensors or a PyTorch state dict); "
        "data.embeddings=FILE, embeddings of your own"
    )
    if names:
        more = ", ..." if len(names) > MOST else ""
        text += f"; in this machine's cache: backbone={', '.join(names[:MOST])}{more}"
    return f"{text}."
