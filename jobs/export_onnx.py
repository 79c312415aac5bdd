"""The classifier of a run as one ONNX file: `python jobs/export_onnx.py RUN_DIR model.onnx`.

icce_ray/core/classifier/onnx.py says what goes in and comes out. Needs `pip install '.[onnx]'`.
"""

import sys
from pathlib import Path

from icce_ray.core.classifier import model, onnx
from icce_ray.distributed.inference import (
    CLASSIFIER,
    DESCRIPTION,
    WEIGHTS,
    finished_classifier,
)
from icce_ray.errors import ConfigError, IcceError, printable_lines
from icce_ray.rundir import storage
from icce_ray.rundir.curated import current
from icce_ray.rundir.directory import RunDirectory


def main(arguments: list[str]) -> None:
    """Write the file, and print its path. Raises IcceError."""
    if len(arguments) != 2 or not arguments[1].endswith(".onnx"):
        raise ConfigError("python jobs/export_onnx.py RUN_DIR model.onnx")
    run_dir, out = arguments[0], Path(arguments[1])
    storage.check(run_dir)
    run = current(RunDirectory(run_dir))
    finished_classifier(run)
    description = run.read_json(CLASSIFIER, DESCRIPTION)
    onnx.export(model.load(run.read_bytes(CLASSIFIER, WEIGHTS), description), description, out)
    print(out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except IcceError as error:
        print(f"error: {printable_lines(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
