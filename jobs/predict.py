"""`icce-ray predict` for `ray job submit --working-dir . -- python jobs/predict.py ...`."""

import sys

from icce_ray.cli import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
