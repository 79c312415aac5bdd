"""The classifier of a run behind HTTP, by Ray Serve: an image in, its cluster and confidence out.

    pip install '.[serve]'
    python jobs/serve.py RUN_DIR [port=8000] [host=127.0.0.1] [replicas=1] [num_gpus=0]
    curl --data-binary @photo.jpg http://127.0.0.1:8000/    # {"cluster": 7, "confidence": 0.98}

It serves until Ctrl-C, on a Ray of its own or, as a Ray job, on the job's cluster. What is no image
is answered by 400 and one line. Nobody is asked for a password: who reaches the port may use it.
Shapes: B images at once, S side of the input.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from icce_ray.config.schema import EmbedConfig, RayConfig
from icce_ray.core.preprocess import BadImage, pixels_of
from icce_ray.distributed.cluster import Cluster
from icce_ray.distributed.inference import finished_classifier, open_classifier
from icce_ray.errors import ConfigError, IcceError, StageError, printable_lines
from icce_ray.rundir import storage
from icce_ray.rundir.curated import current
from icce_ray.rundir.directory import RunDirectory

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "icce-ray"
MOST_BYTES = 64 << 20  # of a request
BATCH, WAIT = 32, 0.01  # images at once, and seconds to wait for that many
WAITING = 256  # requests that a replica takes on: they decode while others compute
USE = "python jobs/serve.py RUN_DIR [port=8000] [host=127.0.0.1] [replicas=1] [num_gpus=0]"


class Classifier:
    """A replica: the classifier on its device, and what a request gets of it."""

    def __init__(self, run_dir: str, gpu: bool = False) -> None:
        import torch

        opened = open_classifier(current(RunDirectory(run_dir)), EmbedConfig().precision)
        self.model, self.preprocess, self.levels = opened.model, opened.preprocess, opened.levels
        self.device = torch.device("cuda" if gpu else "cpu")
        note = json.dumps({"backbones": self.model.load(self.device)})
        opened.loaded.see(np.array([note], dtype=object))  # other weights give other features

    def prepare(self, data: bytes) -> list[np.ndarray]:
        """Pixels uint8 [3, S, S] for each distinct preparation. Raises BadImage."""
        return pixels_of(data, self.preprocess, EmbedConfig().max_pixels, self.levels)

    def classify(self, images: Sequence[list[np.ndarray]]) -> list[dict[str, Any]]:
        """Cluster and confidence of prepared images, [B]; a confidence that is none is null."""
        import torch

        stacked = [np.stack(each) for each in zip(*images, strict=True)]
        columns = self.model.compute([torch.from_numpy(one).to(self.device) for one in stacked])
        rows = zip(columns["cluster"], columns["confidence"], columns["valid"], strict=True)
        return [
            {"cluster": int(cluster), "confidence": round(float(sure), 6) if valid else None}
            for cluster, sure, valid in rows
        ]


def app(run_dir: str, replicas: int = 1, num_gpus: float = 0) -> Application:
    """The application for `ray.serve.run`. num_gpus: of each replica."""
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response

    class Service:
        """What Serve runs: requests decode side by side, and compute together."""

        def __init__(self) -> None:
            self.classifier = Classifier(run_dir, gpu=num_gpus > 0)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
        async def together(self, images: list[list[np.ndarray]]) -> list[dict[str, Any]]:
            return await asyncio.to_thread(self.classifier.classify, images)

        async def __call__(self, request: Request) -> Response:
            if request.method != "POST":
                text = "POST the bytes of an image: curl --data-binary @photo.jpg URL\n"
                return PlainTextResponse(text, 405, {"Allow": "POST"})
            data = bytearray()
            async for chunk in request.stream():
                data += chunk
                if len(data) > MOST_BYTES:
                    return PlainTextResponse(f"more than {MOST_BYTES >> 20} MB\n", 413)
            try:
                pixels = await asyncio.to_thread(self.classifier.prepare, bytes(data))
            except BadImage as error:
                return PlainTextResponse(f"{printable_lines(str(error))}\n", 400)
            return JSONResponse(await self.together(pixels))

    deployment = serve.deployment(Service, name=NAME, num_replicas=replicas)
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": num_gpus}
    return deployment.options(max_ongoing_requests=WAITING, ray_actor_options=options).bind()


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    run_dir: str
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    num_gpus: float = 0.0


def options_of(arguments: Sequence[str]) -> Options:
    """The command line. Raises ConfigError."""
    kinds = {"host": str, "port": int, "replicas": int, "num_gpus": float}
    first, *rest = arguments or ("",)
    if not first or first.startswith("-") or first.split("=")[0] in kinds:
        raise ConfigError(f"name a finished run: {USE}")
    given: dict[str, Any] = {}
    for text in rest:
        key, _, value = text.partition("=")
        try:
            given[key] = kinds[key](value)
        except (KeyError, ValueError):
            raise ConfigError(f"{text} is not understood: {USE}") from None
    return Options(first, **given)


def check(options: Options) -> None:
    """What can be wrong before Ray is started. Raises ConfigError, ArtifactError."""
    try:
        import fastapi  # noqa: F401
        from ray import serve  # noqa: F401
    except ImportError:
        raise ConfigError("Ray Serve is not installed: pip install '.[serve]'") from None
    storage.check(options.run_dir)
    run = current(RunDirectory(options.run_dir))
    finished_classifier(run)
    open_classifier(run, EmbedConfig().precision)


def check_port(options: Options) -> None:
    """Raises ConfigError where the port is taken: two Serves would share it, and its requests."""
    with socket.socket() as one:
        one.settimeout(1)
        taken = one.connect_ex((options.host, options.port)) == 0
    if taken:
        raise ConfigError(
            f"port {options.port} of {options.host} is taken; choose another port=..."
        )


def start(options: Options, cluster: Cluster) -> None:
    """Serve, and return once the replicas answer. Raises IcceError."""
    from ray import exceptions, serve

    cluster.start()
    application = app(options.run_dir, options.replicas, options.num_gpus)
    try:
        serve.start(http_options={"host": options.host, "port": options.port})
        serve.run(application, name=NAME, route_prefix="/")
    except (RuntimeError, exceptions.RayError) as error:
        *_, reason = str(error).strip().splitlines()  # above it is Ray's traceback
        raise StageError(f"cannot serve at {options.host}:{options.port}: {reason}") from None


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is ended."""
    cluster = Cluster(RayConfig())
    try:
        options = options_of(arguments)
        check(options)
        if (
            cluster.is_local
        ):  # else an earlier job's Serve may have it, which gets the new classifier
            check_port(options)
        start(options, cluster)
        print(f"serving {options.run_dir} at http://{options.host}:{options.port}/", flush=True)
        while True:
            time.sleep(3600)
    except IcceError as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        pass
    finally:
        cluster.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
