"""`icce-ray sweep` for `ray job submit --working-dir . -- python jobs/sweep.py ...`."""

import sys

from icce_ray.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
