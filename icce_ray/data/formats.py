"""Which format a file's name says it has. Everything that decides on a format asks here."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from icce_ray.rundir.addresses import split_options

HEIF = ("heic", "heics", "heif", "heifs", "hif")
_HEIF_READ = find_spec("pi_heif") is not None  # it has no wheels for some platforms

# The endings that Pillow gives to the formats that are decoded (core.preprocess.FORMATS).
IMAGES = (
    *("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm", "pbm", "pnm"),
    *("pfm", "jfif", "jpe", "mpo", "apng", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    *("avif", "avifs"),
    *(HEIF if _HEIF_READ else ()),
)
PARQUET = ("parquet", "pq")
TARS = ("tar",)
FORMATS = {"folder": IMAGES, "parquet": PARQUET, "webdataset": TARS}
LISTS = ("csv", "tsv")  # of paths or URLs of images, where the file itself is given
VECTORS = ("npy", "npz", "pt", "pth")  # embeddings; Parquet may hold them as well
DATA = (*IMAGES, *PARQUET, *TARS, *LISTS, *VECTORS)  # what may stand for a config

# Images as well, but of formats that are not decoded here.
UNDECODABLE = (
    *(() if _HEIF_READ else HEIF),
    *("jxl", "svg", "svgz", "eps", "psd", "xcf", "ico", "tga", "exr"),
    *("hdr", "dds", "dib", "pcx", "qoi", "sgi", "dcm", "nii", "fits", "jxr", "wdp", "dng"),
    *("cr2", "cr3", "nef", "nrw", "arw", "raf", "orf", "rw2", "pef", "srw", "raw"),
)


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's address, in lower case; "" where there is none."""
    base = split_options(name)[0].rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def dotted(suffixes: Iterable[str]) -> str:
    """Endings as a text: .jpg, .png."""
    return ", ".join(f".{suffix}" for suffix in suffixes)
