"""`icce-ray run` for `ray job submit --working-dir . -- python jobs/pipeline.py ...`."""

import sys

from icce_ray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
